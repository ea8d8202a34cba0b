-- ARGV: 5 worker id, 6 incarnation.
local worker = read_worker(ARGV[5])
if not worker then return NOT_FOUND end
if worker[INCARNATION] ~= ARGV[6] then return STALE end
remove_worker(ARGV[5], worker)
return OK
