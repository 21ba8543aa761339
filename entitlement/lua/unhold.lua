-- Between decide.lua and commit.lua of settle.lua: what the hold lets go.
if not denied then
  local final = ARGV[REST + 2] == '1' or late
  local taken_h, taken_l, back_h, back_l = 0, 0, 0, 0
  if held and held.state == 'H' then
    if held.epoch > a.epoch then return '!NOT_LOADED' end
    if held.epoch < a.epoch then
      if not replay then return '!HOLD 12' end
      held = nil -- Of an account that has been built anew since: the ledger ended it.
    end
  elseif held and not late then
    held = nil -- It has ended; what is replayed is charged without it.
  end
  if held and not late then
    if total_h >= 0 then taken_h, taken_l = total_h, total_l end
    if less(held.h, held.l, taken_h, taken_l) then taken_h, taken_l = held.h, held.l end
    held.h, held.l = sub(held.h, held.l, taken_h, taken_l)
    if final then back_h, back_l, held.h, held.l = held.h, held.l, 0, 0 end
    for i = 1, n do
      let_go(held, ARGV[ARGS + 4 * i - 3], tonumber(ARGV[QUANTITIES + i]), quotas, KEYS[1], now)
    end
    if final then
      for _, line in ipairs(held.lines) do let_go(held, line.feature, nil, quotas, KEYS[1], now) end
    end
    local gone_h, gone_l = add(taken_h, taken_l, back_h, back_l)
    a.hh, a.hl = sub(a.hh, a.hl, gone_h, gone_l)
    if own_h and held.window == own.from + 1 then own_h, own_l = add(own_h, own_l, gone_h, gone_l) end
  end
  extra = struct.pack('<Bddddss', (final and 1 or 0) + (late and 2 or 0), taken_h, taken_l, back_h, back_l, ARGV[REST + 1], subject or '')
  local left_h, left_l = held and held.h or 0, held and held.l or 0
  suffix = struct.pack('<Bdd', late and 1 or 0, left_h, left_l)
  local number = held and math.max(held.number, tonumber(ARGV[REST + 6])) or 0
  finish = held and function()
    redis.call('HSET', KEYS[4], 'm', integer(number))
    if final then
      redis.call('HSET', KEYS[4], 'd', string.sub(KEYS[2], -16))
      end_hold(KEYS[4], KEYS[5], ARGV[5] .. ' ' .. ARGV[REST + 1], 'S', ARGV[6])
    else
      redis.call('HSET', KEYS[4], 'n', text(held.h, held.l), 'l', write_lines(held.lines))
    end
  end
end
