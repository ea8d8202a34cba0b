-- ARGV: from 5 on, for each worker: id, incarnation, vital, load, epoch. Returns a status for each.
local time = lease_clock()
local expires_at = time + tonumber(ARGV[3])

local function renew(worker_id, incarnation, vital, load, epoch)
  local worker = read_worker(worker_id)
  if not worker then return NOT_FOUND end
  if worker[INCARNATION] ~= incarnation then return STALE end
  redis.call('ZADD', WORKER_LEASES, expires_at, worker_id)
  if worker[EPOCH] ~= epoch then -- its vital part differs too
    void_prefixes(worker_id, worker[TOKEN])
    note_epoch(worker[GROUP], epoch)
    worker[EPOCH], worker[TOKEN] = epoch, next_token()
  end
  -- A load that is not due yet is dropped, not kept: the next renewal brings a newer one.
  local load_due = worker[LOAD] ~= load and time - worker[PUBLISHED_US] >= LOAD_INTERVAL_US
  if worker[VITAL] ~= vital or load_due then
    worker[VITAL], worker[LOAD], worker[PUBLISHED_US] = vital, load, time
    publish_worker(worker_id, worker)
  end
  return OK
end

local statuses = {}
for i = 5, #ARGV, 5 do
  statuses[#statuses + 1] = renew(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4]))
end
return statuses
