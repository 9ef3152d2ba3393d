//! Quotas: so many calls in a day, a month, or any span of time.
//!
//! All times are seconds since 1970 by the wall clock, because days are. A clock that jumps moves nobody's count: what was counted
//! stays with the time for which it was counted, and is there again when the clock is right.

use std::{fmt, num::NonZeroU64, sync::Mutex};

use jiff::{Timestamp, Zoned, tz::TimeZone};

/// Into how many parts a span of time is cut that moves on with the clock.
pub(super) const PARTS: u64 = 12;
/// Longest such span: a month.
const MAX_SPAN_S: u64 = 31 * DAY_S;
const DAY_S: u64 = 24 * 60 * 60;
/// Largest count, which a structured field can still say (RFC 9651 §3.3.1).
const MAX_COUNT: u64 = 999_999_999_999_999;

/// So many in such a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quota {
    /// How many.
    pub count: NonZeroU64,
    /// In what time.
    pub period: Period,
}

/// A time in which calls are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Period {
    /// A day of the calendar.
    Day,
    /// A month of the calendar.
    Month,
    /// The last so many seconds, whenever that is.
    Last(u64),
}

impl TryFrom<&str> for Quota {
    type Error = String;

    fn try_from(text: &str) -> Result<Self, String> {
        let quota = text.split_once('/').and_then(|(count, period)| {
            let number =
                |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
            let count = NonZeroU64::new(number(count)?).filter(|count| count.get() <= MAX_COUNT)?;
            let period = match period {
                "day" => Period::Day,
                "month" => Period::Month,
                span => {
                    let (number_of, unit) = span.split_at_checked(span.len().checked_sub(1)?)?;
                    let unit = match unit {
                        "h" => 60 * 60,
                        "d" => DAY_S,
                        _ => return None,
                    };
                    let seconds = number(number_of)?.checked_mul(unit)?;
                    Period::Last(Some(seconds).filter(|s| (1..=MAX_SPAN_S).contains(s))?)
                }
            };
            Some(Self { count, period })
        });
        quota.ok_or_else(|| {
            format!(
                "{text:?} is not a quota: use a number from 1 and \"/day\" or \"/month\" of the calendar, or up to 31 days \
                 that move with the clock, such as \"/24h\" or \"/7d\""
            )
        })
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Day => f.write_str("day"),
            Self::Month => f.write_str("month"),
            Self::Last(seconds) if seconds % DAY_S == 0 => write!(f, "{}d", seconds / DAY_S),
            Self::Last(seconds) => write!(f, "{}h", seconds / 3600),
        }
    }
}

impl Period {
    /// How long it is, in seconds: of the calendar, as usual.
    pub(crate) fn seconds(self) -> u64 {
        match self {
            Self::Day => DAY_S,
            Self::Month => 30 * DAY_S,
            Self::Last(seconds) => seconds,
        }
    }
}

/// What counts at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Where calls of now are counted.
    pub(crate) part: u64,
    /// What was counted from here on counts.
    pub(crate) since: u64,
    /// How long it takes until something that counts does not any more: all of it in a calendar, the oldest part otherwise.
    pub(super) part_seconds: u64,
}

/// A calendar, or a clock, by which calls are counted.
#[derive(Debug)]
pub(crate) struct Clock {
    period: Period,
    zone: TimeZone,
    /// The day or month of the last look: from and until.
    current: Mutex<(u64, u64)>,
}

impl Clock {
    pub(crate) fn new(period: Period, zone: TimeZone) -> Self {
        Self { period, zone, current: Mutex::default() }
    }

    /// What counts now.
    pub(crate) fn span(&self, now: u64) -> Span {
        if let Period::Last(seconds) = self.period {
            let part_seconds = seconds.div_ceil(PARTS);
            let part = now / part_seconds * part_seconds;
            // One part more than the span has, so that it is never more than the quota in any span of that length.
            return Span { part, since: part.saturating_sub(PARTS * part_seconds), part_seconds };
        }
        let mut current = self.current.lock().unwrap_or_else(|e| e.into_inner());
        if !(current.0..current.1).contains(&now) {
            *current = self.of_calendar(now).unwrap_or((now / DAY_S * DAY_S, now / DAY_S * DAY_S + DAY_S));
        }
        let (from, until) = *current;
        Span { part: from, since: from, part_seconds: until - from }
    }

    fn of_calendar(&self, now: u64) -> Option<(u64, u64)> {
        let at = Timestamp::from_second(i64::try_from(now).ok()?).ok()?.to_zoned(self.zone.clone());
        let day = at.start_of_day().ok()?;
        let (from, next): (Zoned, Zoned) = match self.period {
            Period::Month => {
                let first = day.first_of_month().ok()?.start_of_day().ok()?;
                let next = first.checked_add(jiff::Span::new().months(1)).ok()?.start_of_day().ok()?;
                (first, next)
            }
            _ => (day.clone(), day.tomorrow().ok()?.start_of_day().ok()?),
        };
        let unix = |at: Zoned| u64::try_from(at.timestamp().as_second()).ok();
        Some((unix(from)?, unix(next)?)).filter(|(from, until)| (*from..*until).contains(&now))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::counts::{Counts, Life},
        *,
    };

