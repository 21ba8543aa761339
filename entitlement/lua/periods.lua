-- Twin of entitlement/periods.py: the period [start, end) in milliseconds that holds `at`; end 0 = it never ends.
-- recurrence: 1 never, 2 hour, 3 day, 4 week, 5 month, 6 year. Asked only when a period is over: its parts stand inside, so
-- that a call that does not ask does not pay for them.
local function period(recurrence, anchor, at)
  if recurrence == 1 then return anchor, 0 end
  local length = recurrence == 2 and 3600000 or recurrence == 3 and 86400000 or recurrence == 4 and 604800000
  if length then
    local start = anchor + math.floor((at - anchor) / length) * length
    return start, start + length
  end

  local function days_from_civil(y, m, d)
    if m <= 2 then y = y - 1 end
    local era = math.floor(y / 400)
    local yoe = y - era * 400
    local doy = math.floor((153 * (m + (m > 2 and -3 or 9)) + 2) / 5) + d - 1
    return era * 146097 + yoe * 365 + math.floor(yoe / 4) - math.floor(yoe / 100) + doy - 719468
  end

  local function civil_from_days(z)
    z = z + 719468
    local era = math.floor(z / 146097)
    local doe = z - era * 146097
    local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
    local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
    local mp = math.floor((5 * doy + 2) / 153)
    local m = mp + (mp < 10 and 3 or -9)
    return yoe + era * 400 + (m <= 2 and 1 or 0), m, doy - math.floor((153 * mp + 2) / 5) + 1
  end

  local function days_in_month(y, m)
    if m == 2 then return (y % 4 == 0 and (y % 100 ~= 0 or y % 400 == 0)) and 29 or 28 end
    return (m == 4 or m == 6 or m == 9 or m == 11) and 30 or 31
  end

  local function boundary(index, day, clock)
    local y = math.floor(index / 12)
    local m = index - y * 12 + 1
    return days_from_civil(y, m, math.min(day, days_in_month(y, m))) * 86400000 + clock
  end

  local step = recurrence == 6 and 12 or 1
  local days = math.floor(anchor / 86400000)
  local y, m, day = civil_from_days(days)
  local ay, am = civil_from_days(math.floor(at / 86400000))
  local index, clock = y * 12 + m - 1, anchor - days * 86400000
  local count = math.floor((ay * 12 + am - 1 - index) / step)
  if boundary(index + count * step, day, clock) > at then count = count - 1 end
  local start = boundary(index + count * step, day, clock)
  local finish = boundary(index + (count + 1) * step, day, clock)
  if at < finish then return start, finish end
  return finish, boundary(index + (count + 2) * step, day, clock)
end
