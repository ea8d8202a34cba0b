-- ARGV: 5 most holders to return, 6.. keys of a chain, the first block's first. Returns for each holder, the
-- longest run first: worker id, incarnation, epoch, layout, number of leading keys.
local keys = {unpack(ARGV, 6)}
local runs = {} -- worker \0 layout -> its run
local found = {} -- the same runs, in a list

local function begin(holder, token)
  local cut = string.find(holder, '\0', 1, true)
  local worker_id = string.sub(holder, 1, cut - 1)
  local worker = read_worker(worker_id)
  if not worker or worker[TOKEN] ~= token then return end
  local run = {
    worker_id = worker_id, worker = worker, layout = string.sub(holder, cut + 1), token = token, length = 1,
  }
  runs[holder] = run
  found[#found + 1] = run
end

-- Runs that reach the key before this one, and whose holder has this one too, reach this one.
local function extend(holders, length)
  local any = false
  for holder, run in pairs(runs) do
    if run.length == length - 1 and holders[holder] == run.token then
      run.length, any = length, true
    end
  end
  return any
end

local last, holders
for i, packed in ipairs(redis.call('HMGET', PREFIXES, unpack(keys))) do
  if not packed then break end
  if packed ~= last then last, holders = packed, cmsgpack.unpack(packed) end
  if i == 1 then
    for holder, token in pairs(holders) do begin(holder, token) end
  elseif not extend(holders, i) then
    break
  end
end

table.sort(found, function(a, b)
  if a.length ~= b.length then return a.length > b.length end
  if a.worker_id ~= b.worker_id then return a.worker_id < b.worker_id end
  return a.layout < b.layout
end)
local reply = {}
for i = 1, math.min(#found, tonumber(ARGV[5])) do
  local run = found[i]
  for _, value in ipairs({
    run.worker_id, run.worker[INCARNATION], string.format('%.0f', run.worker[EPOCH]), run.layout, run.length,
  }) do reply[#reply + 1] = value end
end
return reply
