-- A hold: units set aside, their most in nanos counted in the account's `held` until they are settled, released or expired.
--
-- h:<digest> (hash)  f fingerprint of the reserve's request   a its answer   s state: H held, S settled, R released, E expired
--       e epoch of the account that it is held in: of another epoch it is not there any more   c created, x expires (ms)
--       n nanos left   u subject ('' none)   w start of the window that counted it on the subject's own limit, or 0
--       l for each line: zero-terminated feature, units left and the start of the window that counted them on its quota, or 0
--       d digest of the key that settled it   k:<key> fingerprint and answer of an extension   m number of the last report
-- x:<partition> (sorted set)  'tenant customer hold' by when it expires
-- A hold that has ended is remembered as long as a key.
local function read_hold(key)
  local f = redis.call('HMGET', key, 's', 'e', 'c', 'x', 'n', 'u', 'w', 'l', 'd', 'm')
  if not f[1] then return nil end
  local hold = {state = f[1], epoch = tonumber(f[2]), created = tonumber(f[3]), expires = tonumber(f[4]), text = f[8],
    subject = f[6] ~= '' and f[6] or nil, window = tonumber(f[7]), settled_by = f[9],
    number = tonumber(f[10] or 0), lines = {}}
  hold.h, hold.l = num(f[5])
  local at = 1
  while at <= #f[8] do
    local line = {}
    line.feature, line.units, line.from, at = struct.unpack('<sdd', f[8], at)
    hold.lines[#hold.lines + 1] = line
  end
  return hold
end

-- What is said where there is no hold: it may come with its account.
local function no_hold(account)
  local c = redis.call('HGET', account, 'c')
  return c == 'frozen' and '!HOLD 15' or c and '!HOLD 12' or '!NOT_LOADED'
end

local function add_line(lines, feature, units, from)
  for _, line in ipairs(lines) do
    if line.feature == feature and line.from == from then line.units = line.units + units; return end
  end
  lines[#lines + 1] = {feature = feature, units = units, from = from}
end

local function write_lines(lines)
  local out = {}
  for i, line in ipairs(lines) do out[i] = struct.pack('<sdd', line.feature, line.units, line.from) end
  return table.concat(out)
end

-- Lets go of `units` of a feature (nil: of all there are), and takes what its quota had counted for them from that quota,
-- if the window that counted it is still open. `quotas`: those read already, by feature; others are read and put there.
local function let_go(hold, feature, units, quotas, account, now)
  for _, line in ipairs(hold.lines) do
    if line.feature == feature and line.units > 0 then
      local some = units and math.min(units, line.units) or line.units
      line.units = line.units - some
      if units then units = units - some end
      if line.from ~= 0 then
        if quotas[feature] == nil then
          local q = redis.call('HGET', account, 'q:' .. feature)
          quotas[feature] = q and read_quota(q, now) or nil
        end
        local q = quotas[feature]
        if q and line.from == q.from + 1 then q.used = q.used - some end
      end
    end
  end
end

-- What is told of a hold beside the answer: when it expires, the last report's number, what is left of it.
local function standing(expires, number, h, l) return struct.pack('<dddd', expires, number, h, l) end

local function end_hold(key, index, member, state, memory)
  redis.call('HSET', key, 's', state, 'n', '0')
  redis.call('PEXPIRE', key, memory)
  redis.call('ZREM', index, member)
end
