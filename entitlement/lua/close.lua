-- Ends a hold without usage, or moves the time at which it expires. One script, one fate.
--
-- KEYS  1 account   2 hold   3 journal   4 index of holds   5 of S: idempotency record of its key
-- ARGV  1 what: R release, E expire (if it is time), S settle with nothing used, T more time   2 'tenant customer'   3 hold id
--       4 memory of it, ms   5 of S: the request's fingerprint   6 of T: how long, ms   7 of T: at most, ms
--       8 of E: run_id of the server that the ledger has opened: on no other does a hold expire
--       9 of T: a stream that has the hold from now on, or ''   10 '1': it leaves it, unless another stream has it
-- Returns as reserve.lua; '~' too when it had been done before, then with the balance of now; '!HOLD 12', '!HOLD 13';
-- '!HOLD 15': the account is being built anew; '!LATER': it is not time yet.
local held, what, member = read_hold(KEYS[2]), ARGV[1], ARGV[2] .. ' ' .. ARGV[3]
if what == 'E' and string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') ~= ARGV[8] then return '!OTHER' end
local stored = what == 'S' and redis.call('GET', KEYS[5])
if stored then
  if string.sub(stored, 1, 8) ~= ARGV[5] then return '!MISMATCH' end
  return '~' .. string.sub(stored, 9)
end
if not held then
  local said = no_hold(KEYS[1])
  if what == 'E' and said == '!HOLD 12' then redis.call('ZREM', KEYS[4], member) end
  return said
end
local fields = redis.call('HMGET', KEYS[1], 'c', 'd', 'g')
if not fields[1] or fields[1] == 'missing' then return '!NOT_LOADED' end
if fields[1] == 'frozen' then return '!HOLD 15' end
local a = read_config(fields[1])
read_state(a, fields[2])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
if held.state == 'H' and held.epoch ~= a.epoch then
  if held.epoch > a.epoch then return '!NOT_LOADED' end
  if what == 'E' then redis.call('ZREM', KEYS[4], member) end
  return '!HOLD 12'
end

local function told(sign, expires)
  local h, l = available(a, read_grants(fields[3]), now)
  return sign .. a.credit .. '\0' .. struct.pack('<BBBBI4I6I4i5I4i5I4i5I4i5I4i5I4B', 1, 0, 255, 2, a.epoch, a.sequence, 0, h, l, a.sh, a.sl,
    a.hh, a.hl, a.oh, a.ol, a.gh, a.gl, 0) .. standing(expires, held.number, expires > 0 and held.h or 0, expires > 0 and held.l or 0)
end

if held.state ~= 'H' then
  if what == 'E' then redis.call('ZREM', KEYS[4], member) end
  if what == 'E' or (what == 'R' and held.state ~= 'S') then return told('~', 0) end
  if not (what == 'S' and held.state == 'E') then return '!HOLD 13' end
end
if what == 'E' and now < held.expires then return '!LATER' end
if what == 'T' and ARGV[10] == '1' then
  local owner = redis.call('HGET', KEYS[2], 'v')
  if owner and owner ~= ARGV[9] then return told('~', held.expires) end
end
local late = held.state == 'E'
a.sequence = a.sequence + 1
if what == 'T' then
  local expires = math.min(now + tonumber(ARGV[6]), held.created + tonumber(ARGV[7]))
  -- What could fail comes first: who looks at the index too late or too early looks at the hold as well.
  redis.call('ZADD', KEYS[4], expires, member)
  journal(KEYS[3], 4, ARGV[2], a, now, '-',
    struct.pack('<dddBddBsssss', now, held.created, expires, 1, 0, 0, 0, a.credit, '', '', ARGV[3], held.subject or ''))
  redis.call('HSET', KEYS[1], 'd', write_state(a))
  redis.call('HSET', KEYS[2], 'x', integer(expires))
  if ARGV[9] ~= '' and ARGV[10] ~= '1' then redis.call('HSET', KEYS[2], 'v', ARGV[9]) end
  return told('=', expires)
end

local quotas, own, own_h, own_l = {}, nil, nil, nil
if not late then
  a.hh, a.hl = sub(a.hh, a.hl, held.h, held.l)
  for _, line in ipairs(held.lines) do let_go(held, line.feature, nil, quotas, KEYS[1], now) end
  local limit = held.subject and redis.call('HGET', KEYS[1], 's:' .. held.subject)
  own = limit and read_subject(limit, now) or nil
  own_h, own_l = give_back(held, own, nil, nil, held.h, held.l)
end

local writes = {'d', write_state(a)}
write_limits(writes, quotas, held.subject, own, own_h, own_l)

-- After this point it must succeed. The record comes first: it alone could fail, and then nothing is written.
journal(KEYS[3], 6, ARGV[2], a, now, '-',
  struct.pack('<Bddss', what == 'S' and 1 or what == 'R' and 2 or 3, late and 0 or held.h, late and 0 or held.l, ARGV[3], held.subject or ''))
redis.call('HSET', KEYS[1], unpack(writes))
end_hold(KEYS[2], KEYS[4], member, what, ARGV[4])
local result = told('=', 0)
if what == 'S' then redis.call('SET', KEYS[5], ARGV[5] .. string.sub(result, 2), 'PX', ARGV[4]) end
return result
