//! What a route does with a request other than to pass it to a service.

use std::{fmt, time::Duration};

use http::StatusCode;
use serde::{Deserialize, Deserializer, de};

use super::route::timeout;

/// `redirect`: where a request is sent instead.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// Where to.
    pub to: Destination,
    /// With which status; 308 if not told.
    #[serde(default = "permanent", deserialize_with = "redirection")]
    pub status: StatusCode,
}

/// A path, or an absolute URI; what the request has behind the route's path stands in place of a `*` at its end.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Destination(String);

impl Destination {
    /// For a request with that path behind the route's, which begins with `/`, and that query.
    pub(crate) fn of(&self, rest: &str, query: Option<&str>) -> String {
        let mut to = match self.0.strip_suffix("/*") {
            Some(front) => format!("{front}{rest}"),
            None => self.0.clone(),
        };
        if let Some(query) = query {
            to.push(if to.contains('?') { '&' } else { '?' });
            to.push_str(query);
        }
        to
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Destination {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_plain = text.bytes().all(|b| b.is_ascii_graphic() && !b"<>\"\\^`{|}#".contains(&b));
        let uri = text.parse::<http::Uri>().ok().filter(|_| is_plain);
        let is_whole =
            |uri: &http::Uri| matches!(uri.scheme_str(), Some("https" | "http")) && uri.authority().is_some();
        // `//host` would be another host.
        let is_path = text.starts_with('/') && !text.starts_with("//");
        let stars = text.matches('*').count();
        let ends_so = stars == 0 || stars == 1 && text.ends_with("/*");
        match uri.filter(|uri| (is_path || is_whole(uri)) && ends_so) {
            Some(_) => Ok(Self(text)),
            None => Err(format!(
                "{text:?} leads nowhere: use \"/path\" or \"https://host/path\", with \"/*\" at the end for what is behind the route's path"
            )),
        }
    }
}

fn permanent() -> StatusCode {
    StatusCode::PERMANENT_REDIRECT
}

fn redirection<'de, D: Deserializer<'de>>(d: D) -> Result<StatusCode, D::Error> {
    match u16::deserialize(d)? {
        status @ (301 | 302 | 303 | 307 | 308) => StatusCode::from_u16(status).map_err(de::Error::custom),
        other => Err(de::Error::custom(format!("{other} is no redirection: use 301, 302, 303, 307 or 308"))),
    }
}

/// `maintenance`: requests are answered with 503 and not passed on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Maintenance {
    /// When to come again; not told if absent.
    #[serde(default, deserialize_with = "timeout")]
    pub retry_after: Option<Duration>,
    /// What callers are told.
    #[serde(default = "maintained")]
    pub detail: String,
}

fn maintained() -> String {
    "this is being maintained; try again later".into()
}

/// A plain path that stands in place of the route's.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Prefix(String);

impl Prefix {
    /// With what a path has behind the route's, which begins with `/`.
    pub(crate) fn with(&self, rest: &str) -> String {
        match (self.0.trim_end_matches('/'), rest) {
            (front, "/") if !front.is_empty() => front.to_owned(),
            (front, rest) => format!("{front}{rest}"),
        }
    }
}

impl TryFrom<String> for Prefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match crate::route::canonical_path(&text).is_ok_and(|path| path == text) {
            true => Ok(Self(text)),
            false => Err(format!("{text:?} is not a plain path: use one such as \"/api/v2\"")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_redirection_leads() {
        let to = |text: &str| Destination::try_from(text.to_owned());
        for (text, rest, query, want) in [
            ("/new", "/1", None, "/new"),
            ("/new/*", "/1/2", Some("a=b"), "/new/1/2?a=b"),
            ("/*", "/", None, "/"),
            ("https://other.example/*", "/1", None, "https://other.example/1"),
            ("https://other.example/x?y=1", "/1", Some("a=b"), "https://other.example/x?y=1&a=b"),
        ] {
            assert_eq!(to(text).unwrap().of(rest, query), want);
        }
        for bad in
            ["", "new", "//evil.example/", "ftp://a/", "https://", "/a/*/b", "/a*", "/a\\b", "javascript:x", "/a#b"]
        {
            assert!(to(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_prefix_in_place_of_another() {
        let prefix = |text: &str| Prefix::try_from(text.to_owned());
        assert_eq!(prefix("/api").unwrap().with("/1"), "/api/1");
        assert_eq!(prefix("/api").unwrap().with("/"), "/api");
        assert_eq!(prefix("/").unwrap().with("/1"), "/1");
        assert_eq!(prefix("/").unwrap().with("/"), "/");
        for bad in ["api", "/a/../b", "/a//b", "/a?b", "/a%2fb"] {
            assert!(prefix(bad).is_err(), "{bad}");
        }
    }
}
