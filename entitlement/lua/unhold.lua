-- Between decide.lua and commit.lua of settle.lua: what the hold lets go.
if not denied then
  local final = ARGV[REST + 2] == '1'
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
    own_h, own_l = give_back(held, own, own_h, own_l, gone_h, gone_l)
  end
  extra = struct.pack('<Bddddss', (final and 1 or 0) + (late and 2 or 0), taken_h, taken_l, back_h, back_l, ARGV[REST + 1], subject or '')
  local left_h, left_l = held and held.h or 0, held and held.l or 0
  suffix = struct.pack('<Bdd', late and 1 or 0, left_h, left_l)
  local number = held and math.max(held.number, tonumber(ARGV[REST + 6])) or 0
  finish = (held or final) and function()
    if not held then -- Replayed: the hold's own receipt, if it comes after this one, finds it ended.
      redis.call('HSET', KEYS[4], 'e', integer(a.epoch), 'c', integer(now), 'x', '0', 'u', subject or '', 'w', '0', 'l', '')
    else
      redis.call('HSET', KEYS[4], 'm', integer(number), 'o', text(held.oh, held.ol))
    end
    if final then
      end_hold(KEYS[4], KEYS[5], ARGV[5] .. ' ' .. ARGV[REST + 1], 'S', ARGV[6])
    elseif late then
      redis.call('PEXPIRE', KEYS[4], ARGV[6]) -- More of it may be told.
    else
      redis.call('HSET', KEYS[4], 'n', text(held.h, held.l), 'l', write_lines(held.lines))
    end
  end
end
