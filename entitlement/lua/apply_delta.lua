-- Applies one ledger change (grant, void, contract, repair) to a live account: the whole static part is replaced, the
-- moving part is adjusted by signed amounts, so that it commutes with decisions that happen meanwhile. One script: the
-- change, its version, thresholds that it recovers or crosses, and its journal record have one fate.
--
-- KEYS  1 account (hash)   2 journal (stream)
-- ARGV  1 version: applied only when it is the account's version + 1
--       2 config (field c)
--       3 every grant that shall exist, in burn order: 'no:adjustment:new:effective:expires:features;' (new: 1 = joins the
--         cycle's allowance). A live grant that is not named is removed.
--       4 settled adjustment   5 overage adjustment                                       signed nanos
--       6 every quota that shall exist: 'feature limit soft recurrence anchor used-adjustment;'
--       7 meter adjustments: 'meter units meter units'                                     signed units
--       8 'tenant customer'
--       9 the period (its start, ms) that 4 and 7 are meant for, 0 = the current one
--       10 every subject's limit that shall exist: 'subject limit recurrence anchor used-adjustment;'   signed nanos
-- Returns '!NOT_LOADED', '!GAP have' (not the next version; have = the live one), or '=' sequence.
local fields = redis.call('HMGET', KEYS[1], 'c', 'd', 'g')
if not fields[1] or fields[1] == 'missing' or fields[1] == 'frozen' then return '!NOT_LOADED' end
local old, a = read_terms(read_config(fields[1])), read_terms(read_config(ARGV[2]))
read_state(a, fields[2])
if tonumber(ARGV[1]) ~= a.version + 1 then return '!GAP ' .. integer(a.version) end

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local live, order = {}, {}
for _, g in ipairs(read_grants(fields[3])) do live[g.no] = g; order[#order + 1] = g.no end

-- The period turns first, under the old contract, so that what follows adjusts the cycle it was meant for.
if a.to > 0 and now >= a.to then
  local grants = {}
  for i, no in ipairs(order) do grants[i] = live[no] end
  read_state(old, fields[2])
  roll(KEYS[1], KEYS[2], ARGV[8], old, grants, now)
  read_state(a, write_state(old))
end
a.version = tonumber(ARGV[1])

local oh, ol = num(ARGV[5])
a.oh, a.ol = add(a.oh, a.ol, oh, ol)
-- The period may have turned since the change was decided: what it meant for a closed cycle does not touch this one.
local cycle = tonumber(ARGV[9] or '0')
local meant = cycle == 0 or cycle == a.from
local sh, sl = num(meant and ARGV[4] or '0')
a.sh, a.sl = add(a.sh, a.sl, sh, sl)
local was_h, was_l = num(old.line)
local line_h, line_l = num(a.line)
a.ah, a.al = add(a.ah, a.al, line_h, line_l)
a.ah, a.al = sub(a.ah, a.al, was_h, was_l)

local grants, removed, reclassed, repaid = {}, {}, {}, {}
for no, adjustment, new, effective, expires, features in string.gmatch(ARGV[3], '(%d+):(-?%d+):([01]):(%d+):(%d+):([^;]*);') do
  no = tonumber(no)
  local h, l = num(adjustment)
  if new == '1' and (a.to == 0 or tonumber(effective) < a.to) then a.ah, a.al = add(a.ah, a.al, h, l) end
  local g = live[no]
  if g then h, l = add(h, l, g.h, g.l) end
  live[no] = nil
  if h < 0 then -- More was taken back than is left: the rest is overage.
    local dh, dl = sub(0, 0, h, l)
    a.oh, a.ol = add(a.oh, a.ol, dh, dl)
    reclassed[#reclassed + 1] = struct.pack('<ddd', no, dh, dl)
    h, l = 0, 0
  end
  grants[#grants + 1] = {no = no, h = h, l = l, effective = tonumber(effective), expires = tonumber(expires), features = features}
end
for _, no in ipairs(order) do
  local g = live[no]
  if g then
    removed[#removed + 1] = struct.pack('<ddd', no, g.h, g.l)
    if counts(g, a.to, a.from) then -- Else this cycle's allowance never had it.
      if less(a.ah, a.al, g.h, g.l) then a.ah, a.al = 0, 0 else a.ah, a.al = sub(a.ah, a.al, g.h, g.l) end
    end
  end
end
-- A prepaid debt is repaid by what has been added; in arrears it waits for the invoice, also when arrears end with this
-- change: then the page turns, under the old terms.
local turned = old.recurrence ~= a.recurrence or old.anchor ~= a.anchor
local closing = old.billing == 'A' and (turned or a.billing ~= 'A')
if a.billing ~= 'A' and not closing then
  for _, g in ipairs(grants) do
    if a.oh < 0 or (a.oh == 0 and a.ol == 0) then break end
    if (g.h > 0 or g.l > 0) and g.features == '*' and active(g, now) then
      local take_h, take_l = a.oh, a.ol
      if less(g.h, g.l, take_h, take_l) then take_h, take_l = g.h, g.l end
      g.h, g.l = sub(g.h, g.l, take_h, take_l)
      a.oh, a.ol = sub(a.oh, a.ol, take_h, take_l)
      repaid[#repaid + 1] = struct.pack('<ddd', g.no, take_h, take_l)
    end
  end
end
a.ah, a.al = bounded(a.ah, a.al)
set_gate(a)
a.sequence = a.sequence + 1

local crossings = cross(a)
local function list(items) return struct.pack('<I2', #items) .. table.concat(items) end
local overage_h, overage_l = num(ARGV[5])

-- After this point it must succeed. The record comes first: it alone could fail, and then nothing is written.
journal(KEYS[2], 3, ARGV[8], a, now, crossings,
  struct.pack('<ddddddddd', sh, sl, overage_h, overage_l, a.sh, a.sl, a.ah, a.al, a.from)
    .. list(removed) .. list(reclassed) .. list(repaid))
redis.call('HSET', KEYS[1], 'c', ARGV[2], 'd', write_state(a), 'g', write_grants(grants))
local keep = {}
for feature, limit, soft, recurrence, anchor, adjustment in string.gmatch(ARGV[6], '(%S+) (%d+) ([01]) (%d) (%d+) (-?%d+);') do
  local field, used, from, to = 'q:' .. feature, 0, '0', '0'
  keep[field] = true
  local q = redis.call('HGET', KEYS[1], field)
  local same = q and {string.match(q, '^%S+ %S+ (%S+) (%S+) (%S+) (%S+) (%S+)$')}
  if same and same[1] == recurrence and same[2] == anchor then
    used, from, to = tonumber(same[3]), same[4], same[5]
  else
    local window, resets = period(tonumber(recurrence), tonumber(anchor), now)
    from, to = integer(window), integer(resets)
  end
  redis.call('HSET', KEYS[1], field, table.concat({limit, soft, recurrence, anchor, integer(used + tonumber(adjustment)), from, to}, ' '))
end
for subject, limit, recurrence, anchor, adjustment in string.gmatch(ARGV[10], '(%S+) (%d+) (%d) (%d+) (-?%d+);') do
  local field = 's:' .. subject
  keep[field] = true
  local was = redis.call('HGET', KEYS[1], field)
  local s = was and read_subject(was, now)
  if not s or s.recurrence ~= recurrence or s.anchor ~= anchor then
    s = {recurrence = recurrence, anchor = anchor, uh = 0, ul = 0}
    s.from, s.to = period(tonumber(recurrence), tonumber(anchor), now)
  end
  s.h, s.l = num(limit)
  local by_h, by_l = num(adjustment)
  s.uh, s.ul = add(s.uh, s.ul, by_h, by_l)
  redis.call('HSET', KEYS[1], field, write_subject(s))
end
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  local kind = string.sub(field, 1, 2)
  if (kind == 'q:' or kind == 's:') and not keep[field] then redis.call('HDEL', KEYS[1], field) end
end
local prefix = meant and 'u:' or 'U:' .. integer(cycle) .. ':'
for meter, units in string.gmatch(ARGV[7], "(%S+) (-?%d+) ?") do redis.call('HINCRBY', KEYS[1], prefix .. meter, units) end
if turned or closing then
  local billing = a.billing
  if closing then a.billing = 'A' end
  roll(KEYS[1], KEYS[2], ARGV[8], a, grants, now)
  a.billing = billing
end
return '=' .. integer(a.sequence)
