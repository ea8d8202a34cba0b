-- ARGV: 5 worker id, 6 incarnation, 7 static, 8 vital, 9 load, 10 epoch, 11 group. A registration always wins
-- the lease: an older process learns from its next renewal that it lost it.
local worker_id, incarnation, epoch = ARGV[5], ARGV[6], tonumber(ARGV[10])
local time = lease_clock()
local old = read_worker(worker_id)
redis.call('ZADD', WORKER_LEASES, time + tonumber(ARGV[3]), worker_id)
note_epoch(ARGV[11], epoch)
local token = old and old[TOKEN]
if not old or old[INCARNATION] ~= incarnation or old[EPOCH] ~= epoch then
  if old then void_prefixes(worker_id, token) end
  token = next_token()
end
local worker = {incarnation, ARGV[7], ARGV[8], ARGV[9], time, epoch, token, ARGV[11]}
if not old or old[TOKEN] ~= token or old[STATIC] ~= worker[STATIC] or old[VITAL] ~= worker[VITAL]
    or old[LOAD] ~= worker[LOAD] then
  publish_worker(worker_id, worker)
end
return OK
