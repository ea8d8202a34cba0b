-- ARGV: 5 request id. Returns the record; 0 when it may be one that was lost with the data, nil otherwise.
local request = read_request(ARGV[5])
if request then return request[3] end
return is_recovering() == 1 and 0 or false
