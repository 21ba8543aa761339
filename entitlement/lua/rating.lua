-- Twin of entitlement/rating.py: cost(quantity) = quantity * price / per, rounded half to even, exact in int64 pairs.
-- nil when the result leaves int64. Bounds: quantity < 2^53, price <= 10^12, per <= 10^9.
local function cost(quantity, price, per)
  local whole = math.floor(quantity / per)
  local rest = quantity - whole * per
  local h, l = multiply(whole, price)
  if h == nil or rest == 0 then return h, l end
  -- rest * price / per by long division over price in base 10^6: every step stays below 2^53 since rest < per <= 10^9.
  local p0 = price % 1000000
  local p1 = (price - p0) / 1000000
  local t = rest * p1
  local q1 = math.floor(t / per)
  t = (t - q1 * per) * 1000000 + rest * p0
  local q0 = math.floor(t / per)
  local left = t - q0 * per
  local qh, ql = pair(q1 * 1000000)
  h, l = add(h, l, qh, ql)
  qh, ql = pair(q0)
  h, l = add(h, l, qh, ql)
  if left * 2 > per or (left * 2 == per and l % 2 == 1) then h, l = add(h, l, 0, 1) end
  if over(h, l) then return nil end
  return h, l
end

-- Reads a compiled rate ('U <price> <per>') and answers the amount of the next units as a pair, or nil when over int64.
local function amount(rate, before, quantity)
  if before + quantity > 9007199254740991 then return nil end
  local price, per = string.match(rate, '^U (%d+) (%d+)$')
  price, per = tonumber(price), tonumber(per)
  if per == 1 and (before + quantity) * price < 9007199254740992 then return pair(quantity * price) end
  local ah, al = cost(before + quantity, price, per)
  if ah == nil then return nil end
  local bh, bl = cost(before, price, per)
  return sub(ah, al, bh, bl)
end

-- The most units, at most `quantity`, whose amount does not pass the pair (h, l).
local function affordable(rate, before, quantity, h, l)
  if h < 0 then return 0 end
  local low, high = 0, quantity
  while low < high do
    local middle = low + math.ceil((high - low) / 2)
    local mh, ml = amount(rate, before, middle)
    if mh ~= nil and not less(h, l, mh, ml) then low = middle else high = middle - 1 end
  end
  return low
end
