//! `[[certificate]]`: what an edge shows to clients that ask for its names.

use std::path::PathBuf;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::Uri;
use serde::{Deserialize, Deserializer, de};

use super::Host;

/// `[[certificate]]`: the server names of one certificate, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Host names in lower case, exact or `*.example.com`; at least one.
    pub hosts: Vec<String>,
    /// Where the chain and its key come from.
    pub source: Source,
}

/// Where a certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Files, which somebody else renews.
    Files(Files),
    /// An authority that issues by ACME (RFC 8555); the edge renews it.
    Acme(Acme),
}

/// Files of a chain and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// PEM file of the chain, leaf first.
    pub cert: PathBuf,
    /// PEM file of the private key.
    pub key: PathBuf,
}

/// `acme = { … }`: which authority issues, and how it sees that the names are ours.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acme {
    /// The authority.
    #[serde(default)]
    pub directory: Directory,
    /// Whom the authority writes to, when something is wrong.
    #[serde(default, deserialize_with = "email")]
    pub email: Option<String>,
    /// PEM file of the certificates to trust in the authority's place on the web; the system's if not told.
    pub ca: Option<PathBuf>,
    /// How it sees that the names are ours; whatever works if not told.
    pub challenge: Option<ChallengeKind>,
    /// The account that we have there by another way, for authorities that ask for one.
    pub eab: Option<Eab>,
}

/// `eab = { … }`: what an authority gave out to know whose a new account is (RFC 8555 §7.3.4).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eab {
    /// The key's name.
    #[serde(deserialize_with = "super::text")]
    pub kid: String,
    /// File of the key itself, in base64url, as authorities give it.
    pub key_file: PathBuf,
}

impl Eab {
    /// The key.
    ///
    /// # Errors
    /// What is wrong with its file, and what to do.
    pub(crate) fn key(&self) -> Result<Vec<u8>, String> {
        let file = self.key_file.display();
        let text = std::fs::read_to_string(&self.key_file).map_err(|e| format!("{file}: it cannot be read ({e})"))?;
        let key = BASE64_URL_SAFE_NO_PAD.decode(text.trim().trim_end_matches('=')).unwrap_or_default();
        match key.is_empty() {
            true => Err(format!(
                "{file}: it has no key in base64url; put there what the authority has given, and nothing else"
            )),
            false => Ok(key),
        }
    }
}

/// URL of an authority's directory (RFC 8555 §7.1.1).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Directory(pub String);

impl Default for Directory {
    fn default() -> Self {
        Self("https://acme-v02.api.letsencrypt.org/directory".into())
    }
}

impl TryFrom<String> for Directory {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "letsencrypt" => return Ok(Self::default()),
            "letsencrypt-staging" => return Ok(Self("https://acme-staging-v02.api.letsencrypt.org/directory".into())),
            _ => {}
        }
        let is_https = |uri: &Uri| uri.scheme_str() == Some("https") && uri.authority().is_some();
        match text.parse::<Uri>() {
            Ok(uri) if is_https(&uri) => Ok(Self(text)),
            _ => Err(format!(
                "{text:?} is no directory: use \"letsencrypt\", \"letsencrypt-staging\" or a URL that begins with https://"
            )),
        }
    }
}

/// How an authority sees that a name is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub enum ChallengeKind {
    /// It asks port 80 for a text (RFC 8555 §8.3).
    #[serde(rename = "http-01")]
    Http,
    /// It makes a TLS handshake at port 443 (RFC 8737).
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn,
}

impl ChallengeKind {
    /// Its name in the protocol.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http-01",
            Self::TlsAlpn => "tls-alpn-01",
        }
    }
}

impl<'de> Deserialize<'de> for Certificate {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Raw {
            hosts: Vec<Host>,
            cert: Option<PathBuf>,
            key: Option<PathBuf>,
            acme: Option<Acme>,
        }
        let Raw { hosts, cert, key, acme } = Raw::deserialize(d)?;
        if hosts.is_empty() {
            return Err(de::Error::custom("hosts is empty: name at least one host, such as \"api.example.com\""));
        }
        if hosts.contains(&Host::Any) {
            return Err(de::Error::custom("\"*\" is not a host of a certificate: use names such as \"*.example.com\""));
        }
        let source = match (acme, cert, key) {
            (Some(acme), None, None) => Source::Acme(acme),
            (Some(_), ..) => return Err(de::Error::custom("acme and files at once: leave out cert and key, or acme")),
            (None, Some(cert), Some(key)) => Source::Files(Files { cert, key }),
            (None, Some(_), None) => return Err(de::Error::missing_field("key")),
            (None, None, Some(_)) => return Err(de::Error::missing_field("cert")),
            (None, None, None) => {
                return Err(de::Error::custom("where is it from? give cert and key files, or acme = {}"));
            }
        };
        if let Source::Acme(_) = &source {
            let cannot = |host: &&Host| match host {
                Host::Exact(name) => name.starts_with('[') || name.parse::<std::net::Ipv4Addr>().is_ok(),
                Host::Any | Host::Under(_) => true,
            };
            if let Some(host) = hosts.iter().find(cannot) {
                return Err(de::Error::custom(format!(
                    "acme is for whole names, which {host} is not: name each host, or give cert and key files"
                )));
            }
        }
        Ok(Self { hosts: hosts.iter().map(Host::to_string).collect(), source })
    }
}

/// Just what an authority would refuse at once.
fn email<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(d)?;
    let is_one = text.split_once('@').is_some_and(|(who, at)| !who.is_empty() && !at.is_empty() && !at.contains('@'));
    match is_one && text.is_ascii() && !text.contains([' ', ',', '?', '<', '>']) {
        true => Ok(Some(text)),
        false => Err(de::Error::custom(format!("{text:?} is no address for mail: write it as \"ops@example.com\""))),
    }
}
