-- ARGV: 5 request id. Returns the record, or nil.
local request = read_request(ARGV[5])
return request and request[3]
