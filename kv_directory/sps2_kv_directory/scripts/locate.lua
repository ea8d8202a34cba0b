-- ARGV: 5 request id. Returns {record, admission}, each '' when it is not known; 0 when both may have been lost
-- with the data, nil otherwise.
local request, packed = read_request(ARGV[5]), redis.call('HGET', ADMISSIONS, ARGV[5])
if request or packed then
  return {request and request[3] or '', packed and cmsgpack.unpack(packed)[3] or ''}
end
return is_recovering() == 1 and 0 or false
