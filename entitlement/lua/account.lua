-- The hot account, as entitlement/account.py lays it out, and the two things that happen to it without a request: a
-- period ends (roll) and thresholds are crossed or recovered. Moving parts are packed (struct): text costs ten times more.
local STATE, GRANT, HEADER = '<dddddddddddddddddds', '<ddddds', '<BBddddss'

local function integer(x) return string.format('%d', x) end

-- c: 'status billing plan credit_type entitled recurrence anchor credit_line gate_percent thresholds'
local function read_config(c)
  local a = {}
  a.status, a.billing, a.plan, a.credit, a.entitled, a.rest = string.match(c, '^(%S) (%S) (%S+) (%S+) (%S+) (.*)$')
  return a
end

-- The rate card that prices what happened at `at`, of 'now|until:before|...' with the untils ascending.
local function plan_at(plans, at)
  for ends, plan in string.gmatch(plans, '|(%d+):([^|]+)') do
    if at < tonumber(ends) then return plan end
  end
  return string.match(plans, '^[^|]+')
end

-- What only a roll, a crossing or a ledger change asks for.
local function read_terms(a)
  if not a.recurrence then
    a.recurrence, a.anchor, a.line, a.percent, a.thresholds = string.match(a.rest, '^(%S+) (%S+) (%S+) (%S+) (%S+)$')
  end
  return a
end

-- d: epoch sequence version period_start period_end, then pairs: settled held overage allowance gate next_crossing; then
-- crossings and, zero-terminated, crossed ('80,90' or '-'). next_crossing: what settled must reach to cross a threshold.
local function read_state(a, d)
  a.epoch, a.sequence, a.version, a.from, a.to, a.sh, a.sl, a.hh, a.hl, a.oh, a.ol, a.ah, a.al, a.gh, a.gl, a.nh, a.nl,
    a.crossings, a.crossed = struct.unpack(STATE, d)
end

local function write_state(a)
  return struct.pack(STATE, a.epoch, a.sequence, a.version, a.from, a.to, a.sh, a.sl, a.hh, a.hl, a.oh, a.ol, a.ah, a.al,
    a.gh, a.gl, a.nh, a.nl, a.crossings, a.crossed)
end

-- g: for each grant with something left, in burn order: no remaining(pair) effective expires, and zero-terminated features
-- ('*' or ',a,b,'); expires 0 = never.
local function read_grants(blob)
  local grants, n, at, size = {}, 0, 1, #blob
  while at <= size do
    local g = {}
    g.no, g.h, g.l, g.effective, g.expires, g.features, at = struct.unpack(GRANT, blob, at)
    n = n + 1
    grants[n] = g
  end
  return grants
end

