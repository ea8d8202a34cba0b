-- ARGV: 5 worker id, 6 incarnation, 7 epoch, 8 layout, 9.. keys.
local worker_id, layout = ARGV[5], ARGV[8]
local worker = read_worker(worker_id)
local status = check_holder(worker, ARGV[6], tonumber(ARGV[7]))
if status ~= OK then return status end
local token, ours = worker[TOKEN], worker_id .. '\0'
for i = 9, #ARGV do
  local key = ARGV[i]
  local holders, held_otherwise = read_prefix(key), false
  holders[ours .. layout] = nil
  write_prefix(key, holders)
  for holder, told in pairs(holders) do
    held_otherwise = held_otherwise or (told == token and string.sub(holder, 1, #ours) == ours)
  end
  if not held_otherwise then
    redis.call('ZREM', PREFIX_INDEX, prefix_member(worker_id, token, key))
  end
end
return OK
