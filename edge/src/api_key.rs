//! API keys: made once, shown once, kept as a hash.

use http::{HeaderMap, HeaderName};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

use crate::{
    config::{LABEL, is_label},
    jwt::bearer,
};

/// How every key starts, so that people and secret scanners know one when they see it.
const PREFIX: &str = "sk_";

/// Bytes of an id; in hex in the key.
const ID_BYTES: usize = 6;

/// Bytes of a secret; in hex in the key, since hex has no `_` that could be taken for the separator.
const SECRET_BYTES: usize = 32;

const FIELD: HeaderName = HeaderName::from_static("x-api-key");

/// All keys of an edge, by id: what `keys.json` has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeyStore {
    /// Of the file's form.
    #[serde(default)]
    version: u32,
    /// In the order of their ids, each id once.
    #[serde(deserialize_with = "sorted")]
    keys: Vec<StoredKey>,
}

impl Default for KeyStore {
    fn default() -> Self {
        Self { version: VERSION, keys: Vec::new() }
    }
}

/// The form of `keys.json` that this version writes.
const VERSION: u32 = 1;

/// Why `keys.json` is not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParseError {
    /// Not what it should be.
    #[error(transparent)]
    Json(serde_json::Error),
    /// Of a later version.
    #[error("it was written by a newer version")]
    Newer,
}

/// What is kept of a key. The secret is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredKey {
    /// The part of the key that names it.
    pub(crate) id: KeyId,
    /// Whose it is.
    pub(crate) consumer: Consumer,
    /// Plan that holds for it in place of the route's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) plan: Option<String>,
    /// When it was made, in seconds since 1970.
    pub(crate) created: u64,
    /// SHA-256 of the secret as it stands in the key.
    hash: Hash,
}

/// Names a key: 12 hex digits in lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct KeyId(String);

impl KeyId {
    /// The id as text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for KeyId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if is_hex(&text, ID_BYTES) {
            Ok(Self(text))
        } else {
            Err(format!("{text:?} is not a key id: 12 of 0-9 and a-f"))
        }
    }
}

/// Who calls: 1 to 64 of `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Consumer(String);

impl std::fmt::Display for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for Consumer {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if is_label(&text) { Ok(Self(text)) } else { Err(format!("{text:?} is not a consumer name: {LABEL}")) }
    }
}

impl std::str::FromStr for Consumer {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.to_owned().try_into()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hash([u8; 32]);

impl Hash {
    fn of(secret: &str) -> Self {
        Self(Sha256::digest(secret).into())
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let mut hash = [0; 32];
        if !is_hex(&text, hash.len()) {
            return Err(de::Error::custom("hash is not 64 hex digits in lower case"));
        }
        for (byte, at) in hash.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(de::Error::custom)?;
        }
        Ok(Self(hash))
    }
}

fn sorted<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<StoredKey>, D::Error> {
    let mut keys = Vec::<StoredKey>::deserialize(d)?;
    keys.sort_by(|a, b| a.id.cmp(&b.id));
    match keys.windows(2).find(|pair| pair[0].id == pair[1].id) {
        Some(pair) => Err(de::Error::custom(format!("key {} is there twice", pair[0].id))),
        None => Ok(keys),
    }
}

impl KeyStore {
    /// Reads a document. The error says what is wrong with it and where.
    pub(crate) fn parse(document: &[u8]) -> Result<Self, ParseError> {
        // First the version: a later form may have fields that are not known here, and must not be written back without.
        #[derive(Deserialize)]
        struct Version {
            #[serde(default)]
            version: u32,
        }
        let Version { version } = serde_json::from_slice(document).map_err(ParseError::Json)?;
        if version > VERSION {
            return Err(ParseError::Newer);
        }
        let store: Self = serde_json::from_slice(document).map_err(ParseError::Json)?;
        Ok(Self { version: VERSION, ..store })
    }

    /// The document: JSON for people to read, with a line end. It opens no door, but names all consumers.
    pub(crate) fn serialize(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut document = serde_json::to_vec_pretty(self)?;
        document.push(b'\n');
        Ok(document)
    }

    /// All keys, by id.
    pub(crate) fn keys(&self) -> &[StoredKey] {
        &self.keys
    }

