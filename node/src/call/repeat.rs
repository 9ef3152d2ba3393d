//! When a call is made more than once: again after a failure, or, hedged, a second time before there is one.

use std::{
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};

use super::budget::RetryBudget;

/// Attempts that an operator may ask for, the first one included.
const MAX_ATTEMPTS: u32 = 6;
/// Retries a second, whatever the number of calls, that an operator may ask for.
const MAX_PER_SECOND: u32 = 1000;
/// Answers that say how long most take: fewer say nothing.
const ENOUGH: usize = 20;
/// The latest answers that are looked at.
const LOOKED_AT: usize = 128;
/// How many come until they are looked at again.
const EVERY: usize = 16;
/// A second copy never goes sooner: below, chance decides.
const SOONEST: Duration = Duration::from_millis(1);

/// How often a call may be made, as an operator says for an upstream or a route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RepeatSettings {
    /// After a failure.
    pub retry: RetrySettings,
    /// Before one; never if absent.
    pub hedge: Option<HedgeSettings>,
}

/// `retry = { attempts = 3, any_method = false, budget = 0.2, per_second = 10 }`
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetrySettings {
    /// The first one included; 1 is without retries.
    #[serde(deserialize_with = "attempts")]
    pub attempts: u32,
    /// Takes every method for one that may be repeated: the service does no more when it is asked twice.
    pub any_method: bool,
    /// Retries for each call, as a share.
    #[serde(deserialize_with = "share")]
    pub budget: f64,
    /// Retries a second beside that, for quiet times.
    #[serde(deserialize_with = "per_second")]
    pub per_second: u32,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self { attempts: 3, any_method: false, budget: 0.2, per_second: 10 }
    }
}

/// `hedge = { after = "p95" }`: a second copy of a request without a body goes to another instance when the first one has not
/// answered so soon; the answer that comes first counts, and the other is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HedgeSettings {
    /// How soon.
    pub after: HedgeAfter,
}

/// How soon a second copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HedgeAfter {
    /// When it has taken longer than so many of a hundred answers of late.
    Percentile(u8),
    /// After so long.
    Time(Duration),
}

impl<'de> Deserialize<'de> for HedgeAfter {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let wrong = || de::Error::custom(format!("{text:?} is neither \"p50\" to \"p99\" nor a time like \"20ms\""));
        if let Some(percent) = text.strip_prefix('p') {
            let percent = percent.parse().ok().filter(|percent| (50..=99).contains(percent));
            return percent.map(Self::Percentile).ok_or_else(wrong);
        }
        let after = humantime::parse_duration(&text).ok().filter(|after| *after >= SOONEST);
        after.map(Self::Time).ok_or_else(wrong)
    }
}

fn attempts<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    let attempts = u32::deserialize(d)?;
    match attempts {
        1..=MAX_ATTEMPTS => Ok(attempts),
        _ => Err(de::Error::custom(format!("use 1 to {MAX_ATTEMPTS} attempts; 1 is without retries"))),
    }
}

fn share<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    let share = f64::deserialize(d)?;
    match (0.0..=1.0).contains(&share) {
        true => Ok(share),
        false => Err(de::Error::custom("a share, from 0 to 1; 0.2 is a retry for five calls")),
    }
}

fn per_second<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    let retries = u32::deserialize(d)?;
    match retries {
        0..=MAX_PER_SECOND => Ok(retries),
        _ => Err(de::Error::custom(format!("use 0 to {MAX_PER_SECOND}"))),
    }
}

/// A service as this node calls it, whichever instance answers. Shared by the workers: what a failing service costs in retries is
/// its own, and no other's.
#[derive(Default)]
pub(crate) struct Called {
    pub(crate) budget: RetryBudget,
    times: Mutex<Times>,
    retries: AtomicU64,
    hedges: AtomicU64,
    /// Retries and hedges that there was no budget for.
    denied: AtomicU64,
}

impl Called {
    /// Whether one more attempt may be made, counted if so.
    pub(super) fn may_retry(&self, settings: &RetrySettings) -> bool {
        self.spend(settings, &self.retries)
    }

    /// Whether a second copy may go, counted if so.
    pub(super) fn may_hedge(&self, settings: &RetrySettings) -> bool {
        self.spend(settings, &self.hedges)
    }

