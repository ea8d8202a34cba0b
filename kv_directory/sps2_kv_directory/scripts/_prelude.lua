-- Stands at the head of every script. KEYS are all keys of one directory, in the order of script_runner.py.
-- ARGV: 1 now in µs ('' takes Redis TIME), 2 incarnation to begin with when there is no data,
--       3 lease TTL of workers in µs, 4 longest believable step of the clock in µs; 5.. the script's own.
local DIRECTORY, WORKERS, WORKER_LEASES, CHANGES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local REQUESTS, REQUEST_LEASES, EPOCHS = KEYS[5], KEYS[6], KEYS[7]
local PREFIXES, PREFIX_INDEX, SWEEPS = KEYS[8], KEYS[9], KEYS[10]
local ADMISSIONS, ADMISSION_LEASES = KEYS[11], KEYS[12]
local OK, NOT_FOUND, STALE = 1, 2, 3 -- the numbers of LeaseStatus
local MAX_CHANGES = 8192 -- kept for watchers that lag; one that lags more takes a snapshot
local LOAD_INTERVAL_US = 1000000 -- load alone is published at most this often per worker

local function wall_us()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- Redis that lost its data has no incarnation. What is left beside a lost incarnation is lost too. For one TTL
-- the directory is RECOVERING: who was known before may not have registered again yet.
if redis.call('HEXISTS', DIRECTORY, 'incarnation') == 0 then
  local wall = wall_us()
  redis.call('UNLINK', unpack(KEYS))
  redis.call('HSET', DIRECTORY, 'incarnation', ARGV[2], 'revision', 0, 'recovering', 1,
    'offset_us', 0, 'last_us', wall, 'hold_until_us', wall + tonumber(ARGV[3]))
end

-- Lease time, and the time before which nothing expires, both in µs. Lease time follows the wall clock but
-- never goes back, and stands still while nobody looked (an outage) or the wall clock jumped; after that
-- every holder has one TTL to renew. `expire` runs often enough that a long silence means an outage.
local function lease_clock()
  local wall, ttl, max_step = wall_us(), tonumber(ARGV[3]), tonumber(ARGV[4])
  local known = redis.call('HMGET', DIRECTORY, 'offset_us', 'last_us', 'hold_until_us')
  local offset, last, hold_until = tonumber(known[1]), tonumber(known[2]), tonumber(known[3])
  local time = wall + offset
  if math.abs(time - last) > max_step then
    offset, time, hold_until = last - wall, last, last + ttl
  elseif time < last then -- a small step back: lease time goes on from where it was
    offset, time = last - wall, last
  end
  redis.call('HSET', DIRECTORY, 'offset_us', offset, 'last_us', time, 'hold_until_us', hold_until)
  return time, hold_until
end

local function is_recovering()
  return redis.call('HEXISTS', DIRECTORY, 'recovering')
end

-- Names the log of changes: a server that starts again, or takes over, may have lost the last of them.
local function log_id()
  local incarnation = redis.call('HGET', DIRECTORY, 'incarnation')
  return incarnation .. string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
end

-- Adds one change of the worker state to the log; its stream id is its revision.
local function publish(kind, value)
  local revision = redis.call('HINCRBY', DIRECTORY, 'revision', 1)
  redis.call('XADD', CHANGES, 'MAXLEN', '~', MAX_CHANGES, string.format('%.0f-0', revision), kind, value)
end

-- A worker is kept as {incarnation, static, vital, load, published_us, epoch, token, group}; static, vital and
-- load are the serialized parts of its WorkerInfo (codec.py), which make the whole when they stand one after
-- another. The token names one epoch under one lease: what was told under another one is void.
local INCARNATION, STATIC, VITAL, LOAD, PUBLISHED_US, EPOCH, TOKEN, GROUP = 1, 2, 3, 4, 5, 6, 7, 8

local function read_worker(worker_id)
  local packed = redis.call('HGET', WORKERS, worker_id)
  return packed and cmsgpack.unpack(packed)
end

local function publish_worker(worker_id, worker)
  redis.call('HSET', WORKERS, worker_id, cmsgpack.pack(worker))
  publish('updated', worker[STATIC] .. worker[VITAL] .. worker[LOAD])
end

-- Epochs that were not drawn here (the directory was away, its data were lost) count as drawn all the same.
local function note_epoch(group, epoch)
  if epoch > tonumber(redis.call('HGET', EPOCHS, group) or '0') then
    redis.call('HSET', EPOCHS, group, string.format('%.0f', epoch))
  end
end

local function next_token()
  return string.format('%016.0f', redis.call('HINCRBY', DIRECTORY, 'token', 1))
end

-- The index of prefixes has a member worker \0 token \0 key for each key that a worker told under a token, all
-- of score 0: those of one token lie together, and are found without a scan.
local function prefix_member(worker_id, token, key)
  return worker_id .. '\0' .. token .. '\0' .. key
end

local function prefix_members(worker_id, token, count)
  local range = worker_id .. '\0' .. token
  return redis.call('ZRANGEBYLEX', PREFIX_INDEX, '[' .. range .. '\0', '(' .. range .. '\1', 'LIMIT', 0, count)
end

-- The token is over: what was told under it is forgotten bit by bit by `expire`, and not found from now on.
local function void_prefixes(worker_id, token)
  if prefix_members(worker_id, token, 1)[1] then
    redis.call('RPUSH', SWEEPS, worker_id .. '\0' .. token)
  end
end

-- A prefix key is kept as {worker \0 layout -> token}.
local function read_prefix(key)
  local packed = redis.call('HGET', PREFIXES, key)
  return packed and cmsgpack.unpack(packed) or {}
end

local function write_prefix(key, holders)
  if next(holders) then
    redis.call('HSET', PREFIXES, key, cmsgpack.pack(holders))
  else
    redis.call('HDEL', PREFIXES, key)
  end
end

local function remove_worker(worker_id, worker)
  void_prefixes(worker_id, worker[TOKEN])
  redis.call('HDEL', WORKERS, worker_id)
  redis.call('ZREM', WORKER_LEASES, worker_id)
  publish('removed', worker_id)
end

-- Whether a worker may tell about prefixes: OK, or why not.
local function check_holder(worker, incarnation, epoch)
  if not worker or (worker[INCARNATION] == incarnation and worker[EPOCH] < epoch) then return NOT_FOUND end
  return (worker[INCARNATION] == incarnation and worker[EPOCH] == epoch) and OK or STALE
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

-- An admission is kept as {call id, nonce, admission}.
local function forget_admission(request_id)
  redis.call('HDEL', ADMISSIONS, request_id)
  redis.call('ZREM', ADMISSION_LEASES, request_id)
end
