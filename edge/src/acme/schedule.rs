//! When a certificate is asked for: the first one at once, the next one in good time, and after a failure later and later.
//!
//! All times are seconds since 1970. What is random is handed in, so that a restart does not throw the dice again.

use serde::{Deserialize, Serialize};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;

/// Pauses after failures in a row; the last one stays. Authorities count failures by the hour, and some five of them is what they
/// suffer.
const PAUSES: [u64; 6] = [MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR, 3 * HOUR, 6 * HOUR];
/// The longest that an authority may ask for.
const MAX_ASKED: u64 = 7 * 24 * HOUR;

/// What became of the last tries for a certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tries {
    /// How many failed, one after the other.
    pub(crate) failures: u32,
    /// When there may be another one.
    pub(crate) next: u64,
    /// Why the last one failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

impl Tries {
    /// After one that was issued: the next one is not before an hour, whatever clocks and authorities say.
    pub(crate) fn succeeded(now: u64) -> Self {
        Self { failures: 0, next: now + HOUR, error: None }
    }

    /// Notes that one begins.
    pub(crate) fn begun(&mut self, now: u64) {
        self.next = self.next(now).max(now + MINUTE);
    }

    /// Notes a failure. `asked` is for how long the authority wants to be left alone, `dice` is from 0 to 1.
    pub(crate) fn failed(&mut self, now: u64, error: String, asked: Option<u64>, dice: f64) {
        let pause = PAUSES[(self.failures as usize).min(PAUSES.len() - 1)];
        self.failures = self.failures.saturating_add(1);
        let pause = (pause as f64 * (1.0 + dice / 4.0)) as u64;
        self.next = now + pause.max(asked.unwrap_or(0).min(MAX_ASKED));
        self.error = Some(error);
    }

    /// When there may be another try. A clock that was wrong when it was noted does not put it off for years.
    pub(crate) fn next(&self, now: u64) -> u64 {
        self.next.min(now + MAX_ASKED)
    }
}

/// When a certificate that is valid from `from` until `until` is to be renewed: within what the authority suggests (RFC 9773), or
/// when a third of its life is left, and a bit earlier. `dice` is from 0 to 1, and other for each certificate: many that were
/// issued together are not renewed together.
pub(crate) fn renewal(from: u64, until: u64, suggested: Option<(u64, u64)>, dice: f64) -> u64 {
    let dice = dice.clamp(0.0, 1.0);
    let life = until.saturating_sub(from);
    let usual = (until - life / 3).saturating_sub((life as f64 / 30.0 * dice) as u64);
    match suggested {
        // One that ends before it begins says nothing (RFC 9773 §4.2), and none is reason to let a certificate end.
        Some((start, end)) if start < end => (start + ((end - start) as f64 * dice) as u64).min(until - life / 10),
        _ => usual,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 24 * HOUR;

    #[test]
    fn renewed_in_good_time() {
        // 90 days: some 30 to 33 days before its end.
        assert_eq!(renewal(0, 90 * DAY, None, 0.0), 60 * DAY);
        assert_eq!(renewal(0, 90 * DAY, None, 1.0), 57 * DAY);
        // Of six days as of ninety.
        assert_eq!(renewal(0, 6 * DAY, None, 0.0), 4 * DAY);
        assert_eq!(renewal(0, 90 * DAY, Some((10 * DAY, 12 * DAY)), 0.5), 11 * DAY);
        // One that makes no sense, or is of an authority whose clock is wrong.
        assert_eq!(renewal(100, 50, None, 0.5), 50);
        assert_eq!(renewal(0, 90 * DAY, Some((12 * DAY, 10 * DAY)), 0.0), 60 * DAY);
        assert_eq!(renewal(0, 90 * DAY, Some((100 * DAY, 110 * DAY)), 0.5), 81 * DAY);
    }

    #[test]
    fn failures_are_ever_further_apart() {
        let mut tries = Tries::default();
        let (mut now, mut pauses) = (1000, Vec::new());
        for _ in 0..8 {
            tries.failed(now, "no".into(), None, 0.0);
            pauses.push((tries.next(now) - now) / MINUTE);
            now = tries.next(now);
        }
        assert_eq!(pauses, [1, 5, 15, 60, 180, 360, 360, 360]);
        tries.failed(now, "no".into(), Some(DAY), 1.0);
        assert_eq!(tries.next(now) - now, DAY, "as asked for");
        tries.failed(now, "no".into(), Some(u64::MAX), 1.0);
        assert_eq!(tries.next(now) - now, MAX_ASKED, "within reason");
        assert_eq!(tries.next(1000), 1000 + MAX_ASKED, "the clock was set back");
        let mut tries = Tries::succeeded(now);
        assert_eq!(tries.next(now), now + HOUR);
        tries.begun(now + 2 * HOUR);
        assert_eq!((tries.next(now + 2 * HOUR), tries.failures), (now + 2 * HOUR + MINUTE, 0));
    }
}