    const ME: Life = Life(1);

    fn clock(period: Period, zone: &str) -> Clock {
        Clock::new(period, TimeZone::get(zone).unwrap())
    }

    fn unix(text: &str) -> u64 {
        text.parse::<Timestamp>().unwrap().as_second() as u64
    }

    #[test]
    fn quotas_as_they_are_written() {
        let quota = |text: &str| Quota::try_from(text).map(|quota| (quota.count.get(), quota.period.to_string()));
        assert_eq!(quota("100000/day").unwrap(), (100_000, "day".into()));
        assert_eq!(quota("1/month").unwrap(), (1, "month".into()));
        assert_eq!(quota("5/7d").unwrap(), (5, "7d".into()));
        assert_eq!(quota("5/24h").unwrap(), (5, "1d".into()));
        assert_eq!(quota("5/36h").unwrap(), (5, "36h".into()));
        for bad in
            ["", "5", "/day", "0/day", "-1/day", "5/week", "5/0d", "5/32d", "5/d", "5/1m", "+5/day", "1e3/day", "5/é"]
        {
            assert!(quota(bad).unwrap_err().contains("is not a quota"), "{bad}");
        }
    }

    #[test]
    fn days_and_months_are_those_of_the_place() {
        let day = clock(Period::Day, "Europe/Berlin");
        // The day on which clocks go forward has 23 hours.
        let span = day.span(unix("2026-03-29T10:00:00Z"));
        assert_eq!((span.part, span.part_seconds), (unix("2026-03-28T23:00:00Z"), 23 * 3600));
        assert_eq!(day.span(unix("2026-03-29T22:00:00Z")).part, unix("2026-03-29T22:00:00Z"));
        let month = clock(Period::Month, "America/New_York");
        let span = month.span(unix("2026-03-01T04:59:59Z"));
        assert_eq!(
            (span.part, span.part + span.part_seconds),
            (unix("2026-02-01T05:00:00Z"), unix("2026-03-01T05:00:00Z"))
        );
        assert_eq!(month.span(unix("2026-03-01T05:00:00Z")).part, unix("2026-03-01T05:00:00Z"));
    }

    /// Of any span of that length, whenever it begins.
    #[test]
    fn never_more_than_the_quota_in_a_span_that_moves() {
        let (clock, limit, length) = (clock(Period::Last(3600), "UTC"), 100, 3600);
        let (mut counts, mut passed) = (Counts::default(), Vec::new());
        for now in (1_000_000..1_000_000 + 5 * length).step_by(7) {
            let span = clock.span(now);
            if counts.sum(span) < limit {
                counts.add(span.part, ME, 1);
                passed.push(now);
            }
        }
        for (at, begin) in passed.iter().enumerate() {
            let within = passed[at..].iter().take_while(|now| **now < begin + length).count();
            assert!(within <= limit as usize, "{within} from {begin} on");
        }
        // And little less than it, in the long run.
        assert!(passed.len() as u64 >= limit * 5 * 11 / 13, "{}", passed.len());
    }

    #[test]
    fn a_clock_that_jumps_moves_nobodys_count() {
        for period in [Period::Day, Period::Month, Period::Last(DAY_S)] {
            let clock = clock(period, "UTC");
            let (mut counts, now) = (Counts::default(), unix("2026-11-30T12:00:00Z"));
            counts.add(clock.span(now).part, ME, 5);
            for jump in [3600, 366 * DAY_S] {
                for other in [now - jump, now + jump] {
                    counts.add(clock.span(other).part, ME, 1);
                }
            }
            assert!((5..=7).contains(&counts.sum(clock.span(now))), "{period}: {counts:?}");
            assert_eq!(Counts::decode(&counts.encode()), Some(counts));
        }
    }

    #[test]
    fn a_clock_that_was_ahead_for_long_leaves_room_for_the_time_that_is() {
        let clock = clock(Period::Last(3600), "UTC");
        let (mut counts, now) = (Counts::default(), 1_800_000_000);
        for ahead in (3 * 3600..6 * 3600).step_by(60) {
            counts.add(clock.span(now + ahead).part, ME, 1);
        }
        for minute in 0..120 {
            let span = clock.span(now + 60 * minute);
            let before = counts.sum(span);
            counts.add(span.part, ME, 1);
            assert_eq!(counts.sum(span), before + 1, "in minute {minute}");
        }
    }

    #[test]
    fn when_there_is_room_again() {
        let clock = clock(Period::Day, "UTC");
        let mut counts = Counts::default();
        let now = unix("2026-11-30T23:59:00Z");
        counts.add(clock.span(now).part, ME, 5);
        assert_eq!(counts.reset(clock.span(now), now), 60);
        let clock = self::clock(Period::Last(12 * 3600), "UTC");
        let mut counts = Counts::default();
        let now = unix("2026-11-30T12:30:00Z");
        counts.add(clock.span(now).part, ME, 5);
        let again = now + counts.reset(clock.span(now), now);
        assert_eq!(counts.sum(clock.span(again)), 0);
        assert!(counts.sum(clock.span(again - 1)) == 5 && again - now <= 13 * 3600);
        assert_eq!(Counts::decode(&[1, 2, 3]), None);
    }
}
