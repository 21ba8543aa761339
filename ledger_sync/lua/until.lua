-- Put before another script: does nothing when it is too late. A command whose answer was lost may still lie in a socket's
-- buffer and run after its sender has gone on; past its time it cannot. One script with what follows: the look at the
-- clock and the change have one fate.
--
-- KEYS  those of the script that follows
-- ARGV  those of the script that follows, then the last millisecond (of this server's clock) in which it may run
-- Returns -1 when it is too late, else what the script that follows returns.
do
  local clock = redis.call('TIME')
  if tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000) > tonumber(table.remove(ARGV)) then return -1 end
end

