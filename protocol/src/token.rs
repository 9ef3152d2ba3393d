use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;

use crate::{
    InvalidName, MeshName, Name, NodeId, decode, encode,
    wire::{Unknown, Value, WireError, message, nested, once, take_array},
};

const PREFIX: &str = "stl1.";
/// The format of claims that this version writes.
const FORMAT: u8 = 1;
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
    /// Says something that this version cannot act upon.
    #[error("the join token was made by a newer version of starling; use that version here, too")]
    Newer,
}

/// What a token says. Everything here is covered by the issuer's secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClaims {
    /// The issuer that made the token and counts its uses.
    pub issuer: NodeId,
    /// Makes each token its own.
    pub id: [u8; 16],
    /// End, in unix seconds.
    pub expires: u64,
    /// The mesh.
    pub mesh: MeshName,
    /// SHA-256 of the root certificate (DER): the joiner trusts this root and no other.
    pub root: [u8; 32],
    /// How many nodes may join with it.
    pub uses: u32,
    /// What they may be.
    pub grants: Grants,
    /// Where to join, `host:port`, in the order to try.
    pub seeds: Vec<String>,
}

message!(TokenClaims, given (issuer: NodeId, id: [u8; 16], expires: u64) { 1 mesh, 2 root, 3 uses, 4 grants, 5 seeds });

impl TokenClaims {
    /// Prefix and fields.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(256);
        out.extend_from_slice(&self.issuer.0);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.expires.to_be_bytes());
        out.push(FORMAT);
        self.write_fields(&mut out);
        out.into()
    }

    /// Who made the token, by its prefix: all that is needed to carry it there, whatever else it says.
    pub fn peek_issuer(bytes: &[u8]) -> Result<NodeId, WireError> {
        let mut rest = bytes;
        take_array(&mut rest).map(NodeId)
    }

    /// Reads what anybody may read: unknown fields are passed over, unless they are critical.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        Self::read(bytes, Unknown::Ignored)
    }

    /// Reads what the issuer acts upon: it made the token, so it knows every field, or a newer version of it made it, and
    /// may have meant a restriction.
    pub fn decode_in_full(bytes: &[u8]) -> Result<Self, WireError> {
        Self::read(bytes, Unknown::Refused)
    }

    fn read(bytes: &[u8], unknown: Unknown) -> Result<Self, WireError> {
        let mut rest = bytes;
        let issuer = NodeId(take_array(&mut rest)?);
        let id = take_array(&mut rest)?;
        let expires = u64::from_be_bytes(take_array(&mut rest)?);
        match take_array(&mut rest)? {
            [FORMAT] => Self::read_fields(rest, unknown, issuer, id, expires),
            [format] => Err(WireError::NotUnderstood(format.into())),
        }
    }
}

/// What a token lets its bearer be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// Services that it may serve.
    pub services: Vec<Name>,
    /// Whether it may be an edge.
    pub edge: bool,
    /// Whether it may admit others.
    pub issuer: bool,
    /// Names that it may take; any, if there is none.
    pub names: Vec<NamePattern>,
    /// The zone that it stands in, and may say that it stands in; any, if empty.
    pub zone: String,
}

message!(Grants { 1 services, 2 edge, 3 issuer, 4 names, 5 zone });
nested!(Grants);

impl Grants {
    /// Whether a node of that name may join.
    pub fn admits_name(&self, name: &Name) -> bool {
        self.names.is_empty() || self.names.iter().any(|pattern| pattern.fits(name))
    }
}

/// A name, or, with `*` at its end, the beginning of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether that name is meant.
    pub fn fits(&self, name: &Name) -> bool {
        match self.0.strip_suffix('*') {
            Some(beginning) => name.as_str().starts_with(beginning),
            None => name.as_str() == self.0,
        }
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for NamePattern {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        match text.strip_suffix('*') {
            // A beginning is one of a name if some name begins so.
            Some(beginning) => format!("{beginning}x").parse::<Name>().map(|_| Self(text.into())),
            None => text.parse::<Name>().map(|_| Self(text.into())),
        }
    }
}

impl Value for NamePattern {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        self.0.put(tag, out);
    }
    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError> {
        let mut text: Option<String> = None;
        String::take(&mut text, value, unknown)?;
        let pattern = text.unwrap_or_default().parse().map_err(|e: InvalidName| WireError::Malformed(e.to_string()))?;
        once(slot, pattern)
    }
}

/// A join token: claims, and the secret that proves them. Whoever holds it can join; `Debug` does not print the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The claims exactly as the issuer encoded them: the proof covers these bytes.
    pub claims_bytes: Bytes,
    /// The same, decoded.
    pub claims: TokenClaims,
    /// HMAC-SHA256 of the claims under the issuer's token key.
    pub secret: [u8; 32],
}

/// What the text of a token holds.
struct Envelope {
    claims: Bytes,
    secret: [u8; 32],
}
message!(Envelope { 1 claims, 2 secret });

impl JoinToken {
    /// Puts a token together; `secret` must be the issuer's HMAC of [`TokenClaims::encode`].
    pub fn new(claims: TokenClaims, secret: [u8; 32]) -> Self {
        Self { claims_bytes: claims.encode(), claims, secret }
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let envelope = Envelope { claims: self.claims_bytes.clone(), secret: self.secret };
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(encode(&envelope)))
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
        let why = |error: WireError| match error {
            WireError::NotUnderstood(_) => TokenError::Newer,
            _ => TokenError::Damaged,
        };
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Damaged)?;
        let Envelope { claims: claims_bytes, secret } = decode(&bytes).map_err(why)?;
        let claims = TokenClaims::decode(&claims_bytes).map_err(why)?;
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
            grants: Grants {
                services: vec!["orders".parse().unwrap()],
                names: vec!["orders-*".parse().unwrap()],
                ..Grants::default()
            },
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
    fn names_are_bound_as_a_whole_or_by_their_beginning() {
        let grants = |patterns: &[&str]| Grants {
            names: patterns.iter().map(|pattern| pattern.parse().unwrap()).collect(),
            ..Grants::default()
        };
        for (patterns, name, admitted) in [
            (&[][..], "anything", true),
            (&["orders-*"], "orders-1", true),
            (&["orders-*"], "order", false),
            (&["orders"], "orders", true),
            (&["orders"], "orders-1", false),
            (&["a", "b*"], "bc", true),
            (&["*"], "anything", true),
        ] {
            assert_eq!(grants(patterns).admits_name(&name.parse().unwrap()), admitted, "{patterns:?} {name}");
        }
        for bad in ["", "-*", "a*b", "A*", "**"] {
            assert!(bad.parse::<NamePattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_newer_version_means_is_refused_by_who_acts_upon_it() {
        let claims = token().claims;
        assert_eq!(TokenClaims::decode_in_full(&claims.encode()), Ok(claims.clone()));
        let mut later = claims.encode().to_vec();
        let at = later.len();
        crate::wire::put_field(40, b"restriction", &mut later);
        assert_eq!(TokenClaims::decode(&later), Ok(claims));
        assert!(TokenClaims::decode_in_full(&later).is_err());
        later[at] |= 1;
        assert!(TokenClaims::decode(&later).is_err());
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
