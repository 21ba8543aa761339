-- Exact int64 arithmetic on pairs (h, l): value = h * 10^9 + l with 0 <= l < 10^9, because a Lua number is a double and
-- exact below 2^53 only. No tables: a pair is two values, so that nothing is allocated on the hot path.
local B = 1000000000

-- Pair of a plain decimal text. The caller guarantees the text: ids and numbers are checked before they reach a script.
local function num(s)
  local neg = string.byte(s, 1) == 45
  if neg then s = string.sub(s, 2) end
  local n, h, l = #s, 0, 0
  if n <= 9 then l = tonumber(s) else h, l = tonumber(string.sub(s, 1, n - 9)), tonumber(string.sub(s, n - 8)) end
  if not neg then return h, l end
  if l == 0 then return -h, 0 end
  return -h - 1, B - l
end

local function text(h, l)
  if h == 0 then return string.format('%d', l) end
  if h > 0 then return string.format('%d%09d', h, l) end
  if l > 0 then h, l = h + 1, B - l end
  if h == 0 then return string.format('-%d', l) end
  return string.format('-%d%09d', -h, l)
end

local function add(ah, al, bh, bl)
  local h, l = ah + bh, al + bl
  if l >= B then return h + 1, l - B end
  return h, l
end

local function sub(ah, al, bh, bl)
  local h, l = ah - bh, al - bl
  if l < 0 then return h - 1, l + B end
  return h, l
end

local function less(ah, al, bh, bl) return ah < bh or (ah == bh and al < bl) end

-- Beyond int64's positive bound, 9223372036854775807?
local function over(h, l) return h > 9223372036 or (h == 9223372036 and l > 854775807) end

-- The pair, or int64's positive bound where it lies beyond.
local function bounded(h, l)
  if over(h, l) then return 9223372036, 854775807 end
  return h, l
end

-- Pair of an exact non-negative double below 2^53.
local function pair(x)
  local h = math.floor(x / B)
  return h, x - h * B
end

-- floor(value * m / d) for a non-negative pair and small m, d (m <= 100000, d <= 1000).
local function scale(h, l, m, d)
  local q = math.floor(h * m / d)
  local rest = math.floor(((h * m - q * d) * B + l * m) / d)
  local ch, cl = pair(rest)
  return q + ch, cl
end

-- a * p for a < 2^53, p <= 10^12, both exact; nil when the product leaves int64.
local function multiply(a, p)
  local x = a * p
  if x < 9007199254740992 then return pair(x) end
  local a0, p0 = a % 1000000, p % 1000000
  local rest, p1 = (a - a0) / 1000000, (p - p0) / 1000000
  local a1 = rest % 1000000
  local a2 = (rest - a1) / 1000000
  local c0 = a0 * p0
  local c1 = a0 * p1 + a1 * p0 + math.floor(c0 / 1000000)
  local c2 = a1 * p1 + a2 * p0 + math.floor(c1 / 1000000)
  local c3 = a2 * p1 + math.floor(c2 / 1000000)
  if c3 >= 10 then return nil end
  c0, c1, c2 = c0 % 1000000, c1 % 1000000, c2 % 1000000
  local thousands = math.floor(c1 / 1000)
  local h, l = thousands + c2 * 1000 + c3 * B, c0 + (c1 - thousands * 1000) * 1000000
  if over(h, l) then return nil end
  return h, l
end
