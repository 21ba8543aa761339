-- Charges what was used of a hold: posted in full, whatever the hold was for. What it had set aside is let go by as much; with
-- `final`, all of it. A hold that has expired is settled once more, late: the work has happened; what is reported until the
-- final report is charged. One script, one fate.
--
-- KEYS  1 account   2 idempotency record   3 journal   4 hold   5 index of holds
-- ARGV  as for consume.lua with mode 4, then after the quantities: 1 hold id   2 '1': final   3 '1': replayed, as it was
--       answered   4 the subject, of a replay whose hold is gone   5, 6 the reports in it, from number to number; 0 = unnumbered
-- Returns as consume.lua, then 1 (late) or 0 as a byte and what is left of the hold as a pair; '!NUMBER last': its reports do
--       not follow the last one; '!HOLD 12' not found, '!HOLD 13' it has
--       ended, '!HOLD 15' its account is being built anew.
local stored = redis.call('GET', KEYS[2])
if stored then
  if string.sub(stored, 1, 8) ~= ARGV[1] then return '!MISMATCH' end
  local c = redis.call('HGET', KEYS[1], 'c')
  return '~' .. (c and string.match(c, '^%S %S %S+ (%S+)') or '') .. '\0' .. string.sub(stored, 9)
end
local ARGS, NONE = 13, 255
local n = tonumber(ARGV[13])
local QUANTITIES = ARGS + 4 * n
local REST = QUANTITIES + n
local held, replay, check = read_hold(KEYS[4]), ARGV[REST + 3] == '1', false
if not replay then
  if not held then return no_hold(KEYS[1]) end
  if held.state ~= 'H' and held.state ~= 'E' then return '!HOLD 13' end
  -- An unnumbered report may be one that was gathered with others, and charged under the last one's key.
  if (ARGV[REST + 6] ~= '0' or held.number > 0) and tonumber(ARGV[REST + 5]) ~= held.number + 1 then
    return '!NUMBER ' .. integer(held.number)
  end
end
local late = held ~= nil and held.state == 'E'
local subject = ARGV[REST + 4] ~= '' and ARGV[REST + 4] or nil
if held then subject = held.subject end
local kind, extra, suffix, finish = 5, '', '', nil
