-- Debits once more what a gateway has acknowledged, if this hot store does not know of it: it is another one than that
-- which decided, or an older one. What was answered is debited as it was answered: nothing is priced or refused, the
-- account may go beyond its gate. One script, one fate, as in consume.lua, so that no decision can come in between.
--
-- KEYS  1 account (hash)  2 idempotency record (string)  3 journal (stream)
-- ARGV  1 fingerprint (8 bytes)   2 the request, as journaled   3 the answer, as consume.lua has packed it
--       4 when it was decided, ms   5 event time ms, 0 = when it was decided
--       6 'tenant customer'   7 memory of the key, ms   8 plan (rate card)   9 its version   10 verdict   11 shadow: 0, 1
--       12 subject, or ''   13 number of lines, then for each line: feature, meter, units, nanos
-- Returns 1 when it was debited, 0 when it is known; '!NOT_LOADED', '!MISSING' (the ledger has no such customer) or
-- '!RANGE': it cannot be debited. What comes back with '!' has changed nothing, but for a period that was over: it is
-- turned by whatever touches the account.
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local n, subject = tonumber(ARGV[13]), ARGV[12]
local names = {'c', 'd', 'g'}
for i = 1, n do
  names[2 * i + 2] = 'u:' .. ARGV[11 + 4 * i]
  names[2 * i + 3] = 'q:' .. ARGV[10 + 4 * i]
end
if subject ~= '' then names[2 * n + 4] = 's:' .. subject end
local fields = redis.call('HMGET', KEYS[1], unpack(names))
if not fields[1] or fields[1] == 'frozen' then return '!NOT_LOADED' end
if fields[1] == 'missing' then return '!MISSING' end

local a = read_config(fields[1])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local event = tonumber(ARGV[5])
if event == 0 then event = math.min(tonumber(ARGV[4]), now) end
local at = math.min(event, now)
read_state(a, fields[2])
local grants = read_grants(fields[3])
if a.to > 0 and now >= a.to then
  roll(KEYS[1], KEYS[3], ARGV[6], a, grants, now)
  for i = 1, n do fields[2 * i + 2] = false end
end
local started, prefix = a.from, 'u:'
if at < a.from then
  read_terms(a)
  started = period(tonumber(a.recurrence), tonumber(a.anchor), at)
  prefix = 'U:' .. integer(started) .. ':'
  for i = 1, n do fields[2 * i + 2] = redis.call('HGET', KEYS[1], prefix .. ARGV[11 + 4 * i]) end
end
local own = subject ~= '' and fields[2 * n + 4] and read_subject(fields[2 * n + 4], now)
if own and at < own.from then own = nil end

local meters, quotas, burned, back = {}, {}, {}, false
local total_h, total_l, over_h, over_l = 0, 0, a.oh, a.ol
for i = 1, n do
  local feature, meter, units = ARGV[10 + 4 * i], ARGV[11 + 4 * i], tonumber(ARGV[12 + 4 * i])
  local h, l = num(ARGV[13 + 4 * i])
  local parts, count, need_h, need_l = burn(grants, feature, at, h, l)
  if need_h ~= 0 or need_l ~= 0 then
    back = back or need_h < 0
    over_h, over_l = add(over_h, over_l, need_h, need_l)
    parts, count = parts .. struct.pack('<ddd', 0, need_h, need_l), count + 1
  end
  total_h, total_l = add(total_h, total_l, h, l)
  meters[meter] = (meters[meter] or tonumber(fields[2 * i + 2] or 0)) + units
  local q = quotas[feature] or fields[2 * i + 3] and read_quota(fields[2 * i + 3], now)
  if q then
    if at >= q.from then q.used = q.used + units end
    quotas[feature] = q
  end
  if own then own.uh, own.ul = add(own.uh, own.ul, h, l) end
  if over(over_h, over_l) or over(total_h, total_l) or meters[meter] > 9007199254740991 then return '!RANGE' end
  burned[i] = struct.pack('<dddI2s', units, h, l, count, meter) .. parts
end
if at >= a.from then
  total_h, total_l = add(a.sh, a.sl, total_h, total_l)
  if over(total_h, total_l) then return '!RANGE' end
  a.sh, a.sl = total_h, total_l
end
a.oh, a.ol = over_h, over_l
a.sequence = a.sequence + 1
local crossings = '-'
if back or not less(a.sh, a.sl, a.nh, a.nl) then crossings = cross(a) end

local writes = {'d', write_state(a), 'g', write_grants(grants)}
for meter, units in pairs(meters) do
  writes[#writes + 1] = prefix .. meter
  writes[#writes + 1] = integer(units)
end
for feature, q in pairs(quotas) do
  writes[#writes + 1] = 'q:' .. feature
  writes[#writes + 1] = write_quota(q)
end
if own then
  writes[#writes + 1] = 's:' .. subject
  writes[#writes + 1] = write_subject(own)
end

-- After this point it must succeed. The record comes first: it alone could fail, and then nothing is written.
journal(KEYS[3], 1, ARGV[6], a, now, crossings,
  struct.pack('<ddBBdddddBsss', event, started, ARGV[10], ARGV[11], a.sh, a.sl, a.ah, a.al, a.from, n, a.credit, ARGV[8], ARGV[9])
    .. table.concat(burned) .. ARGV[2])
redis.call('HSET', KEYS[1], unpack(writes))
redis.call('SET', KEYS[2], ARGV[1] .. ARGV[3], 'PX', ARGV[7])
return 1
