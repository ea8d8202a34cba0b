-- Returns incarnation, revision, number of requests, then every worker.
local known = redis.call('HMGET', DIRECTORY, 'incarnation', 'revision')
local reply = {known[1], tonumber(known[2]), redis.call('HLEN', REQUESTS)}
for _, packed in ipairs(redis.call('HVALS', WORKERS)) do
  local worker = cmsgpack.unpack(packed)
  reply[#reply + 1] = worker[2] .. worker[3] .. worker[4]
end
return reply
