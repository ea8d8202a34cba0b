-- ARGV: 5 request id, 6 attempt, 7 newest epoch among the shards, 8 lease in µs, 9 record.
local request_id, attempt, epoch = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local time = lease_clock()
local old = read_request(request_id)
if old and (old[1] > attempt or (old[1] == attempt and old[2] > epoch)) then return STALE end
redis.call('HSET', REQUESTS, request_id, cmsgpack.pack({attempt, epoch, ARGV[9]}))
redis.call('ZADD', REQUEST_LEASES, time + tonumber(ARGV[8]), request_id)
return OK
