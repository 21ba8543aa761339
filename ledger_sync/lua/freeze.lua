-- Takes an account out of the hot store that is to be built anew from the ledger, and leaves a mark: until it is installed,
-- calls are answered with ACCOUNT_FROZEN. The mark does not last: whoever was to install may have died. One script, so that
-- no decision finds half an account.
--
-- KEYS  1 account (hash)
-- ARGV  1 how long the mark stands, ms
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'c', 'frozen')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
