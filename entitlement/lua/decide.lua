-- What every decision on usage does, after the head of consume, reserve or settle has looked at its key: the account is read,
-- its period turned if that is over, and each line is priced and held against quotas, limits and credit, on local copies.
-- Nothing of the decision is written here.
--
-- From the head: ARGS, NONE, n, QUANTITIES, subject, check, replay (as it was answered, whatever is in force by now)
local names = {'c', 'd', 'g', 'u:' .. ARGV[ARGS + 2], 'q:' .. ARGV[ARGS + 1]}
for i = 2, n do
  names[2 * i + 2] = 'u:' .. ARGV[ARGS + 4 * i - 2]
  names[2 * i + 3] = 'q:' .. ARGV[ARGS + 4 * i - 3]
end
if subject then names[2 * n + 4] = 's:' .. subject end
local fields = redis.call('HMGET', KEYS[1], unpack(names))
if not fields[1] then return '!NOT_LOADED' end
if fields[1] == 'missing' or fields[1] == 'frozen' then
  local reason = fields[1] == 'missing' and 1 or 15
  return '=\0' .. struct.pack('<BBBBI4I6I4i5I4i5I4B', 3, reason, NONE, 0, 0, 0, 0, 0, 0, 0, 0, 0)
end

local a = read_config(fields[1])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local event = tonumber(ARGV[4])
if event == 0 then event = now
elseif not replay and (event < now - ARGV[7] or event > now + ARGV[8]) then return '!TIME ' .. integer(now) end
local at = math.min(event, now) -- An event a little ahead of this clock is decided as of now.
local until_ = tonumber(ARGV[12])
if string.find(a.plan, '|', 1, true) then a.plan = plan_at(a.plan, at) end
if not replay and (a.plan ~= ARGV[9] or at < tonumber(ARGV[11]) or (until_ > 0 and at >= until_)) then
  return '!STALE ' .. a.plan .. ' ' .. integer(now)
end

read_state(a, fields[2])
local grants = read_grants(fields[3])
if a.to > 0 and now >= a.to then
  roll(KEYS[1], KEYS[3], ARGV[5], a, grants, now)
  for i = 1, n do fields[2 * i + 2] = false end
end

-- Usage of an earlier period counts on that period's meters, which a roll has archived.
local started, prefix = a.from, 'u:'
if at < a.from then
  read_terms(a)
  started = period(tonumber(a.recurrence), tonumber(a.anchor), at)
  prefix = 'U:' .. integer(started) .. ':'
  for i = 1, n do fields[2 * i + 2] = redis.call('HGET', KEYS[1], prefix .. ARGV[ARGS + 4 * i - 2]) end
end

local meters, quotas, limited = {}, {}, false
for i = 1, n do
  local feature, q = ARGV[ARGS + 4 * i - 3], fields[2 * i + 3]
  meters[ARGV[ARGS + 4 * i - 2]] = tonumber(fields[2 * i + 2] or 0)
  if q and not quotas[feature] then
    quotas[feature], limited = read_quota(q, now), true
  end
end

-- What the subject's own limit leaves it, when it has one; usage of an earlier window does not count on this one.
local own = subject and fields[2 * n + 4] and read_subject(fields[2 * n + 4], now)
local own_h, own_l
if own and at >= own.from then own_h, own_l = sub(own.h, own.l, own.uh, own.ul) end

-- One line after the other, on local copies. `reject` gives a reason; ADJUST_ONLY and shadow features go on all the same.
local degraded = ARGV[3] == '5'
local adjust, best = degraded or ARGV[3] == '4', ARGV[3] == '2'
local verdict, shadow, denied, failed, any, capped, back = 1, 0, nil, nil, false, nil, false
local charged, burned = {}, {}
local total_h, total_l, over_h, over_l = 0, 0, a.oh, a.ol

local function reject(reason, line)
  if adjust then return false end
  if ARGV[ARGS + 4 * line] == 's' then shadow = 1; return false end
  denied, failed = reason, line
  return true
end