    /// Makes a key and keeps its hash. The text returned is the key itself: it cannot be had again.
    pub(crate) fn create(&mut self, consumer: Consumer, plan: Option<String>, now_unix: u64) -> (StoredKey, String) {
        let (id, at) = loop {
            let id = KeyId(hex(&rand::random::<[u8; ID_BYTES]>()));
            if let Err(at) = self.keys.binary_search_by(|key| key.id.cmp(&id)) {
                break (id, at);
            }
        };
        let secret = hex(&rand::random::<[u8; SECRET_BYTES]>());
        let text = format!("{PREFIX}{id}_{secret}");
        let key = StoredKey { id, consumer, plan, created: now_unix, hash: Hash::of(&secret) };
        self.keys.insert(at, key.clone());
        (key, text)
    }

    /// Forgets a key. Returns whether it was there.
    pub(crate) fn revoke(&mut self, id: &str) -> bool {
        let at = self.position(id);
        at.map(|at| self.keys.remove(at)).is_some()
    }

    /// The key that a caller presents, if it is one of ours and the secret is right.
    ///
    /// The time this takes tells nothing of a secret, and does not depend on whether the id is known.
    pub(crate) fn verify(&self, presented: &str) -> Option<&StoredKey> {
        let (id, secret) = presented.strip_prefix(PREFIX)?.split_once('_')?;
        if !is_hex(id, ID_BYTES) || !is_hex(secret, SECRET_BYTES) {
            return None;
        }
        let key = self.position(id).map(|at| &self.keys[at]);
        let expected = key.map_or([0; 32], |key| key.hash.0);
        let same = bool::from(Hash::of(secret).0.ct_eq(&expected));
        key.filter(|_| same)
    }

    fn position(&self, id: &str) -> Option<usize> {
        self.keys.binary_search_by(|key| key.id.as_str().cmp(id)).ok()
    }
}

/// The API key that a request carries, in `x-api-key` or as a bearer token that starts with `sk_`; `None` if there is
/// none.
///
/// The error says why a request is to be refused that carries more than one, or something that is not text. A key in a
/// query is never looked for: it would be in every log on the way.
pub(crate) fn presented(headers: &HeaderMap) -> Result<Option<&str>, &'static str> {
    let mut fields = headers.get_all(FIELD).iter();
    let field = fields.next();
    if fields.next().is_some() {
        return Err("more than one x-api-key");
    }
    let field = field.map(|value| value.to_str().map_err(|_| "x-api-key is not text")).transpose()?;
    let bearer = bearer(headers)?.filter(|token| token.starts_with(PREFIX));
    match (field, bearer) {
        (Some(_), Some(_)) => Err("an API key both in x-api-key and in Authorization"),
        (field, bearer) => Ok(field.or(bearer)),
    }
}

/// Whether a bearer token means to be one of our keys, and is none of the issuer's.
pub(crate) fn is_api_key(token: &str) -> bool {
    token.starts_with(PREFIX)
}

