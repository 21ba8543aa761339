-- Sets units aside, or more of them (an extension). Decided as a consumption is, and counted in `held`, on quotas and on the
-- subject's limit; no grant is burned and no meter moves before it is settled. One script, one fate, as in consume.lua.
--
-- KEYS  1 account   2 hold   3 journal   4 index of holds
-- ARGV  as for consume.lua (mode 1, 2, or 4: as it was answered), then after the quantities: 1 subject or ''   2 hold id
--       3 how long, ms   4 at most, ms   5 key of the extension, '' = a new hold   6 '1': replayed
-- Returns as consume.lua, and how the hold stands after the answer (see holds.lua); '!HOLD reason' of an extension.
local ARGS, NONE = 13, 255
local n = tonumber(ARGV[13])
local QUANTITIES = ARGS + 4 * n
local REST = QUANTITIES + n
local subject = ARGV[REST + 1] ~= '' and ARGV[REST + 1] or nil
local extension, replay, check = ARGV[REST + 5], ARGV[REST + 6] == '1', false
local held = read_hold(KEYS[2])
if held then
  local c, d = unpack(redis.call('HMGET', KEYS[1], 'c', 'd'))
  local gone = held.state == 'H' and (not d or struct.unpack('<d', d) ~= held.epoch)
  if gone then
    if not d or struct.unpack('<d', d) < held.epoch then return '!NOT_LOADED' end
    held = nil
  else
    if replay and held.state ~= 'H' then return '!HOLD 13' end
    local first = extension == '' and {redis.call('HGET', KEYS[2], 'f'), redis.call('HGET', KEYS[2], 'a')}
    if not first then
      local known = redis.call('HGET', KEYS[2], 'k:' .. extension)
      first = known and {string.sub(known, 1, 8), string.sub(known, 9)}
    end
    if first then
      if first[1] ~= ARGV[1] then return '!MISMATCH' end
      return '~' .. (c and string.match(c, '^%S %S %S+ (%S+)') or '') .. '\0' .. first[2]
        .. standing((held.state == 'H' or held.state == 'E') and held.expires or 0, held.number, held.h, held.l)
    end
    if held.state ~= 'H' then return '!HOLD 13' end
    subject = held.subject
  end
end
if extension ~= '' and not held then return no_hold(KEYS[1]) end
