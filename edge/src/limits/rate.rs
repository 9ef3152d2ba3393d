//! Rates: the generic cell rate algorithm (ITU-T I.371 §A.1, virtual scheduling), as many cells a call as it costs.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    num::NonZeroU32,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::config::Rate;

/// Most callers that are remembered, over all shards: about 10 MB with the longest usual keys.
const MAX_KEYS: usize = 100_000;

/// How long a caller has to earn back at most what calls have cost beyond what there was.
const MAX_DEBT: Duration = Duration::from_secs(60 * 60);

/// Locks over which the callers are spread, so that cores seldom wait for one another.
const SHARDS: usize = 16;

/// Lets each caller make `burst` calls at once, and `rate` in the long run.
#[derive(Debug)]
pub(crate) struct Limiter {
    /// Between two calls of a steady caller.
    interval: Duration,
    /// The time in which a whole burst is earned.
    window: Duration,
    burst: u32,
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
    max_keys: usize,
}

/// The theoretical arrival time of each caller's next call. Not there, or past: the caller has the whole burst.
type Shard = HashMap<String, Instant>;

impl Limiter {
    /// Starts with no caller known, which means that all have their whole burst.
    pub(crate) fn new(rate: Rate, burst: NonZeroU32) -> Self {
        Self::with_max_keys(rate, burst, MAX_KEYS)
    }

    fn with_max_keys(rate: Rate, burst: NonZeroU32, max_keys: usize) -> Self {
        let interval = (rate.window / rate.count.get()).max(Duration::from_nanos(1));
        Self {
            interval,
            window: interval.saturating_mul(burst.get()),
            burst: burst.get(),
            hasher: RandomState::new(),
            shards: std::array::from_fn(|_| Mutex::default()),
            max_keys,
        }
    }

    /// Takes a call of that cost from a caller's allowance, unless there is not enough left: a refused call costs nothing.
    ///
    /// `key` is what the gateway knows for sure of the caller, never something a client may choose.
    pub(crate) fn take(&self, key: &str, cost: u32, now: Instant) -> Decision {
        let mut shard = self.shard(key);
        let (decision, after) = self.judge(shard.get(key), cost, now);
        if !decision.allowed {
            return decision;
        }
        if let Some(known) = shard.get_mut(key) {
            *known = after;
        } else {
            make_room(&mut shard, self.max_keys / SHARDS, now);
            shard.insert(key.to_owned(), after);
        }
        decision
    }

    /// Takes what a call has cost besides, also more than there is: the caller earns it back before the next one.
    pub(crate) fn charge(&self, key: &str, cost: u32, now: Instant) {
        let mut shard = self.shard(key);
        let (_, after) = self.judge(shard.get(key), cost, now);
        // Whatever a service says, nobody is shut out for good.
        let after = after.min(now + self.window + MAX_DEBT);
        match shard.get_mut(key) {
            Some(known) => *known = after.max(*known),
            None => {
                make_room(&mut shard, self.max_keys / SHARDS, now);
                shard.insert(key.to_owned(), after);
            }
        }
    }

    /// How it stands with a caller, and whether a call of that cost may pass; takes nothing.
    pub(crate) fn look(&self, key: &str, cost: u32, now: Instant) -> Decision {
        let shard = self.shard(key);
        let (decision, _) = self.judge(shard.get(key), cost, now);
        match decision.allowed {
            true => self.judge(shard.get(key), 0, now).0,
            false => decision,
        }
    }

    /// What becomes of a call, and when the one behind it would arrive in theory.
    fn judge(&self, known: Option<&Instant>, cost: u32, now: Instant) -> (Decision, Instant) {
        let arrival = known.copied().filter(|at| *at > now).unwrap_or(now);
        let after = arrival + self.interval.saturating_mul(cost);
        let debt = after.duration_since(now);
        let decision = match debt.checked_sub(self.window).filter(|over| !over.is_zero()) {
            Some(over) => self.decision(false, arrival.duration_since(now), over),
            None => self.decision(true, debt, Duration::ZERO),
        };
        (decision, after)
    }

    fn shard(&self, key: &str) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[self.hasher.hash_one(key) as usize % SHARDS];
        // The map is whole at every point where a panic could happen.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long until a caller has a call left; `None` if there is one.
    pub(crate) fn spent(&self, key: &str, now: Instant) -> Option<Duration> {
        let shard = self.shard(key);
        let debt = shard.get(key)?.checked_duration_since(now)? + self.interval;
        debt.checked_sub(self.window).filter(|over| !over.is_zero())
    }

    fn decision(&self, allowed: bool, debt: Duration, retry_after: Duration) -> Decision {
        let left = self.window.saturating_sub(debt).as_nanos() / self.interval.as_nanos();
        Decision {
            allowed,
            remaining: u32::try_from(left).unwrap_or(u32::MAX),
            reset: debt,
            retry_after,
            limit: self.burst,
            window: self.window,
        }
    }
}

