-- ARGV: 5 most of each kind to end, 6 whether the caller could not reach Redis since it last came here: it may
-- have told workers that no lease ends. Returns how many workers and requests ended, prefix keys went with
-- workers, leases or epochs that ended before, and admissions ended.
local most = tonumber(ARGV[5])

local function sweep(worker_id, token)
  local members = prefix_members(worker_id, token, most)
  for _, member in ipairs(members) do
    local key = string.sub(member, #worker_id + #token + 3)
    local holders, ours = read_prefix(key), worker_id .. '\0'
    for holder, told in pairs(holders) do
      if told == token and string.sub(holder, 1, #ours) == ours then holders[holder] = nil end
    end
    write_prefix(key, holders)
    redis.call('ZREM', PREFIX_INDEX, member)
  end
  return #members
end

local time, hold_until = lease_clock()
if ARGV[6] == '1' then
  hold_until = time + tonumber(ARGV[3])
  redis.call('HSET', DIRECTORY, 'hold_until_us', hold_until)
end
local num_workers, num_requests, num_swept, num_admissions = 0, 0, 0, 0
if time >= hold_until then
  redis.call('HDEL', DIRECTORY, 'recovering')
  local workers = redis.call('ZRANGEBYSCORE', WORKER_LEASES, '-inf', time, 'LIMIT', 0, most)
  for _, worker_id in ipairs(workers) do remove_worker(worker_id, read_worker(worker_id)) end
  local requests = redis.call('ZRANGEBYSCORE', REQUEST_LEASES, '-inf', time, 'LIMIT', 0, most)
  for _, request_id in ipairs(requests) do forget_request(request_id) end
  local admissions = redis.call('ZRANGEBYSCORE', ADMISSION_LEASES, '-inf', time, 'LIMIT', 0, most)
  for _, request_id in ipairs(admissions) do forget_admission(request_id) end
  num_workers, num_requests, num_admissions = #workers, #requests, #admissions
end
local over = redis.call('LINDEX', SWEEPS, 0)
if over then
  local cut = string.find(over, '\0', 1, true)
  num_swept = sweep(string.sub(over, 1, cut - 1), string.sub(over, cut + 1))
  if num_swept < most then redis.call('LPOP', SWEEPS) end
end
return {num_workers, num_requests, num_swept, num_admissions}
