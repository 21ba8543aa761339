-- A hold: units set aside, their most in nanos counted in the account's `held` until they are settled, released or expired.
--
-- h:<digest> (hash)  f fingerprint of the reserve's request   a its answer   s state: H held, S settled, R released, E expired
--       e epoch of the account that it is held in: of another epoch it is not there any more   c created, x expires (ms)
--       n nanos left   u subject ('' none)   w start + 1 of the window that counted it on the subject's own limit, or 0, and
--       o how many nanos that has counted of it
--       l for each line: zero-terminated feature, units left and the start of the window that counted them on its quota, or 0
--       k:<key> fingerprint and answer of an extension   m number of the last report   v stream that has it
-- x:<partition> (sorted set)  'tenant customer hold' by when it expires
-- A hold that has ended is remembered as long as a key.
local function read_hold(key)
  local f = redis.call('HMGET', key, 's', 'e', 'c', 'x', 'n', 'u', 'w', 'l', 'm', 'o')
  if not f[1] then return nil end
  local hold = {state = f[1], epoch = tonumber(f[2]), created = tonumber(f[3]), expires = tonumber(f[4]),
    subject = f[6] ~= '' and f[6] or nil, window = tonumber(f[7]), number = tonumber(f[9] or 0), lines = {}}
  hold.oh, hold.ol = num(f[10] or '0')
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
        if q and line.from == q.from + 1 and q.used > 0 then q.used = math.max(0, q.used - some) end
      end
    end
  end
end

-- Gives back to the subject's own limit, of which own_h, own_l is left (nil: this call does not count on it), what its
-- window has counted of nanos that are let go. Returns what is left of it then.
local function give_back(hold, own, own_h, own_l, h, l)
  if not own or hold.window ~= own.from + 1 then return own_h, own_l end
  if not own_h then own_h, own_l = sub(own.h, own.l, own.uh, own.ul) end
  if less(hold.oh, hold.ol, h, l) then h, l = hold.oh, hold.ol end
  hold.oh, hold.ol = sub(hold.oh, hold.ol, h, l)
  own_h, own_l = add(own_h, own_l, h, l)
  if less(own.h, own.l, own_h, own_l) then return own.h, own.l end
  return own_h, own_l
end

-- What is told of a hold beside the answer: when it expires, the last report's number, what is left of it.
local function standing(expires, number, h, l) return struct.pack('<dddd', expires, number, h, l) end

local function end_hold(key, index, member, state, memory)
  redis.call('HSET', key, 's', state, 'n', '0')
  redis.call('PEXPIRE', key, memory)
  redis.call('ZREM', index, member)
end
