-- Writes a hold as it shall stand in an account that is about to be installed; nothing stays of what was there under its
-- name, unless that is of a later install: then this has come late. (Put after until.lua.)
--
-- KEYS  1 hold   2 index of holds
-- ARGV  1 'tenant customer hold'   2 epoch of the install   3 when it expires, ms, 0 = it has ended   4 how long one that has
--       ended is remembered, ms   then field, value, ...
-- Returns 1 when it was written, 0 when it came late.
local epoch = redis.call('HGET', KEYS[1], 'e')
if epoch and tonumber(epoch) > tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1])
for i = 5, #ARGV, 1000 do redis.call('HSET', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV))) end
if ARGV[3] == '0' then
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
  redis.call('ZREM', KEYS[2], ARGV[1])
else
  redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
end
return 1
