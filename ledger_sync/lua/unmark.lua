-- Forgets that the ledger had no such customer: it has one now. One script, so that a live account is never touched.
--
-- KEYS  1 account (hash)
-- Returns 1 when a mark was removed, 0 when there was none.
if redis.call('HGET', KEYS[1], 'c') ~= 'missing' then return 0 end
return redis.call('DEL', KEYS[1])
