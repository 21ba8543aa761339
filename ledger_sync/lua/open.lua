-- Writes the ledger's word for this hot store, unless a later one is there: numbers only rise. One script with the look at
-- the clock before it, so that a word that was long under way is not taken for one of now.
--
-- KEYS  1 ent:open
-- ARGV  1 what it shall hold: 'number run_id/replid deployment'   2 the number
-- Returns 1 when it was written, 0 when it was not.
local told = redis.call('GET', KEYS[1])
if told and tonumber(string.match(told, '^(%d+) ')) > tonumber(ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
