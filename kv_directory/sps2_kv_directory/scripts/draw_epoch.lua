-- ARGV: 5 group, 6 largest epoch that the caller knows of. The wall clock, not lease time: after Redis forgot,
-- epochs must still grow.
local drawn = tonumber(redis.call('HGET', EPOCHS, ARGV[5]) or '0')
local epoch = math.max(drawn + 1, tonumber(ARGV[6]) + 1, wall_us())
redis.call('HSET', EPOCHS, ARGV[5], string.format('%.0f', epoch))
return epoch
