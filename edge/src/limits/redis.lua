-- A counter of a quota, and the number under which this store counts: KEYS[1], KEYS[2].
-- ARGV: such a number, if there is none; part, since, limit, least and most of what is to be taken (most 0: nothing);
-- how long the counter is kept; and what the edge knows of it, by field.
local counter, lives = KEYS[1], KEYS[2]
local part, since, limit = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local least, most = tonumber(ARGV[5]), tonumber(ARGV[6])

for i = 8, #ARGV, 2 do
  local known = tonumber(redis.call('HGET', counter, ARGV[i]) or '0')
  if tonumber(ARGV[i + 1]) > known then
    redis.call('HSET', counter, ARGV[i], ARGV[i + 1])
  end
end

local taken = 0
if most > 0 then
  local sum, old = 0, {}
  local all = redis.call('HGETALL', counter)
  for i = 1, #all, 2 do
    local at, kind = string.match(all[i], '^(%d+):%d+:([tr])$')
    at = tonumber(at)
    if at and at >= since and at <= part then
      sum = sum + (kind == 't' and 1 or -1) * tonumber(all[i + 1])
    elseif at and at < since then
      old[#old + 1] = all[i]
    end
  end
  -- Only where there are many: the clock of whoever asks may be wrong.
  if #all > 1024 then
    for _, field in ipairs(old) do
      redis.call('HDEL', counter, field)
    end
  end
  local free = limit - math.max(sum, 0)
  if free >= least then
    taken = math.min(free, most)
    local life = redis.call('GET', lives)
    if not life then
      life = ARGV[1]
      redis.call('SET', lives, life)
    end
    redis.call('HINCRBY', counter, ARGV[2] .. ':' .. life .. ':t', taken)
  end
end
if taken > 0 or #ARGV > 7 then
  redis.call('EXPIRE', counter, ARGV[7])
end
return { taken, redis.call('HGETALL', counter) }
