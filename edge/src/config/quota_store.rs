//! `[quota_store]`: a Redis or Valkey in which edges count quotas together.

use std::{fmt, path::PathBuf};

use http::uri::{Authority, Uri};
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Deserializer, de};

/// `[quota_store]`: a Redis or Valkey in which edges count quotas together.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuotaStore {
    /// Where it is.
    pub url: StoreUrl,
    /// File that has its password, in place of the URL.
    pub password_file: Option<PathBuf>,
    /// PEM file of the certificates to trust with `rediss://`; the system's if not told.
    pub ca: Option<PathBuf>,
    /// What the names of its keys begin with.
    #[serde(default = "starling", deserialize_with = "prefix")]
    pub prefix: String,
    /// What becomes of calls while it does not answer.
    #[serde(default)]
    pub on_store_down: OnStoreDown,
}

/// What becomes of calls while the store does not answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStoreDown {
    /// Edges count without it, as they do where none is named.
    #[default]
    Local,
    /// Calls that a quota counts get 503.
    Deny,
}

/// `redis://[user[:password]@]host[:port][/database]`, or with `rediss` for TLS.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct StoreUrl {
    /// Host and port.
    pub authority: Authority,
    /// Whether TLS goes there.
    pub tls: bool,
    /// Who the edge is there, if not the default user.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<String>,
    /// Number of the database.
    pub database: u16,
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "rediss" } else { "redis" };
        write!(f, "{scheme}://{}/{}", self.authority, self.database)
    }
}

impl TryFrom<String> for StoreUrl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // Its text may have a password in it.
        let wrong = || {
            "this is no URL of a store: use one such as \"redis://10.0.0.7:6379/0\", or rediss:// for TLS".to_owned()
        };
        let url: Uri = text.parse().map_err(|_| wrong())?;
        let tls = match url.scheme_str() {
            Some("redis") => false,
            Some("rediss") => true,
            _ => return Err(wrong()),
        };
        let whole = url.authority().map(Authority::as_str).unwrap_or_default();
        let (who, host) = whole.rsplit_once('@').unwrap_or(("", whole));
        let authority: Authority = host.parse().map_err(|_| wrong())?;
        if authority.host().is_empty() || url.query().is_some() {
            return Err(wrong());
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| wrong());
        let some = |text: &str| decoded(text).map(|text| Some(text).filter(|text| !text.is_empty()));
        let (user, password) = who.split_once(':').unwrap_or((who, ""));
        let database = match url.path().trim_start_matches('/') {
            "" => 0,
            number => number.parse().map_err(|_| wrong())?,
        };
        Ok(Self { authority, tls, user: some(user)?, password: some(password)?, database })
    }
}

fn starling() -> String {
    "starling".into()
}

fn prefix<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    let prefix = String::deserialize(d)?;
    let is_plain =
        (1..=64).contains(&prefix.len()) && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-:".contains(&b));
    match is_plain {
        true => Ok(prefix),
        false => Err(de::Error::custom(format!(
            "{prefix:?} is no prefix: use 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-' and ':'"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_store_is() {
        let url = |text: &str| StoreUrl::try_from(text.to_owned());
        let whole = url("rediss://edge:p%40ss:1@store.example:7000/3").unwrap();
        assert_eq!((whole.authority.as_str(), whole.tls, whole.database), ("store.example:7000", true, 3));
        assert_eq!((whole.user.as_deref(), whole.password.as_deref()), (Some("edge"), Some("p@ss:1")));
        assert_eq!(format!("{whole:?}"), "rediss://store.example:7000/3");
        let bare = url("redis://[::1]").unwrap();
        assert_eq!((bare.authority.as_str(), bare.user, bare.password), ("[::1]", None, None));
        assert_eq!(url("redis://:secret@a").unwrap().password.as_deref(), Some("secret"));
        for bad in
            ["a:6379", "http://a", "redis://", "redis://a/b", "redis://a/70000", "redis://a?x=secret", "redis://:%ff@a"]
        {
            let why = url(bad).unwrap_err();
            assert!(why.contains("no URL of a store") && !why.contains("secret"), "{bad}: {why}");
        }
    }
}
