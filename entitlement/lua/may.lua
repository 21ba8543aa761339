-- Which of some commands the caller may not run. Runs none of them.
--
-- ARGV  commands, words divided by spaces
-- Returns those that are denied; one that the server does not know is not.
local denied = {}
for _, line in ipairs(ARGV) do
  local words = {}
  for word in string.gmatch(line, '%S+') do words[#words + 1] = word end
  local known, may = pcall(redis.acl_check_cmd, unpack(words))
  if known and not may then denied[#denied + 1] = line end
end
return denied
