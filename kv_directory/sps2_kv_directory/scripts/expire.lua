-- ARGV: 5 most leases of each kind to end. Returns how many of each kind ended.
local time, hold_until = lease_clock()
if time < hold_until then return {0, 0} end
local workers = redis.call('ZRANGEBYSCORE', WORKER_LEASES, '-inf', time, 'LIMIT', 0, ARGV[5])
for _, worker_id in ipairs(workers) do remove_worker(worker_id) end
local requests = redis.call('ZRANGEBYSCORE', REQUEST_LEASES, '-inf', time, 'LIMIT', 0, ARGV[5])
for _, request_id in ipairs(requests) do forget_request(request_id) end
return {#workers, #requests}
