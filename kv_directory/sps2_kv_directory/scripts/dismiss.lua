-- ARGV: 5 request id, 6 call id.
local packed = redis.call('HGET', ADMISSIONS, ARGV[5])
if not packed or cmsgpack.unpack(packed)[1] ~= ARGV[6] then return NOT_FOUND end
forget_admission(ARGV[5])
return OK
