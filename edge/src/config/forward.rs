//! `forward`: a service that decides whether a request may pass.

use std::{fmt, time::Duration};

use http::HeaderName;
use serde::{
    Deserialize, Deserializer,
    de::{self, value::MapAccessDeserializer},
};
use starling_protocol::Name;

use super::route::{named_by_hand, timeout};

/// Longest time for a decision: callers wait for it.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(5);

/// `forward`: a service that is asked whether a request may pass, before it does. The name alone will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// The service, as the mesh knows it.
    pub service: Name,
    /// Path that it is asked at; `/` if not told.
    pub path: String,
    /// How long it may take; 5 s if not told.
    pub timeout: Duration,
    /// Fields of its answer that the request has from then on, and nothing else under these names.
    pub headers: Vec<HeaderName>,
    /// Field of its answer that names the caller, for limits, logs and the service behind.
    pub consumer: Option<HeaderName>,
}

impl<'de> Deserialize<'de> for Forward {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(NameOrTable)
    }
}

struct NameOrTable;

impl<'de> de::Visitor<'de> for NameOrTable {
    type Value = Forward;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a service, or a table such as { service = \"gatekeeper\", headers = [\"x-user\"] }")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Forward, E> {
        let service = name.parse().map_err(|e| E::custom(format!("{name:?} names no service: {e}")))?;
        Ok(Forward { service, path: "/".into(), timeout: TIMEOUT, headers: Vec::new(), consumer: None })
    }

    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Forward, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Raw {
            service: Name,
            #[serde(default = "root")]
            path: String,
            #[serde(default, deserialize_with = "timeout")]
            timeout: Option<Duration>,
            #[serde(default)]
            headers: Vec<String>,
            consumer: Option<String>,
        }
        let raw = Raw::deserialize(MapAccessDeserializer::new(map))?;
        let is_path = raw.path.starts_with('/') && raw.path.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
        if !is_path || raw.path.parse::<http::uri::PathAndQuery>().is_err() {
            return Err(de::Error::custom(format!("{:?} is no path: use one such as \"/verify\"", raw.path)));
        }
        let timeout = raw.timeout.unwrap_or(TIMEOUT);
        if timeout > MAX_TIMEOUT {
            let most = MAX_TIMEOUT.as_secs();
            return Err(de::Error::custom(format!(
                "a decision may take {most} s at most, because callers wait for it"
            )));
        }
        let field = |name: &String| named_by_hand(name).map_err(de::Error::custom);
        let headers = raw.headers.iter().map(field).collect::<Result<Vec<_>, _>>()?;
        let consumer = raw.consumer.as_ref().map(field).transpose()?;
        Ok(Forward { service: raw.service, path: raw.path, timeout, headers, consumer })
    }
}

fn root() -> String {
    "/".into()
}
