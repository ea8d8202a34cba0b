-- ARGV: 5 worker id, 6 incarnation, 7 epoch, 8 layout, 9.. keys. A key that has MAX_HOLDERS holders gets no
-- further one: a prefix that everybody holds is found anyway.
local MAX_HOLDERS = 64
local worker_id, layout = ARGV[5], ARGV[8]
local worker = read_worker(worker_id)
local status = check_holder(worker, ARGV[6], tonumber(ARGV[7]))
if status ~= OK then return status end
local token, holder = worker[TOKEN], worker_id .. '\0' .. layout
for i = 9, #ARGV do
  local key = ARGV[i]
  local holders, count = read_prefix(key), 0
  for _ in pairs(holders) do count = count + 1 end
  if holders[holder] or count < MAX_HOLDERS then
    holders[holder] = token
    write_prefix(key, holders)
    redis.call('ZADD', PREFIX_INDEX, 0, prefix_member(worker_id, token, key))
  end
end
return OK
