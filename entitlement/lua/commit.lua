-- Debits what was decided, journals it and remembers the answer.
--
-- From the head: kind and extra (of the journal record), suffix (of the answer), finish (what else is written)
if denied or check then
  return '=' .. a.credit .. '\0' .. answer(available(a, read_grants(fields[3]), now))
end

if at >= a.from then
  total_h, total_l = add(a.sh, a.sl, total_h, total_l)
  if over(total_h, total_l) then return '!RANGE 0' end
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
write_limits(writes, quotas, subject, own, own_h, own_l)

-- After this point it must succeed. The record comes first: it alone could fail, and then nothing is written.
journal(KEYS[3], kind, ARGV[5], a, now, crossings,
  extra .. struct.pack('<ddBBdddddBsss', event, started, verdict, shadow + (degraded and 2 or 0), a.sh, a.sl, a.ah, a.al, a.from, n, a.credit, ARGV[9], ARGV[10])
    .. (n == 1 and burned[1] or table.concat(burned)) .. ARGV[2])
redis.call('HSET', KEYS[1], unpack(writes))
if finish then finish() end
local result = answer(available(a, grants, now)) .. suffix
redis.call('SET', KEYS[2], ARGV[1] .. result, 'PX', ARGV[6])
return '=' .. a.credit .. '\0' .. result
