-- Twin of entitlement/rating.py: what quantities cost, exact in int64 pairs.
-- Bounds: quantity < 2^53, price <= 10^12, per <= 10^9, flat <= 10^15.

-- floor(quantity * price / per) as a pair, and what is left over of per; nil when it leaves int64.
local function share(quantity, price, per)
  local whole = math.floor(quantity / per)
  local rest = quantity - whole * per
  local h, l = multiply(whole, price)
  if h == nil then return nil end
  if rest == 0 then return h, l, 0 end
  -- rest * price / per by long division over price in base 10^6: every step stays below 2^53 since rest < per <= 10^9.
  local p0 = price % 1000000
  local p1 = (price - p0) / 1000000
  local t = rest * p1
  local q1 = math.floor(t / per)
  t = (t - q1 * per) * 1000000 + rest * p0
  local q0 = math.floor(t / per)
  local qh, ql = pair(q1 * 1000000)
  h, l = add(h, l, qh, ql)
  qh, ql = pair(q0)
  h, l = add(h, l, qh, ql)
  return h, l, t - q0 * per
end

-- The pair plus left / per, half to even; nil when it leaves int64.
local function rounded(h, l, left, per)
  if left * 2 > per or (left * 2 == per and l % 2 == 1) then h, l = add(h, l, 0, 1) end
  if over(h, l) then return nil end
  return h, l
end

-- cost(quantity) of PER_UNIT.
local function cost(quantity, price, per)
  local h, l, left = share(quantity, price, per)
  if h == nil then return nil end
  return rounded(h, l, left, per)
end

-- cost(quantity) of GRADUATED ('G') and VOLUME ('V'): '<letter> <per>', then ' <up_to>,<price>,<flat>' for each tier.
local function tiered(rate, quantity)
  local graduated = string.byte(rate) == 71
  local per = tonumber(string.match(rate, '^. (%d+)'))
  local h, l, left, start = 0, 0, 0, 0
  for up_to, price, flat in string.gmatch(rate, ' (%d+),(%d+),(%d+)') do
    if quantity <= start then break end
    up_to = tonumber(up_to)
    local last = up_to == 0 or quantity <= up_to
    if graduated or last then
      local units = graduated and (last and quantity or up_to) - start or quantity
      local ph, pl, rest = share(units, tonumber(price), per)
      if ph == nil then return nil end
      h, l = add(h, l, ph, pl)
      left = left + rest
      ph, pl = pair(tonumber(flat))
      h, l = add(h, l, ph, pl)
    end
    if last then break end
    start = up_to
  end
  local carry = math.floor(left / per)
  h, l = add(h, l, 0, carry)
  return rounded(h, l, left - carry * per, per)
end

-- cost(quantity) of any compiled rate.
local function cost_of(rate, quantity)
  local letter, price, per = string.match(rate, '^([UP]) (%d+) (%d+)$')
  if letter == nil then return tiered(rate, quantity) end
  price, per = tonumber(price), tonumber(per)
  if letter == 'U' then return cost(quantity, price, per) end
  local packages = math.floor(quantity / per)
  if quantity > packages * per then packages = packages + 1 end
  return multiply(packages, price)
end

-- Answers the amount of the next units by a compiled rate as a pair, or nil when the total or its cost leaves its bound.
local function amount(rate, before, quantity)
  if before + quantity > 9007199254740991 then return nil end
  local price, per = string.match(rate, '^U (%d+) (%d+)$')
  if price and per == '1' and (before + quantity) * price < 9007199254740992 then return pair(quantity * price) end
  local fixed = string.match(rate, '^F (%-?%d+)$') -- What has been answered already, and is told once more.
  if fixed then return num(fixed) end
  local ah, al = cost_of(rate, before + quantity)
  if ah == nil then return nil end
  local bh, bl = cost_of(rate, before)
  if bh == nil then return nil end
  return sub(ah, al, bh, bl)
end

-- The most units, at most `quantity`, whose amount does not pass the pair (h, l). Cost falls only where a VOLUME tier
-- ends: each stretch in which it rises is searched by itself, the highest first.
local function affordable(rate, before, quantity, h, l)
  local function fits(units)
    local mh, ml = amount(rate, before, units)
    return mh ~= nil and not less(h, l, mh, ml)
  end
  local starts = {0}
  if string.byte(rate) == 86 then
    for up_to in string.gmatch(rate, ' (%d+),%d+,%d+') do
      up_to = tonumber(up_to)
      if up_to > 0 and up_to >= before and up_to < before + quantity then starts[#starts + 1] = up_to + 1 - before end
    end
  end
  for i = #starts, 1, -1 do
    local low, high = starts[i], quantity
    if fits(low) then
      while low < high do
        local middle = low + math.ceil((high - low) / 2)
        if fits(middle) then low = middle else high = middle - 1 end
      end
      return low
    end
    quantity = starts[i] - 1
  end
  return 0
end
