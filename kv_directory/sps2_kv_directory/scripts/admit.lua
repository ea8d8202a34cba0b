-- ARGV: 5 lease in µs, then for each admission: request id, call id, nonce, '1' for a renewal, the admission.
-- Returns for each the number of its AdmissionStatus and the other call's admission, or ''.
local ADMITTED, SUPERSEDES, REFUSED = 1, 2, 3
local time = lease_clock()
local ends, results = time + tonumber(ARGV[5]), {}

local function admit(request_id, call_id, nonce, is_renewal, admission)
  local packed = redis.call('HGET', ADMISSIONS, request_id)
  local old = packed and cmsgpack.unpack(packed)
  local status = ADMITTED
  if old and old[1] ~= call_id then
    if is_renewal == '1' or nonce == '' or old[2] ~= nonce then return REFUSED, old[3] end
    status = SUPERSEDES
  end
  redis.call('HSET', ADMISSIONS, request_id, cmsgpack.pack({call_id, nonce, admission}))
  redis.call('ZADD', ADMISSION_LEASES, ends, request_id)
  return status, status == SUPERSEDES and old[3] or ''
end

for i = 6, #ARGV, 5 do
  local status, other = admit(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4])
  results[#results + 1] = status
  results[#results + 1] = other
end
return results