    fn spend(&self, settings: &RetrySettings, count: &AtomicU64) -> bool {
        let may = self.budget.spend(settings.per_second);
        if may { count } else { &self.denied }.fetch_add(1, Relaxed);
        may
    }

    /// Counts an attempt that costs nothing but time, because the one before it reached nobody.
    pub(super) fn passed_over(&self) {
        self.retries.fetch_add(1, Relaxed);
    }

    /// An answer came, after so long.
    pub(super) fn answered(&self, after: Duration) {
        self.times().add(after);
    }

    /// How soon a second copy goes; `None` if too little is known.
    pub(super) fn hedges_after(&self, settings: HedgeSettings) -> Option<Duration> {
        match settings.after {
            HedgeAfter::Time(after) => Some(after),
            HedgeAfter::Percentile(percent) => self.times().percentile(percent).map(|after| after.max(SOONEST)),
        }
    }

    /// What was counted so far.
    pub(crate) fn repeats(&self) -> Repeats {
        let [retries, hedges, denied] = [&self.retries, &self.hedges, &self.denied].map(|count| count.load(Relaxed));
        Repeats { retries, hedges, denied }
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Attempts beyond the first at calls to a service, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Repeats {
    /// After a failure.
    pub(crate) retries: u64,
    /// Before one.
    pub(crate) hedges: u64,
    /// Not made, because there was no budget for them.
    pub(crate) denied: u64,
}

/// How long the latest answers took, for those who ask; in microseconds.
#[derive(Default)]
struct Times {
    latest: Vec<u32>,
    next: usize,
    /// What was found when they were last looked at: which percentile, and after how many answers.
    found: Option<(u8, Duration)>,
    since: usize,
}

impl Times {
    fn add(&mut self, time: Duration) {
        let time = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        match self.latest.get_mut(self.next) {
            Some(place) => *place = time,
            None => self.latest.push(time),
        }
        self.next = (self.next + 1) % LOOKED_AT;
        self.since += 1;
    }

    fn percentile(&mut self, percent: u8) -> Option<Duration> {
        if self.latest.len() < ENOUGH {
            return None;
        }
        match self.found {
            Some((of, found)) if of == percent && self.since < EVERY => Some(found),
            _ => {
                let mut sorted = self.latest.clone();
                let at = sorted.len() * usize::from(percent) / 100;
                let (_, found, _) = sorted.select_nth_unstable(at);
                let found = Duration::from_micros((*found).into());
                (self.found, self.since) = (Some((percent, found)), 0);
                Some(found)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_of_the_latest_answers() {
        let called = Called::default();
        let p95 = HedgeSettings { after: HedgeAfter::Percentile(95) };
        for millis in 1..ENOUGH as u64 {
            called.answered(Duration::from_millis(millis));
            assert_eq!(called.hedges_after(p95), None, "{millis}");
        }
        for millis in 1..=1000 {
            called.answered(Duration::from_millis(millis % 100));
        }
        let after = called.hedges_after(p95).unwrap();
        assert!((90..=99).contains(&after.as_millis()), "{after:?}");
        for _ in 0..LOOKED_AT {
            called.answered(Duration::from_micros(10));
        }
        assert_eq!(called.hedges_after(p95), Some(SOONEST));
    }

    #[test]
    fn settings_are_checked() {
        let read = |text: &str| toml::from_str::<RepeatSettings>(text);
        assert_eq!(read("").unwrap(), RepeatSettings::default());
        let all =
            "retry = { attempts = 5, any_method = true, budget = 0.5, per_second = 3 }\nhedge = { after = \"p95\" }";
        let settings = read(all).unwrap();
        assert_eq!((settings.retry.attempts, settings.retry.any_method), (5, true));
        assert_eq!(settings.hedge.unwrap().after, HedgeAfter::Percentile(95));
        assert_eq!(
            read("hedge = { after = \"20ms\" }").unwrap().hedge.unwrap().after,
            HedgeAfter::Time(Duration::from_millis(20))
        );
        for wrong in [
            "retry = { attempts = 0 }",
            "retry = { attempts = 7 }",
            "retry = { budget = 1.1 }",
            "retry = { budget = -0.1 }",
            "retry = { per_second = 1001 }",
            "retry = { tries = 3 }",
            "hedge = {}",
            "hedge = { after = \"p10\" }",
            "hedge = { after = \"p100\" }",
            "hedge = { after = \"soon\" }",
            "hedge = { after = \"0s\" }",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