fn is_hex(text: &str, bytes: usize) -> bool {
    text.len() == 2 * bytes && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|b| [b >> 4, b & 15]).filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn consumer(name: &str) -> Consumer {
        name.parse().unwrap()
    }

    #[test]
    fn a_key_opens_until_it_is_revoked() {
        let mut store = KeyStore::default();
        let keys: Vec<_> = (0..20).map(|i| store.create(consumer(&format!("c{i}")), None, i)).collect();
        for (key, text) in &keys {
            assert!(is_api_key(text) && text.len() == 3 + 12 + 1 + 64, "{text}");
            assert_eq!(store.verify(text), Some(key));
        }
        let (key, text) = &keys[7];
        assert!(store.revoke(key.id.as_str()));
        assert!(!store.revoke(key.id.as_str()));
        assert_eq!(store.verify(text), None);
        assert_eq!(store.keys().len(), 19);
    }

    #[test]
    fn what_is_almost_a_key_does_not_open() {
        let mut store = KeyStore::default();
        let (key, text) = store.create(consumer("acme"), None, 0);
        let (_, other) = store.create(consumer("other"), None, 0);
        let (id, secret) = text[3..].split_once('_').unwrap();
        let flipped = if secret.ends_with('0') { "1" } else { "0" };
        for wrong in [
            String::new(),
            "sk_".into(),
            format!("sk_{id}"),
            format!("sk_{id}_"),
            format!("sk_{id}_{}{flipped}", &secret[..63]),
            format!("sk_{id}_{}", &other[16..]),
            format!("sk_{}_{secret}", &other[3..15]),
            format!("sk_{}_{secret}", if id.starts_with('0') { "1".repeat(12) } else { "0".repeat(12) }),
            format!("sk_{id}_{secret}0"),
            format!("sk_{id}_{}", secret.to_uppercase().replace(|c: char| c.is_ascii_digit(), "A")),
            format!("SK_{id}_{secret}"),
            format!(" {text}"),
            // Neither the hash nor its preimage's neighbour is a secret.
            format!("sk_{id}_{}", hex(&key.hash.0)),
        ] {
            assert_eq!(store.verify(&wrong), None, "{wrong}");
        }
        assert_eq!(KeyStore::default().verify(&text), None);
        // The hash that stands in for a missing key is nobody's.
        assert_eq!(store.verify(&format!("sk_{}_{}", "f".repeat(12), "0".repeat(64))), None);
    }

    #[test]
    fn the_document_comes_back_and_has_no_secret() {
        let mut store = KeyStore::default();
        let (_, text) = store.create(consumer("acme"), Some("gold".into()), 1_700_000_000);
        store.create(consumer("b"), None, 0);
        let document = String::from_utf8(store.serialize().unwrap()).unwrap();
        assert!(!document.contains(&text[16..]));
        let again = KeyStore::parse(document.as_bytes()).unwrap();
        assert_eq!(again, store);
        assert_eq!(again.verify(&text).unwrap().plan.as_deref(), Some("gold"));

        let one = |id: &str, consumer: &str, hash: &str| {
            format!(r#"{{"id":"{id}","consumer":"{consumer}","created":0,"hash":"{hash}"}}"#)
        };
        let hash = "0".repeat(64);
        let (good, low) = (one("bbbbbbbbbbbb", "c", &hash), one("aaaaaaaaaaaa", "c", &hash));
        assert_eq!(
            KeyStore::parse(format!(r#"{{"keys":[{good},{low}]}}"#).as_bytes()).unwrap().keys()[0].id.as_str(),
            "aaaaaaaaaaaa"
        );
        for (keys, want) in [
            (format!("{good},{good}"), "there twice"),
            (one("BBBBBBBBBBBB", "c", &hash), "is not a key id"),
            (one("bbbbbbbbbbbb", "a b", &hash), "is not a consumer name"),
            (one("bbbbbbbbbbbb", "", &hash), "is not a consumer name"),
            (one("bbbbbbbbbbbb", "c", "00"), "64 hex digits"),
        ] {
            let error = KeyStore::parse(format!(r#"{{"keys":[{keys}]}}"#).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{keys} gave {error}");
        }
    }

    #[test]
    fn one_key_in_one_place() {
        let check = |fields: &[(&'static str, &'static str)]| {
            let mut all = HeaderMap::new();
            for (name, value) in fields {
                all.append(*name, http::HeaderValue::from_static(value));
            }
            presented(&all).map(|key| key.map(str::to_owned))
        };
        let some = |text: &str| Ok(Some(text.to_owned()));
        assert_eq!(check(&[]), Ok(None));
        assert_eq!(check(&[("x-api-key", "sk_a")]), some("sk_a"));
        assert_eq!(check(&[("authorization", "Bearer sk_a")]), some("sk_a"));
        assert_eq!(check(&[("authorization", "bearer  sk_a")]), some("sk_a"));
        assert_eq!(check(&[("authorization", "Bearer eyJ.a.b")]), Ok(None));
        assert_eq!(check(&[("authorization", "Basic sk_a")]), Ok(None));
        assert_eq!(check(&[("x-api-key", "sk_a"), ("authorization", "Bearer eyJ.a.b")]), some("sk_a"));
        for fields in [
            &[("x-api-key", "a"), ("x-api-key", "a")][..],
            &[("authorization", "Bearer sk_a"), ("authorization", "Bearer sk_a")],
            &[("x-api-key", "sk_a"), ("authorization", "Bearer sk_a")],
        ] {
            assert!(check(fields).is_err(), "{fields:?}");
        }
    }
}