for i = 1, n do
  local base = ARGS + 4 * i
  local feature, meter, quantity, rate = ARGV[base - 3], ARGV[base - 2], tonumber(ARGV[QUANTITIES + i]), ARGV[base - 1]
  local caps = best and ARGV[base] ~= 's'
  if a.status ~= 'A' then
    if a.status == 'F' then denied, failed = 15, i; break end
    if not adjust then denied, failed = 3, i; break end
  end
  if rate == '!' then denied, failed = 4, i; break end
  if a.entitled ~= '*' and not string.find(a.entitled, ',' .. feature .. ',', 1, true) and reject(5, i) then break end
  if rate == '-' then denied, failed = 11, i; break end
  local quota = quotas[feature]
  local counted = quota and at >= quota.from
  if counted and quota.soft == '0' and quantity > quota.limit - quota.used then
    if caps then quantity, verdict, capped = math.max(0, quota.limit - quota.used), 2, 7
    elseif reject(7, i) then break end
  end

  local usable_h, usable_l = sub(a.gh, a.gl, over_h, over_l)
  usable_h, usable_l = sub(usable_h, usable_l, a.hh, a.hl)
  for _, g in ipairs(grants) do
    if active(g, at) and covers(g, feature) then usable_h, usable_l = add(usable_h, usable_l, g.h, g.l) end
  end
  local reason = a.billing == 'A' and 8 or 6
  if own_h and less(own_h, own_l, usable_h, usable_l) then usable_h, usable_l, reason = own_h, own_l, 16 end
  local before = meters[meter]
  local h, l = amount(rate, before, quantity)
  if h == nil then return '!RANGE ' .. integer(i - 1) end
  if h >= 0 and (h > 0 or l > 0) and less(usable_h, usable_l, h, l) then
    if caps then
      quantity, verdict, capped = affordable(rate, before, quantity, usable_h, usable_l), 2, reason
      h, l = amount(rate, before, quantity)
    elseif reject(reason, i) then break end
  end
  if quantity > 0 then any = true end

  -- Burn the grants in their order; what they do not cover is overage (grant number 0). So is what comes back where a
  -- VOLUME tier has made earlier units cheaper: it lowers the overage, or stands below zero and is credit.
  local parts, count, need_h, need_l = burn(grants, feature, at, h, l)
  if need_h ~= 0 or need_l ~= 0 then
    back = back or need_h < 0
    over_h, over_l = add(over_h, over_l, need_h, need_l)
    parts, count = parts .. struct.pack('<ddd', 0, need_h, need_l), count + 1
  end
  if own_h then own_h, own_l = sub(own_h, own_l, h, l) end
  total_h, total_l = add(total_h, total_l, h, l)
  if over(over_h, over_l) or over(total_h, total_l) then return '!RANGE ' .. integer(i - 1) end
  meters[meter] = before + quantity
  if counted then
    quota.used = quota.used + quantity
    if quota.used > 9007199254740991 then return '!RANGE ' .. integer(i - 1) end
  end
  charged[i] = struct.pack('<I7i5I4', quantity, h, l)
  burned[i] = struct.pack('<dddI2s', quantity, h, l, count, meter) .. parts
end
if capped and not any and not denied then denied, failed = capped, 1 end

local function answer(balance_h, balance_l)
  local full = a.hh ~= 0 or a.hl ~= 0 or a.oh ~= 0 or a.ol ~= 0 or a.gh ~= 0 or a.gl ~= 0
  local flags = shadow + (full and 2 or 0) + (limited and 4 or 0)
  local head = struct.pack('<BBBBI4I6I4i5I4i5I4', denied and 3 or verdict, denied or 0, failed and failed - 1 or NONE, flags, a.epoch,
    a.sequence, tonumber(ARGV[10]), balance_h, balance_l, a.sh, a.sl)
  if full then head = head .. struct.pack('<i5I4i5I4i5I4', a.hh, a.hl, a.oh, a.ol, a.gh, a.gl) end
  local count = denied and 0 or n
  if limited then
    for i = 1, count do
      local q = quotas[ARGV[ARGS + 4 * i - 3]]
      charged[i] = charged[i] .. (q and struct.pack('<BI7I7I6', q.soft, q.used, q.limit, q.to) or struct.pack('<BI7I7I6', NONE, 0, 0, 0))
    end
  end
  return head .. struct.pack('<B', count) .. (count == 1 and charged[1] or table.concat(charged, '', 1, count))
end

