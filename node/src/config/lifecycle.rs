//! How long a version of an API will be there.

use std::time::{Duration, SystemTime};

use serde::Deserialize;
use starling_protocol::MAX_LINK_BYTES;

/// A time in seconds since 1970; in a file the start of a day in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Date(u64);

impl Date {
    /// Seconds since 1970.
    pub fn unix(self) -> u64 {
        self.0
    }

    /// At that time; `None` from the year 10000 on, which no field can say.
    pub fn at(unix: u64) -> Option<Self> {
        const YEAR_10000: u64 = 253_402_300_800;
        (unix < YEAR_10000).then_some(Self(unix))
    }
}

impl From<Date> for SystemTime {
    fn from(date: Date) -> Self {
        Self::UNIX_EPOCH + Duration::from_secs(date.0)
    }
}

impl TryFrom<String> for Date {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        unix_of_day(&text).map(Self).ok_or_else(|| format!("{text:?} is not a date since 1970: use \"YYYY-MM-DD\""))
    }
}

fn unix_of_day(text: &str) -> Option<u64> {
    let number = |text: &str, digits| {
        (text.len() == digits && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse::<u16>().ok())?
    };
    let (year, rest) = text.split_once('-')?;
    let (month, day) = rest.split_once('-')?;
    let month = time::Month::try_from(u8::try_from(number(month, 2)?).ok()?).ok()?;
    let day = u8::try_from(number(day, 2)?).ok()?;
    let date = time::Date::from_calendar_date(number(year, 4)?.into(), month, day).ok()?;
    date.midnight().assume_utc().unix_timestamp().try_into().ok()
}

/// An absolute http or https URI that can stand in a Link field (RFC 8288) as it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Link(String);

impl Link {
    /// The URI.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Link {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if text.len() > MAX_LINK_BYTES {
            return Err(format!("a link has {MAX_LINK_BYTES} bytes at most"));
        }
        let plain = text.bytes().all(|b| b.is_ascii_graphic() && !b"<>\"\\^`{|}".contains(&b));
        let absolute = text.parse().is_ok_and(|uri: http::Uri| matches!(uri.scheme_str(), Some("https" | "http")));
        if plain && absolute {
            Ok(Self(text))
        } else {
            Err(format!("{text:?} is not a link: use an absolute URI such as \"https://example.com/news\""))
        }
    }
}
