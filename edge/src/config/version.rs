//! `[[version]]`: the versions of one route's API.

use std::{collections::BTreeMap, fmt, str::FromStr};

use http::HeaderName;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};
use starling_node::config::{Date, Link};

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
    /// In place of a default, how many of the requests that name none go to which version, in relation to each other.
    #[serde(default, deserialize_with = "weights")]
    pub weights: BTreeMap<String, u32>,
    /// Whether a caller stays with the version that the weights give it.
    #[serde(default)]
    pub sticky: bool,
    /// The versions there are.
    pub versions: Known,
}

/// Which versions there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// These; at least one.
    Here(BTreeMap<String, VersionInfo>),
    /// `"mesh"`: what the nodes announce that serve them.
    Mesh,
}

impl Known {
    /// Those that are listed; `None` if they are in the mesh.
    pub fn here(&self) -> Option<&BTreeMap<String, VersionInfo>> {
        match self {
            Self::Here(versions) => Some(versions),
            Self::Mesh => None,
        }
    }
}

/// By hand, so that what is wrong in a table has its line.
impl<'de> Deserialize<'de> for Known {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Known;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"mesh\", or a table such as { v1 = {}, v2 = {} }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Known, E> {
                match text {
                    "mesh" => Ok(Known::Mesh),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Known, A::Error> {
                let mut versions = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !is_version(&name) {
                        return Err(de::Error::custom(format!("{name:?} is not a version name: {LABEL}")));
                    }
                    versions.insert(name, map.next_value()?);
                }
                match versions.is_empty() {
                    true => Err(de::Error::custom("there must be a version, such as { v1 = {} }")),
                    false => Ok(Known::Here(versions)),
                }
            }
        }
        d.deserialize_any(Reader)
    }
}

/// Whether something can be the name of a version. A segment of dots would not survive the path's normal form.
pub(crate) fn is_version(name: &str) -> bool {
    is_label(name) && !name.bytes().all(|b| b == b'.')
}

fn weights<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, u32>, D::Error> {
    const MAX: u32 = 1_000_000;
    let weights = BTreeMap::<String, u32>::deserialize(d)?;
    let wrong = |what: &str| Err(de::Error::custom(what));
    match weights.values().map(|weight| u64::from(*weight)).sum() {
        0u64 => wrong("one of the weights must be above 0, such as { v1 = 90, v2 = 10 }"),
        sum if sum > u64::from(MAX) => wrong("the weights are larger than they need to be: a million together at most"),
        _ => Ok(weights),
    }
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
    /// The version to use instead: the default if not told, where that is not deprecated itself.
    pub successor: Option<String>,
}
