use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::{MeshName, Name, NodeId, decode, encode};

const PREFIX: &str = "stl1.";
/// Longest token text that is looked at, in bytes.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// Why a text is not a token.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// Does not start as one.
    #[error("not a join token: it should start with {PREFIX:?}; make one with `starling token create`")]
    NotAToken,
    /// Starts as one, and is cut short or altered.
    #[error("the join token is incomplete or altered; copy it again, it is one line")]
    Damaged,
}

/// What a token says. Everything here is covered by the issuer's secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenClaims {
    /// The mesh.
    pub mesh: MeshName,
    /// SHA-256 of the root certificate (DER): the joiner trusts this root and no other.
    pub root: [u8; 32],
    /// The issuer that made the token and counts its uses.
    pub issuer: NodeId,
    /// Makes each token its own.
    pub id: [u8; 16],
    /// End, in unix seconds.
    pub expires: u64,
    /// How many nodes may join with it.
    pub uses: u32,
    /// What they may be.
    pub grants: Grants,
    /// Where to join, `host:port`, in the order to try.
    pub seeds: Vec<String>,
}

/// What a token lets its bearer be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// Services that it may serve.
    pub services: Vec<Name>,
    /// Whether it may be an edge.
    pub edge: bool,
    /// Whether it may admit others.
    pub issuer: bool,
}

/// A join token: claims, and the secret that proves them. Whoever holds it can join; `Debug` does not print the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The claims exactly as the issuer encoded them: the proof covers these bytes.
    pub claims_bytes: Vec<u8>,
    /// The same, decoded.
    pub claims: TokenClaims,
    /// HMAC-SHA256 of the claims under the issuer's token key.
    pub secret: [u8; 32],
}

impl JoinToken {
    /// Puts a token together; `secret` must be the issuer's HMAC of `encode(&claims)`.
    pub fn new(claims: TokenClaims, secret: [u8; 32]) -> Self {
        Self { claims_bytes: encode(&claims), claims, secret }
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(encode(&(&self.claims_bytes, &self.secret))))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("claims", &self.claims).finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if body.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Damaged);
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Damaged)?;
        let (claims_bytes, secret): (Vec<u8>, [u8; 32]) = decode(&bytes).map_err(|_| TokenError::Damaged)?;
        let claims = decode(&claims_bytes).map_err(|_| TokenError::Damaged)?;
        Ok(Self { claims_bytes, claims, secret })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        let claims = TokenClaims {
            mesh: "prod.example".parse().unwrap(),
            root: [1; 32],
            issuer: NodeId([2; 16]),
            id: [3; 16],
            expires: 1_800_000_000,
            uses: 1,
            grants: Grants { services: vec!["orders".parse().unwrap()], edge: false, issuer: false },
            seeds: vec!["10.0.0.1:7400".into()],
        };
        JoinToken::new(claims, [7; 32])
    }

    #[test]
    fn a_token_is_one_line_and_comes_back() {
        let text = token().to_string();
        assert!(text.starts_with("stl1.") && !text.contains(char::is_whitespace));
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), token());
    }

    #[test]
    fn damage_is_told_from_something_else() {
        let text = token().to_string();
        assert_eq!("hello".parse::<JoinToken>(), Err(TokenError::NotAToken));
        assert_eq!(text[..text.len() - 4].parse::<JoinToken>(), Err(TokenError::Damaged));
    }

    #[test]
    fn debug_hides_the_secret() {
        assert!(!format!("{:?}", token()).contains("7, 7"));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_read(text in "(stl1\\.)?[A-Za-z0-9_-]{0,200}") {
            let _ = text.parse::<JoinToken>();
        }
    }
}
