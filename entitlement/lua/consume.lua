-- Decides one CheckAndConsume and, if it is granted, debits it. One script, one fate: idempotency record, balance,
-- per-grant burn, meters, quotas, thresholds and the journal record change together or not at all. Everything is
-- validated before the first write. This is its head; decide.lua and commit.lua follow.
--
-- KEYS  1 account (hash)  2 idempotency record (string)  3 journal (stream)          all with the partition's hash tag
-- ARGV  1 fingerprint (8 bytes)      2 the request, as journaled
--       3 mode: 1 normal, 2 best effort, 3 check only, 4 adjust only, 5 adjust what was granted while this store was
--         away (journaled as degraded)                                          4 event time ms, 0 = now
--       5 'tenant customer'          6 memory of the key, ms      7 oldest event, ms before now    8 newest, ms after now
--       9 plan (rate card)          10 its version     11, 12 [from, until) ms of that version, until 0 = none
--       13 number of usage lines, then for each line: feature, meter, compiled rate or '-' (no price) or '!' (no such
--       feature), 's' (shadow) or '-'; then each line's quantity; then the subject, when the request names one
--       All numbers are plain decimal integers; the caller has checked them.
-- Returns one string:
--       '=' credit_type NUL answer (decided now)    '~' credit_type NUL answer (this key's first answer)
--       '!NOT_LOADED'  '!MISMATCH'  '!STALE plan now'  '!TIME now'  '!RANGE line'
-- answer: packed little-endian (see entitlement/decision.py): verdict reason failed flags, epoch, sequence, version, available,
--       settled, [held overage gate], number of lines, each line's quantity and amount [and quota].
--       An amount is its pair as i5 I4. At most 100 bytes with its key for one line, so that an hour of keys stays small.
local check = ARGV[3] == '3'
local stored = not check and redis.call('GET', KEYS[2])
if stored then
  if string.sub(stored, 1, 8) ~= ARGV[1] then return '!MISMATCH' end
  local c = redis.call('HGET', KEYS[1], 'c')
  return '~' .. (c and string.match(c, '^%S %S %S+ (%S+)') or '') .. '\0' .. string.sub(stored, 9)
end

local ARGS, NONE = 13, 255
local n = tonumber(ARGV[13])
local QUANTITIES = ARGS + 4 * n
local subject = ARGV[QUANTITIES + n + 1]
local replay, kind, extra, suffix, finish = false, 1, '', '', nil
