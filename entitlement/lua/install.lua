-- Puts one account, as the ledger knows it, into the hot store. Does nothing when a live account is there already: what
-- is live is ahead of the ledger, and an install must never take back a decision. A mark gives way: 'missing', and
-- 'frozen', which stands where an account is to be built anew and answers ACCOUNT_FROZEN meanwhile.
--
-- KEYS  1 account (hash)
-- ARGV  field, value, ... (see entitlement/account.py), or 'missing', milliseconds: the ledger has no such customer,
--       remembered briefly.
-- Returns 1 when installed, 0 when an account was there.
local c = redis.call('HGET', KEYS[1], 'c')
if c and c ~= 'missing' and c ~= 'frozen' then return 0 end
redis.call('DEL', KEYS[1])
if ARGV[1] == 'missing' then
  redis.call('HSET', KEYS[1], 'c', 'missing')
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return 1
end
-- In parts: unpack has a limit, and an account may have thousands of closed meters.
for i = 1, #ARGV, 1000 do redis.call('HSET', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV))) end
return 1
