-- Stands at the head of every script. KEYS are all keys of one directory, in the order of keys.py.
-- ARGV: 1 now in µs ('' takes Redis TIME), 2 incarnation to begin with when there is no data,
--       3 lease TTL of workers in µs, 4 longest believable step of the clock in µs; 5.. the script's own.
local DIRECTORY, WORKERS, WORKER_LEASES, CHANGES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local REQUESTS, REQUEST_LEASES, EPOCHS = KEYS[5], KEYS[6], KEYS[7]
local OK, NOT_FOUND, STALE = 1, 2, 3 -- the numbers of LeaseStatus
local MAX_CHANGES = 8192 -- kept for watchers that lag; one that lags more takes a snapshot
local LOAD_INTERVAL_US = 1000000 -- load alone is published at most this often per worker

-- Redis that lost its data has no incarnation. What is left beside a lost incarnation is lost too.
if redis.call('HEXISTS', DIRECTORY, 'incarnation') == 0 then
  redis.call('UNLINK', DIRECTORY, WORKERS, WORKER_LEASES, CHANGES, REQUESTS, REQUEST_LEASES, EPOCHS)
  redis.call('HSET', DIRECTORY, 'incarnation', ARGV[2], 'revision', 0)
end

local function wall_us()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- Lease time, and the time before which nothing expires, both in µs. Lease time follows the wall clock but
-- never goes back, and stands still while nobody looked (an outage) or the wall clock jumped; after that
-- every holder has one TTL to renew. `expire` runs often enough that a long silence means an outage.
local function lease_clock()
  local wall, ttl, max_step = wall_us(), tonumber(ARGV[3]), tonumber(ARGV[4])
  local known = redis.call('HMGET', DIRECTORY, 'offset_us', 'last_us', 'hold_until_us')
  local offset, last, hold_until = tonumber(known[1]), tonumber(known[2]), tonumber(known[3])
  local time
  if not last then
    offset, time, hold_until = 0, wall, wall
  else
    time = wall + offset
    if math.abs(time - last) > max_step then
      offset, time, hold_until = last - wall, last, last + ttl
    elseif time < last then -- a small step back: lease time goes on from where it was
      offset, time = last - wall, last
    end
  end
  redis.call('HSET', DIRECTORY, 'offset_us', offset, 'last_us', time, 'hold_until_us', hold_until)
  return time, hold_until
end

-- Adds one change of the worker state to the log; its stream id is its revision.
local function publish(kind, value)
  local revision = redis.call('HINCRBY', DIRECTORY, 'revision', 1)
  redis.call('XADD', CHANGES, 'MAXLEN', '~', MAX_CHANGES, string.format('%.0f-0', revision), kind, value)
end

-- A worker is kept as {incarnation, static, vital, load, published_us}; the middle three are the serialized
-- parts of its WorkerInfo (codec.py), which make the whole when they stand one after another.
local function read_worker(worker_id)
  local packed = redis.call('HGET', WORKERS, worker_id)
  return packed and cmsgpack.unpack(packed)
end

local function publish_worker(worker_id, worker)
  redis.call('HSET', WORKERS, worker_id, cmsgpack.pack(worker))
  publish('updated', worker[2] .. worker[3] .. worker[4])
end

local function remove_worker(worker_id)
  redis.call('HDEL', WORKERS, worker_id)
  redis.call('ZREM', WORKER_LEASES, worker_id)
  publish('removed', worker_id)
end

-- A request is kept as {attempt, epoch, record}.
local function read_request(request_id)
  local packed = redis.call('HGET', REQUESTS, request_id)
  return packed and cmsgpack.unpack(packed)
end

local function forget_request(request_id)
  redis.call('HDEL', REQUESTS, request_id)
  redis.call('ZREM', REQUEST_LEASES, request_id)
end