-- A used-up grant leaves the blob; what restores it brings its attributes along.
local function write_grants(grants)
  local out = {}
  for _, g in ipairs(grants) do
    if g.h > 0 or g.l > 0 then out[#out + 1] = struct.pack(GRANT, g.no, g.h, g.l, g.effective, g.expires, g.features) end
  end
  return #out == 1 and out[1] or table.concat(out)
end

local function active(grant, at) return grant.effective <= at and (grant.expires == 0 or at < grant.expires) end

-- Whether a grant counts towards the allowance of the cycle [from, to) that is turned or changed at `now`.
local function counts(grant, to, now)
  return (to == 0 or grant.effective < to) and (grant.expires == 0 or now < grant.expires)
end

local function covers(grant, feature)
  return grant.features == '*' or string.find(grant.features, ',' .. feature .. ',', 1, true) ~= nil
end

local function available(a, grants, at)
  local h, l = sub(0, 0, a.oh, a.ol)
  h, l = sub(h, l, a.hh, a.hl)
  for _, g in ipairs(grants) do
    if active(g, at) then h, l = add(h, l, g.h, g.l) end
  end
  return h, l
end

-- gate = credit line + floor(percent * allowance / 100) - allowance: usage is denied beyond percent of the allowance.
local function set_gate(a)
  read_terms(a)
  local h, l = 0, 0
  if a.ah >= 0 then h, l = scale(a.ah, a.al, tonumber(a.percent), 100) end
  h, l = sub(h, l, a.ah, a.al)
  local ch, cl = num(a.line)
  h, l = add(h, l, ch, cl)
  a.gh, a.gl = bounded(h, l)
end

-- Compares what the period has used with each threshold. Returns 'percent+n,...' for those newly crossed and
-- 'percent-n,...' for those that fell below again ('-' for none); n counts the cycle's crossings up. Sets next_crossing to
-- the lowest threshold that is still ahead: ceil(percent * allowance / 100).
local function cross(a)
  read_terms(a)
  local now, events, crossable = {}, {}, a.ah >= 0 and (a.ah > 0 or a.al > 0)
  a.nh, a.nl = 9223372037, 0
  for percent in string.gmatch(a.thresholds, '%d+') do
    local was = string.find(',' .. a.crossed .. ',', ',' .. percent .. ',', 1, true) ~= nil
    local is = false
    if crossable then
      local p = tonumber(percent)
      local h, l = scale(a.ah, a.al, p, 100)
      local rest = (a.ah * p - h * 100) * B + (a.al * p - l * 100)
      if rest > 0 then h, l = add(h, l, 0, 1) end
      is = not less(a.sh, a.sl, h, l)
      if not is and less(h, l, a.nh, a.nl) then a.nh, a.nl = h, l end
    end
    if is then now[#now + 1] = percent end
    if is and not was then
      a.crossings = a.crossings + 1
      events[#events + 1] = percent .. '+' .. integer(a.crossings)
    elseif was and not is then
      events[#events + 1] = percent .. '-' .. integer(a.crossings)
    end
  end
  a.crossed = #now > 0 and table.concat(now, ',') or '-'
  return #events > 0 and table.concat(events, ',') or '-'
end

-- s:<subject>: 'limit recurrence anchor used window_start window_end', amounts in nanos. A window that is over starts anew.
local function read_subject(text, now)
  local s, limit, used = {}
  limit, s.recurrence, s.anchor, used, s.from, s.to = string.match(text, '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+)$')
  s.h, s.l = num(limit)
  s.uh, s.ul = num(used)
  s.from, s.to = tonumber(s.from), tonumber(s.to)
  if s.recurrence ~= '1' and now >= s.to then
    s.from, s.to = period(tonumber(s.recurrence), tonumber(s.anchor), now)
    s.uh, s.ul = 0, 0
  end
  return s
end

local function write_subject(s)
  return table.concat({text(s.h, s.l), s.recurrence, s.anchor, text(s.uh, s.ul), integer(s.from), integer(s.to)}, ' ')
end

-- q:<feature>: 'limit soft recurrence anchor used window_start window_end', in units. A window that is over starts anew.
local function read_quota(text, now)
  local quota = {}
  quota.limit, quota.soft, quota.recurrence, quota.anchor, quota.used, quota.from, quota.to =
    string.match(text, '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+)$')
  quota.limit, quota.used = tonumber(quota.limit), tonumber(quota.used)
  quota.from, quota.to = tonumber(quota.from), tonumber(quota.to)
  if quota.recurrence ~= '1' and now >= quota.to then
    quota.from, quota.to = period(tonumber(quota.recurrence), tonumber(quota.anchor), now)
    quota.used = 0
  end
  return quota
end

local function write_quota(q)
  return table.concat({integer(q.limit), q.soft, q.recurrence, q.anchor, integer(q.used), integer(q.from), integer(q.to)}, ' ')
end

-- Appends fields and values of what was counted on quotas and on the subject's own limit, of which own_h, own_l is left.
local function write_limits(writes, quotas, subject, own, own_h, own_l)
  for feature, q in pairs(quotas) do
    writes[#writes + 1] = 'q:' .. feature
    writes[#writes + 1] = write_quota(q)
  end
  if own_h then
    own.uh, own.ul = sub(own.h, own.l, own_h, own_l)
    writes[#writes + 1] = 's:' .. subject
    writes[#writes + 1] = write_subject(own)
  end
end

-- Takes an amount from the grants in their order. Returns the burns as journaled, how many they are, and what the grants
-- did not cover.
local function burn(grants, feature, at, need_h, need_l)
  local parts, count = '', 0
  for _, g in ipairs(grants) do
    if need_h < 0 or (need_h == 0 and need_l == 0) then break end
    if (g.h > 0 or g.l > 0) and active(g, at) and covers(g, feature) then
      local take_h, take_l = need_h, need_l
      if less(g.h, g.l, need_h, need_l) then take_h, take_l = g.h, g.l end
      g.h, g.l = sub(g.h, g.l, take_h, take_l)
      need_h, need_l = sub(need_h, need_l, take_h, take_l)
      parts, count = parts .. struct.pack('<ddd', g.no, take_h, take_l), count + 1
    end
  end
  return parts, count, need_h, need_l
end

-- One record a change, in the account's gap-free sequence. Layout: see entitlement/journal.py.
local function journal(key, kind, who, a, now, crossings, body)
  redis.call('XADD', key, '*', 'r',
    struct.pack(HEADER, 1, kind, a.epoch, a.sequence, a.version, now, who, crossings) .. body)
end

-- The period is over: counters move to the archive, the cycle starts anew. ARREARS overage goes to the invoice; a
-- prepaid debt stays. Journaled as its own record, so that the ledger turns the page at the same sequence.
local function roll(key, stream, who, a, grants, now)
  read_terms(a)
  local ended, ch, cl = integer(a.from), 0, 0
  a.from, a.to = period(tonumber(a.recurrence), tonumber(a.anchor), now)
  if a.billing == 'A' then ch, cl = a.oh, a.ol; a.oh, a.ol = 0, 0 end
  a.sh, a.sl, a.crossed, a.crossings = 0, 0, '-', 0
  a.ah, a.al = num(a.line)
  for _, g in ipairs(grants) do
    if counts(g, a.to, now) then a.ah, a.al = add(a.ah, a.al, g.h, g.l) end
  end
  if less(a.ah, a.al, a.oh, a.ol) then a.ah, a.al = 0, 0 else a.ah, a.al = sub(a.ah, a.al, a.oh, a.ol) end
  a.ah, a.al = bounded(a.ah, a.al)
  set_gate(a)
  cross(a)
  a.sequence = a.sequence + 1
  local fields = redis.call('HGETALL', key)
  journal(stream, 2, who, a, now, '-', struct.pack('<dddddd', a.from, a.to, ch, cl, a.ah, a.al))
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'u:' then
      redis.call('HSET', key, 'U:' .. ended .. ':' .. string.sub(fields[i], 3), fields[i + 1])
      redis.call('HDEL', key, fields[i])
    end
  end
  redis.call('HSET', key, 'd', write_state(a))
end
