-- The end of reserve.lua, after decide.lua.
if denied then
  return '=' .. a.credit .. '\0' .. answer(available(a, read_grants(fields[3]), now)) .. standing(0, 0, 0, 0)
end
if total_h < 0 then total_h, total_l = 0, 0 end
a.hh, a.hl = add(a.hh, a.hl, total_h, total_l)
if over(a.hh, a.hl) then return '!RANGE 0' end
a.sequence = a.sequence + 1
local ttl, longest = tonumber(ARGV[REST + 3]), tonumber(ARGV[REST + 4])
local created = held and held.created or now
local expires = math.min(now + ttl, created + longest)
if held and ttl == 0 then expires = held.expires end

local writes = {'d', write_state(a)}
write_limits(writes, quotas, subject, own, own_h, own_l)
local lines, journaled, left_h, left_l = held and held.lines or {}, {}, total_h, total_l
for i = 1, n do
  local feature, units, h, l = ARGV[ARGS + 4 * i - 3], struct.unpack('<I7i5I4', charged[i])
  local q = quotas[feature]
  add_line(lines, feature, units, q and at >= q.from and q.from + 1 or 0)
  journaled[i] = struct.pack('<ddds', units, h, l, ARGV[ARGS + 4 * i - 2])
end
if held then left_h, left_l = add(left_h, left_l, held.h, held.l) end
local window, own_by_h, own_by_l = held and held.window or 0, held and held.oh or 0, held and held.ol or 0
if own_h then
  if window ~= own.from + 1 then window, own_by_h, own_by_l = own.from + 1, 0, 0 end -- What an earlier window counted is over.
  own_by_h, own_by_l = add(own_by_h, own_by_l, total_h, total_l)
end

-- After this point it must succeed. What could fail comes first: a place in the index without its hold is harmless.
redis.call('ZADD', KEYS[4], expires, ARGV[5] .. ' ' .. ARGV[REST + 2])
journal(KEYS[3], 4, ARGV[5], a, now, '-',
  struct.pack('<dddBddBsssss', event, created, expires, held and 1 or 0, total_h, total_l, n, a.credit, ARGV[9], ARGV[10], ARGV[REST + 2], subject or '')
    .. table.concat(journaled) .. ARGV[2])
redis.call('HSET', KEYS[1], unpack(writes))
local result = answer(available(a, read_grants(fields[3]), now))
if held then
  redis.call('HSET', KEYS[2], 'x', integer(expires), 'n', text(left_h, left_l), 'l', write_lines(lines),
    'w', integer(window), 'o', text(own_by_h, own_by_l), 'k:' .. extension, ARGV[1] .. result)
else
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[2], 'f', ARGV[1], 'a', result, 's', 'H', 'e', integer(a.epoch), 'c', integer(now), 'x', integer(expires),
    'n', text(left_h, left_l), 'u', subject or '', 'w', integer(window), 'o', text(own_by_h, own_by_l), 'l', write_lines(lines))
end
return '=' .. a.credit .. '\0' .. result .. standing(expires, held and held.number or 0, left_h, left_l)
