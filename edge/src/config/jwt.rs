//! `[jwt]`: whose tokens are taken.

use std::path::PathBuf;

use http::Uri;
use serde::Deserialize;

use super::{some, text};

/// `[jwt]`: whose tokens are taken.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jwt {
    /// What `iss` must be, letter by letter.
    #[serde(deserialize_with = "text")]
    pub issuer: String,
    /// What `aud` must have one of; at least one.
    #[serde(deserialize_with = "some")]
    pub audience: Vec<String>,
    /// Where the issuer's keys are, a JWK Set (RFC 7517 §5).
    pub jwks: Jwks,
    /// PEM file of the certificates to trust when they are fetched; the system's if not told.
    pub ca: Option<PathBuf>,
    /// Algorithms that are taken; at least one.
    #[serde(deserialize_with = "some")]
    pub algorithms: Vec<Algorithm>,
}

/// Where an issuer's keys are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Jwks {
    /// In a file.
    File(PathBuf),
    /// At a URL, from where they are fetched again and again.
    Url(Uri),
}

impl TryFrom<String> for Jwks {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() {
            return Err("it is empty; give a file, or the URL of the issuer's jwks_uri".into());
        }
        if !text.contains("://") {
            return Ok(Self::File(text.into()));
        }
        let own = |host: &str| matches!(host, "localhost" | "127.0.0.1" | "[::1]");
        match text.parse::<Uri>() {
            Ok(uri) if uri.host().is_some_and(|host| !host.is_empty()) => match uri.scheme_str() {
                Some("https") => Ok(Self::Url(uri)),
                Some("http") if uri.host().is_some_and(own) => Ok(Self::Url(uri)),
                _ => {
                    Err(format!("{text:?} is fetched without TLS, so that anybody on the way could sign; use https://"))
                }
            },
            _ => Err(format!("{text:?} is no URL; give the issuer's jwks_uri, or a file")),
        }
    }
}

/// A signature algorithm with a public key (RFC 7518 §3.1, RFC 8037 §3.1).
///
/// There is no value for `none` or for the HMACs, whose key would be the issuer's secret: they cannot be let in by
/// mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Algorithm(jsonwebtoken::Algorithm);

impl Algorithm {
    pub(crate) fn get(self) -> jsonwebtoken::Algorithm {
        self.0
    }
}

impl TryFrom<String> for Algorithm {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        use jsonwebtoken::Algorithm::*;
        let known = [ES256, ES384, EdDSA, RS256, RS384, RS512, PS256, PS384, PS512];
        text.parse().ok().filter(|algorithm| known.contains(algorithm)).map(Self).ok_or_else(|| {
            let why = match text.as_str() {
                "none" => "is no signature",
                "HS256" | "HS384" | "HS512" => "needs the issuer's secret, and is refused",
                _ => "is not known",
            };
            format!("algorithm {text:?} {why}: use some of {known:?}")
        })
    }
}
