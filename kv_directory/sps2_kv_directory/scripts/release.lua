-- ARGV: 5 request id, 6 attempt. An attempt that was never recorded supersedes older ones all the same.
local request = read_request(ARGV[5])
if not request then return NOT_FOUND end
if request[1] > tonumber(ARGV[6]) then return STALE end
forget_request(ARGV[5])
return OK
