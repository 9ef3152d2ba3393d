-- A counter of a quota, and what this store calls itself: KEYS[1], KEYS[2].
-- ARGV: a number, for a store or a counter that has none; part, since, limit, least and most of what is to be taken (most 0: nothing);
-- how long the counter is kept; and what the edge knows of it, by field.
local counter = KEYS[1]
local part, since, limit = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local name = redis.call('GET', KEYS[2])
if not name then
  name = ARGV[1]
  redis.call('SET', KEYS[2], name)
end
local least, most = tonumber(ARGV[5]), tonumber(ARGV[6])
-- Something that is no counter would fail the questions about all others that come with this one.
local kind = redis.call('TYPE', counter).ok
if kind ~= 'hash' and kind ~= 'none' then
  redis.call('DEL', counter)
end

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
    -- Under a number of the counter's own: one that was lost does not begin with numbers that edges know already.
    local life = redis.call('HGET', counter, 'life')
    if not life then
      life = ARGV[1]
      redis.call('HSET', counter, 'life', life)
    end
    redis.call('HINCRBY', counter, ARGV[2] .. ':' .. life .. ':t', taken)
  end
end
if taken > 0 or #ARGV > 7 then
  redis.call('EXPIRE', counter, ARGV[7])
end
return { taken, redis.call('HGETALL', counter), name }
