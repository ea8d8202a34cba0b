-- ARGV: 5 log (see log_id), 6 revision that the caller has, 7 most changes to return. Returns whether the
-- directory is recovering, then kind, value, kind, value...; nil when the changes cannot be had without a gap
-- (another log, or it was trimmed).
local since, revision = tonumber(ARGV[6]), tonumber(redis.call('HGET', DIRECTORY, 'revision'))
if log_id() ~= ARGV[5] or since > revision then return false end
local reply = {is_recovering()}
if since == revision then return reply end
local first = string.format('%.0f-0', since + 1)
local entries = redis.call('XRANGE', CHANGES, first, '+', 'COUNT', ARGV[7])
if not entries[1] or entries[1][1] ~= first then return false end
for _, entry in ipairs(entries) do
  reply[#reply + 1] = entry[2][1]
  reply[#reply + 1] = entry[2][2]
end
return reply