/// Forgets who has the whole burst again, which changes nothing; if that is nobody, the half that comes nearest to it.
/// Half, so that the walk over the shard is paid once in many calls, even by a caller with ever new keys.
fn make_room(shard: &mut Shard, max: usize, now: Instant) {
    if shard.len() < max {
        return;
    }
    shard.retain(|_, at| *at > now);
    if shard.len() < max {
        return;
    }
    let mut arrivals: Vec<Instant> = shard.values().copied().collect();
    let middle = arrivals.len() / 2;
    let (_, median, _) = arrivals.select_nth_unstable(middle);
    let median = *median;
    shard.retain(|_, at| *at > median);
}

/// What becomes of a call, and what to tell the caller about the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Whether the call may pass.
    pub(crate) allowed: bool,
    /// Calls that may follow at once.
    pub(crate) remaining: u32,
    /// Time until the whole burst is there again.
    pub(crate) reset: Duration,
    /// Time until the next call may pass; zero if this one may.
    pub(crate) retry_after: Duration,
    /// The burst.
    pub(crate) limit: u32,
    /// Time in which the whole burst is earned.
    pub(crate) window: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(text: &str) -> Rate {
        Rate::try_from(text.to_owned()).unwrap()
    }

    fn limiter(rate_text: &str, burst: u32) -> Limiter {
        Limiter::new(rate(rate_text), NonZeroU32::new(burst).unwrap())
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_a_call_has_cost_besides_is_earned_back() {
        let (limiter, start) = (limiter("10/s", 10), Instant::now());
        assert!(limiter.take("a", 1, start).allowed);
        limiter.charge("a", 19, start);
        assert_eq!(limiter.take("a", 1, start).retry_after, ms(1100));
        assert!(!limiter.take("a", 1, start + ms(1000)).allowed);
        assert!(limiter.take("a", 1, start + ms(1100)).allowed);
        limiter.charge("b", u32::MAX, start);
        let wait = limiter.look("b", 1, start).retry_after;
        assert!(wait > MAX_DEBT && wait < MAX_DEBT + ms(1000), "{wait:?}");
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let limiter = limiter("10/s", 3);
        let start = Instant::now();
        // Time in ms, whether it passes, calls left, ms until whole, ms until the next.
        for (at, allowed, remaining, reset, retry) in [
            (0, true, 2, 100, 0),
            (0, true, 1, 200, 0),
            (0, true, 0, 300, 0),
            (0, false, 0, 300, 100),
            (40, false, 0, 260, 60),
            (99, false, 0, 201, 1),
            (100, true, 0, 300, 0),
            (150, false, 0, 250, 50),
            (350, true, 1, 150, 0),
            (9000, true, 2, 100, 0),
            // A clock read before that of another thread.
            (8950, true, 0, 250, 0),
        ] {
            let got = limiter.take("a", 1, start + ms(at));
            let want =
                Decision { allowed, remaining, reset: ms(reset), retry_after: ms(retry), limit: 3, window: ms(300) };
            assert_eq!(got, want, "at {at} ms");
        }
        assert!(limiter.take("b", 1, start).allowed, "each caller has its own");
    }

    #[test]
    fn no_more_than_rate_and_burst_over_a_boundary() {
        let limiter = limiter("50/s", 100);
        let start = Instant::now();
        let passed = |from: u64, to: u64| (from..to).filter(|at| limiter.take("a", 1, start + ms(*at)).allowed).count();
        // 1000 calls a second: the burst and what is earned meanwhile, then the rate and nothing else.
        assert_eq!(passed(0, 1000), 149);
        assert_eq!(passed(1000, 11_000), 500);
    }

    #[test]
    fn memory_is_bounded_and_the_indebted_are_kept() {
        let limiter = Limiter::with_max_keys(rate("1/s"), NonZeroU32::new(10).unwrap(), SHARDS * 8);
        let start = Instant::now();
        for _ in 0..10 {
            limiter.take("greedy", 1, start);
        }
        for i in 0..10_000 {
            limiter.take(&format!("caller {i}"), 1, start + Duration::from_micros(i));
        }
        let known: usize = limiter.shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
        assert!(known <= SHARDS * 8, "{known}");
        assert!(!limiter.take("greedy", 1, start + ms(10)).allowed);

        let later = start + Duration::from_secs(60);
        for i in 0..10_000 {
            limiter.take(&format!("later {i}"), 1, later);
        }
        assert!(limiter.take("greedy", 1, later).remaining >= 8, "the paid-up are forgotten or whole");
    }

    #[test]
    fn a_look_takes_nothing() {
        let limiter = limiter("1/s", 2);
        let now = Instant::now();
        assert!(limiter.look("a", 2, now).allowed && !limiter.look("a", 3, now).allowed);
        assert_eq!((limiter.take("a", 2, now).remaining, limiter.look("a", 1, now).allowed), (0, false));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let now = Instant::now();
        for (text, burst) in [("1000000000/s", u32::MAX), ("1/h", 1_000_000_000), ("1/h", 1)] {
            assert!(limiter(text, burst).take("a", 1, now).allowed, "{text} {burst}");
        }
    }
}
