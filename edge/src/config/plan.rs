//! `[[plan]]`: how often a caller may call.

use std::{num::NonZeroU32, time::Duration};

use serde::{Deserialize, Deserializer, de};

use super::{LABEL, digits, is_label};
use crate::limits::{Period, Quota};

/// Largest burst: what a structured field can say without loss is larger, what a plan needs is far smaller.
const MAX_BURST: u32 = 1_000_000_000;

/// `[[plan]]`: how often a caller may call. It has a rate, or a quota, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What routes and keys call it.
    pub name: String,
    /// Calls in a time, in the long run.
    pub rate: Option<Rate>,
    /// Calls at once; as many as the rate's number if not told.
    pub burst: Option<NonZeroU32>,
    /// Calls in a day, a month, or a longer time; all of them hold.
    pub quotas: Vec<Quota>,
    /// Where days and months begin; UTC if not told.
    pub time_zone: Option<TimeZone>,
    /// Whether it only counts, and lets everything pass.
    pub shadow: bool,
}

impl Plan {
    /// Calls at once, at that rate.
    pub(crate) fn burst(&self, rate: Rate) -> NonZeroU32 {
        self.burst.unwrap_or(rate.count)
    }
}

impl<'de> Deserialize<'de> for Plan {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "not a quota such as \"100000/day\", or a list of these")]
        enum Quotas {
            One(String),
            Several(Vec<String>),
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Raw {
            name: String,
            rate: Option<Rate>,
            burst: Option<NonZeroU32>,
            quota: Option<Quotas>,
            time_zone: Option<TimeZone>,
            #[serde(default)]
            shadow: bool,
        }
        let Raw { name, rate, burst, quota, time_zone, shadow } = Raw::deserialize(d)?;
        let wrong = |what: &str| Err(de::Error::custom(what));
        if !is_label(&name) {
            return Err(de::Error::custom(format!("{name:?} is not a plan name: {LABEL}")));
        }
        if burst.is_some_and(|burst| burst.get() > MAX_BURST) {
            return Err(de::Error::custom(format!("burst is too large: at most {MAX_BURST}")));
        }
        let texts = match quota {
            None => Vec::new(),
            Some(Quotas::One(text)) => vec![text],
            Some(Quotas::Several(texts)) if texts.is_empty() => {
                return wrong("quota is empty: leave it out, or name one");
            }
            Some(Quotas::Several(texts)) => texts,
        };
        let quotas = texts.iter().map(|text| Quota::try_from(text.as_str()).map_err(de::Error::custom));
        let quotas: Vec<Quota> = quotas.collect::<Result<_, _>>()?;
        for (at, quota) in quotas.iter().enumerate() {
            if quotas[..at].iter().any(|other| other.period == quota.period) {
                let period = quota.period;
                return Err(de::Error::custom(format!(
                    "two quotas a {period}: the smaller one would hold; remove one"
                )));
            }
        }
        if rate.is_none() && quotas.is_empty() {
            return wrong("a plan has a rate or quota: such as rate = \"50/s\", or quota = \"100000/day\"");
        }
        if rate.is_none() && burst.is_some() {
            return wrong("burst goes with rate: add one, or remove burst");
        }
        let of_calendar = |quota: &Quota| matches!(quota.period, Period::Day | Period::Month);
        if time_zone.is_some() && !quotas.iter().any(of_calendar) {
            return wrong("time_zone goes with a quota by \"/day\" or \"/month\": add one, or remove time_zone");
        }
        Ok(Self { name, rate, burst, quotas, time_zone, shadow })
    }
}

/// A time zone by its name in the tz database, such as `Europe/Berlin`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TimeZone(pub(crate) jiff::tz::TimeZone);

impl TryFrom<String> for TimeZone {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let zone = jiff::tz::TimeZone::get(&name);
        zone.map(Self).map_err(|_| format!("{name:?} is no time zone: use a name such as \"UTC\" or \"Europe/Berlin\""))
    }
}

/// So many in such a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate {
    /// How many.
    pub count: NonZeroU32,
    /// In what time: a second, a minute or an hour.
    pub window: Duration,
}

impl TryFrom<String> for Rate {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let rate = text.split_once('/').and_then(|(count, unit)| {
            let seconds = match unit {
                "s" => 1,
                "m" => 60,
                "h" => 3600,
                _ => return None,
            };
            let count = digits(count).and_then(|n| u32::try_from(n).ok()).filter(|n| *n <= MAX_BURST)?;
            Some(Self { count: NonZeroU32::new(count)?, window: Duration::from_secs(seconds) })
        });
        rate.ok_or_else(|| {
            format!("{text:?} is not a rate: use a number from 1 and \"/s\", \"/m\" or \"/h\", such as \"50/s\"")
        })
    }
}
