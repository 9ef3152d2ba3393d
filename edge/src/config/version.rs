//! `[[version]]`: the versions of one route's API.

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use http::HeaderName;
use serde::{Deserialize, Deserializer, de};

use super::{LABEL, is_label, some};

/// `[[version]]`: the versions of one route's API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// Path of the route.
    pub route: String,
    /// Where a request may name its version, in the order tried; at least one.
    #[serde(deserialize_with = "some")]
    pub from: Vec<VersionSource>,
    /// Version of a request that names none; such a request is refused if not told.
    pub default: Option<String>,
    /// The versions there are; at least one.
    #[serde(deserialize_with = "versions")]
    pub versions: BTreeMap<String, VersionInfo>,
}

/// Where a request may name its version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum VersionSource {
    /// A segment before the route's path or right after it; the service never sees it.
    Path,
    /// The value of a header field.
    Header(HeaderName),
    /// A media type of Accept, in lower case, with the version between the two parts.
    Accept {
        /// Before the version.
        prefix: String,
        /// After the version.
        suffix: String,
    },
    /// The value of a query parameter, which stays in place.
    Query(String),
}

/// As the file has it.
impl fmt::Display for VersionSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path => f.write_str("path"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Accept { prefix, suffix } => write!(f, "accept:{prefix}{{version}}{suffix}"),
            Self::Query(name) => write!(f, "query:{name}"),
        }
    }
}

impl TryFrom<String> for VersionSource {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let bad = |what: &str| Err(format!("{text:?}: {what}"));
        match text.split_once(':') {
            None if text == "path" => Ok(Self::Path),
            Some(("header", name)) => match HeaderName::from_str(name) {
                Ok(name) => Ok(Self::Header(name)),
                Err(_) => bad("not a header name; use for example \"header:x-api-version\""),
            },
            Some(("query", name)) if is_label(name) => Ok(Self::Query(name.into())),
            Some(("query", _)) => bad("the parameter's name may have A-Z, a-z, 0-9, '.', '_' and '-' only"),
            Some(("accept", pattern)) => {
                let pattern = pattern.to_ascii_lowercase();
                match pattern.split_once("{version}") {
                    Some((prefix, suffix)) if is_media_type(prefix, suffix) => {
                        Ok(Self::Accept { prefix: prefix.into(), suffix: suffix.into() })
                    }
                    _ => bad("not a media type with {version} once; use for example \
                         \"accept:application/vnd.example.{version}+json\""),
                }
            }
            _ => bad("not a place for a version; use \"path\", \"header:NAME\", \"accept:PATTERN\" or \"query:NAME\""),
        }
    }
}

fn is_media_type(prefix: &str, suffix: &str) -> bool {
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&b);
    prefix.split_once('/').is_some_and(|(kind, rest)| {
        !kind.is_empty() && kind.bytes().chain(rest.bytes()).chain(suffix.bytes()).all(is_token)
    })
}

/// What is to be said of a version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VersionInfo {
    /// Since when, or from when, it should not be used any more (RFC 9745).
    pub deprecated: Option<Date>,
    /// From when on it is gone (RFC 8594).
    pub sunset: Option<Date>,
    /// Where that is explained.
    pub link: Option<Link>,
}

/// The start of a day in UTC, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Date(u64);

impl Date {
    /// Seconds since 1970.
    pub fn unix(self) -> u64 {
        self.0
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
        let plain = text.bytes().all(|b| b.is_ascii_graphic() && !b"<>\"\\^`{|}".contains(&b));
        let absolute = text.parse().is_ok_and(|uri: http::Uri| matches!(uri.scheme_str(), Some("https" | "http")));
        if plain && absolute {
            Ok(Self(text))
        } else {
            Err(format!("{text:?} is not a link: use an absolute URI such as \"https://example.com/news\""))
        }
    }
}

fn versions<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, VersionInfo>, D::Error> {
    let versions = BTreeMap::<String, VersionInfo>::deserialize(d)?;
    if versions.is_empty() {
        return Err(de::Error::custom("there must be a version, such as { v1 = {} }"));
    }
    // A segment of dots would not survive the path's normal form.
    let bad = versions.keys().find(|name| !is_label(name) || name.bytes().all(|b| b == b'.'));
    bad.map_or(Ok(()), |name| Err(de::Error::custom(format!("{name:?} is not a version name: {LABEL}"))))?;
    Ok(versions)
}
