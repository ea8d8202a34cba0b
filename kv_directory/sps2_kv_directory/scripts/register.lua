-- ARGV: 5 worker id, 6 incarnation, 7 static, 8 vital, 9 load. A registration always wins the lease:
-- an older process learns from its next renewal that it lost it.
local worker_id = ARGV[5]
local time = lease_clock()
local old = read_worker(worker_id)
redis.call('ZADD', WORKER_LEASES, time + tonumber(ARGV[3]), worker_id)
if not old or old[1] ~= ARGV[6] or old[2] ~= ARGV[7] or old[3] ~= ARGV[8] or old[4] ~= ARGV[9] then
  publish_worker(worker_id, {ARGV[6], ARGV[7], ARGV[8], ARGV[9], time})
end
return OK
