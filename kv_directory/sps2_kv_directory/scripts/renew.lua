-- ARGV: from 5 on, for each worker: id, incarnation, vital, load. Returns a status for each.
local time = lease_clock()
local expires_at = time + tonumber(ARGV[3])
local statuses = {}
for i = 5, #ARGV, 4 do
  local worker_id, incarnation, vital, load = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local worker = read_worker(worker_id)
  local status = OK
  if not worker then
    status = NOT_FOUND
  elseif worker[1] ~= incarnation then
    status = STALE
  else
    redis.call('ZADD', WORKER_LEASES, expires_at, worker_id)
    -- A load that is not due yet is dropped, not kept: the next renewal brings a newer one.
    local load_due = worker[4] ~= load and time - worker[5] >= LOAD_INTERVAL_US
    if worker[3] ~= vital or load_due then
      publish_worker(worker_id, {incarnation, worker[2], vital, load, time})
    end
  end
  statuses[#statuses + 1] = status
end
return statuses
