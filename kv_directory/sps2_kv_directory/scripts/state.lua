-- Returns incarnation, log, revision, number of requests, number of prefix keys, whether the directory is
-- recovering, then every worker.
local known = redis.call('HMGET', DIRECTORY, 'incarnation', 'revision')
local num_requests, num_prefix_keys = redis.call('HLEN', REQUESTS), redis.call('HLEN', PREFIXES)
local reply = {known[1], log_id(), tonumber(known[2]), num_requests, num_prefix_keys, is_recovering()}
for _, packed in ipairs(redis.call('HVALS', WORKERS)) do
  local worker = cmsgpack.unpack(packed)
  reply[#reply + 1] = worker[STATIC] .. worker[VITAL] .. worker[LOAD]
end
return reply
