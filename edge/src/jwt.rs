//! JSON Web Tokens of one issuer (RFC 7519), with the rules of RFC 8725: the file says which algorithms are taken, and
//! a key is only ever used with those it is made for.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use http::{HeaderMap, HeaderValue, header};
use jsonwebtoken::{Algorithm, decode, decode_header, errors::ErrorKind};
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::jwks::{Key, Keys, LEEWAY_S};

/// Longest token that is looked at, in bytes: what fits into any server's header limits.
const MAX_TOKEN: usize = 8 * 1024;

/// What a token may say that it is; it need not say.
const TYPES: [&str; 2] = ["JWT", "at+jwt"];
/// Longest subject, in bytes: it goes into a header and into the limiter's memory.
const MAX_SUBJECT: usize = 256;

/// Tokens that are remembered as good: a check costs far more than a look.
const MAX_REMEMBERED: usize = 10_000;
/// Keys that are tried for a token that does not say by which it was signed.
const MAX_TRIED: usize = 4;

/// Verifies tokens with the keys of one issuer.
pub(crate) struct Verifier {
    keys: Arc<Keys>,
    /// The claims that routes ask for.
    wanted: BTreeSet<String>,
    good: Mutex<HashMap<[u8; 32], Good>>,
}

/// A token that was verified, and until when it is good.
#[derive(Debug, Clone)]
struct Good {
    claims: Claims,
    until: u64,
    /// The edition of the issuer's keys that it was verified with: one of them may be withdrawn.
    edition: u64,
}

/// Who a good token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claims {
    /// `sub`: visible ASCII, at most 256 bytes.
    pub(crate) subject: String,
    /// Name for limits, logs and `starling-consumer`: `jwt:` and the subject, so that no subject can pass for the
    /// consumer of an API key, whose name has no colon.
    pub(crate) consumer: String,
    /// `scope` (RFC 9068 §2.2.3) or `scp`, which some issuers say instead.
    pub(crate) scopes: Vec<String>,
    /// Others that a route asks for, by the name that it uses.
    pub(crate) others: BTreeMap<String, Value>,
}

impl Claims {
    /// The first scope that is missing.
    pub(crate) fn lacks<'a>(&self, scopes: &'a [String]) -> Option<&'a str> {
        scopes.iter().find(|scope| !self.scopes.contains(scope)).map(String::as_str)
    }

    /// Whether a claim has one of these values: as itself, or in its list.
    pub(crate) fn has(&self, claim: &str, values: &[String]) -> bool {
        let is_one = |value: &Value| text_of(value).is_some_and(|text| values.contains(&text));
        match self.others.get(claim) {
            Some(Value::Array(list)) => list.iter().any(is_one),
            Some(value) => is_one(value),
            None => false,
        }
    }

    /// A claim as a field carries it: a list with commas between. `None` if it is not there, or none that a field can carry, such as a
    /// list with a comma in what it lists.
    pub(crate) fn field(&self, claim: &str) -> Option<HeaderValue> {
        let text = match self.others.get(claim)? {
            Value::Array(list) => {
                let texts = list.iter().map(|value| text_of(value).filter(|text| !text.contains(',')));
                texts.collect::<Option<Vec<_>>>()?.join(",")
            }
            value => text_of(value)?,
        };
        HeaderValue::from_bytes(text.as_bytes()).ok()
    }
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(bool) => Some(bool.to_string()),
        _ => None,
    }
}

/// A claim by its name; or, if there is none of it, by the names on the way to it, with dots between.
fn claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    if let Some(value) = claims.get(name) {
        return Some(value);
    }
    let (first, rest) = name.split_once('.')?;
    claim(claims.get(first)?.as_object()?, rest)
}

/// Why a token is not taken. The text is for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JwtError {
    /// More than 8 KiB.
    #[error("the token is too long")]
    TooLong,
    /// Not a signed token, or claims of a wrong type.
    #[error("the token is malformed")]
    Malformed,
    /// No key has its `kid`.
    #[error("the token is signed with an unknown key")]
    UnknownKey,
    /// Made for something else.
    #[error("the token is no access token")]
    Type,
    /// Not in the list, or not for that key.
    #[error("the token's algorithm is not accepted")]
    Algorithm,
    /// Does not verify.
    #[error("the token's signature is wrong")]
    Signature,
    /// `exp` has passed.
    #[error("the token has expired")]
    Expired,
    /// `nbf` has not.
    #[error("the token is not valid yet")]
    NotYet,
    /// `iss` is another.
    #[error("the token is from another issuer")]
    Issuer,
    /// `aud` does not have us.
    #[error("the token is for another audience")]
    Audience,
    /// No `exp`, `iss`, `aud` or `sub`.
    #[error("the token lacks the claim {0}")]
    Missing(&'static str),
    /// Cannot stand in a header.
    #[error("the token's sub is not usable: 1 to 256 visible ASCII characters without spaces")]
    Subject,
}

impl JwtError {
    /// The value of WWW-Authenticate for the 401 (RFC 6750 §3).
    pub(crate) fn challenge(self) -> HeaderValue {
        HeaderValue::try_from(format!("Bearer error=\"invalid_token\", error_description=\"{self}\""))
            .unwrap_or(HeaderValue::from_static("Bearer error=\"invalid_token\""))
    }
}

impl From<jsonwebtoken::errors::Error> for JwtError {
    fn from(error: jsonwebtoken::errors::Error) -> Self {
        match error.kind() {
            ErrorKind::InvalidSignature => Self::Signature,
            ErrorKind::InvalidAlgorithm | ErrorKind::MissingAlgorithm => Self::Algorithm,
            ErrorKind::ExpiredSignature => Self::Expired,
            ErrorKind::ImmatureSignature => Self::NotYet,
            ErrorKind::InvalidIssuer => Self::Issuer,
            ErrorKind::InvalidAudience => Self::Audience,
            ErrorKind::MissingRequiredClaim(claim) => {
                let known = ["exp", "iss", "aud", "sub"].into_iter().find(|known| known == claim);
                Self::Missing(known.unwrap_or("that its issuer should set"))
            }
            _ => Self::Malformed,
        }
    }
}

/// The claims we read beside those that the library checks.
struct Raw {
    sub: Option<String>,
    scopes: Vec<String>,
    /// Of them, the library checks type and presence of `exp`.
    all: Map<String, Value>,
}

impl TryFrom<Map<String, Value>> for Raw {
    type Error = serde_json::Error;

    fn try_from(all: Map<String, Value>) -> Result<Self, serde_json::Error> {
        let text = |name: &str| all.get(name).map(Option::<String>::deserialize).transpose().map(Option::flatten);
        // The library would take a list of issuers with ours in it; RFC 7519 §4.1.1 knows one.
        text("iss")?;
        let scopes = |name: &str| all.get(name).map(Option::<Scopes>::deserialize).transpose().map(Option::flatten);
        let (scope, scp) = (scopes("scope")?, scopes("scp")?);
        Ok(Self { sub: text("sub")?, scopes: scope.or(scp).map(Vec::from).unwrap_or_default(), all })
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scopes {
    Text(String),
    List(Vec<String>),
}

impl From<Scopes> for Vec<String> {
    fn from(scopes: Scopes) -> Self {
        match scopes {
            Scopes::Text(text) => text.split_ascii_whitespace().map(str::to_owned).collect(),
            Scopes::List(list) => list,
        }
    }
}

impl Verifier {
    /// With these keys; `wanted` are claims that are to be told, by name.
    pub(crate) fn new(keys: Arc<Keys>, wanted: BTreeSet<String>) -> Self {
        Self { keys, wanted, good: Mutex::default() }
    }

    /// The keys that it verifies with.
    pub(crate) fn keys(&self) -> &Arc<Keys> {
        &self.keys
    }

    /// Checks a token as it stands after `Bearer`: signature, issuer, audience, and time with 30 s of leeway.
    pub(crate) fn verify(&self, token: &str) -> Result<Claims, JwtError> {
        if token.len() > MAX_TOKEN {
            return Err(JwtError::TooLong);
        }
        let header = decode_header(token).map_err(|_| JwtError::Malformed)?;
        // RFC 7515 §4.1.11: we know no extension, so none may be critical.
        if header.crit.is_some() {
            return Err(JwtError::Malformed);
        }
        // RFC 8725 §3.11: a token that says that it is another kind of thing (an ID token's logout, a DPoP proof) is not taken.
        let kind = header.typ.as_deref().map(|typ| typ.strip_prefix("application/").unwrap_or(typ));
        if kind.is_some_and(|kind| !TYPES.iter().any(|known| kind.eq_ignore_ascii_case(known))) {
            return Err(JwtError::Type);
        }
        let mut outcome = Err(JwtError::UnknownKey);
        let (edition, keys) = (self.keys.edition(), self.keys.current());
        for key in candidates(&keys, header.kid.as_deref(), header.alg)? {
            outcome = decode::<Map<String, Value>>(token, &key.decoding, &key.validation).map_err(JwtError::from);
            // Of several that may be meant, the one that signed it tells.
            if !matches!(outcome, Err(JwtError::Signature)) {
                break;
            }
        }
        let Raw { sub, scopes, all } = Raw::try_from(outcome?.claims).map_err(|_| JwtError::Malformed)?;
        let subject = sub.ok_or(JwtError::Missing("sub"))?;
        if !(1..=MAX_SUBJECT).contains(&subject.len()) || !subject.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(JwtError::Subject);
        }
        let told = self.wanted.iter().filter_map(|name| Some((name.clone(), claim(&all, name)?.clone())));
        let claims = Claims { consumer: format!("jwt:{subject}"), subject, scopes, others: told.collect() };
        if let Some(exp) = all.get("exp").and_then(Value::as_f64) {
            self.remember(token, &claims, (exp as u64).saturating_add(LEEWAY_S), edition);
        }
        Ok(claims)
    }

    /// Whether a token that was not taken may be signed with a key that the issuer has only just published.
    pub(crate) fn may_be_of_a_new_key(&self, token: &str, error: JwtError) -> bool {
        match error {
            JwtError::UnknownKey => self.keys.are_fetched(),
            // Of the keys without a name, one was tried in place of the one that is meant.
            JwtError::Signature | JwtError::Algorithm => {
                let id = key_id(token);
                self.keys.are_fetched() && !self.keys.current().iter().any(|key| key.id.is_some() && key.id == id)
            }
            _ => false,
        }
    }

    /// Asks the issuer once more for its keys, and checks a token again; `None` if it could not be asked now.
    pub(crate) async fn verify_again(&self, token: &str) -> Option<Result<Claims, JwtError>> {
        self.keys.look_for(key_id(token).as_deref()).await.then(|| self.verify(token))
    }

    /// What a token says that was verified before, and still holds.
    pub(crate) fn remembered(&self, token: &str) -> Option<Claims> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let digest = digest(token);
        let good = self.good.lock().unwrap_or_else(PoisonError::into_inner);
        let known = good.get(&digest)?;
        let holds = starling_node::unix_now() <= known.until && known.edition == self.keys.edition();
        holds.then(|| known.claims.clone())
    }

    fn remember(&self, token: &str, claims: &Claims, until: u64, edition: u64) {
        let mut good = self.good.lock().unwrap_or_else(PoisonError::into_inner);
        if good.len() >= MAX_REMEMBERED {
            let now = starling_node::unix_now();
            good.retain(|_, known| known.until > now);
            if good.len() >= MAX_REMEMBERED {
                good.clear();
            }
        }
        good.insert(digest(token), Good { claims: claims.clone(), until, edition });
    }
}

/// The keys that may have signed a token: those of its id, or else those that have none; any, if it names none (RFC 7515
/// §4.1.4, RFC 7517 §4.5). Nothing else in a token's header (`jwk`, `jku`, `x5u`) has a say.
fn candidates<'a>(keys: &'a [Key], id: Option<&str>, algorithm: Algorithm) -> Result<Vec<&'a Key>, JwtError> {
    let of_id = |wanted: Option<&str>| -> Vec<&Key> { keys.iter().filter(|key| key.id.as_deref() == wanted).collect() };
    let candidates = match id {
        None => keys.iter().collect(),
        Some(id) => Some(of_id(Some(id))).filter(|keys| !keys.is_empty()).unwrap_or_else(|| of_id(None)),
    };
    if candidates.is_empty() {
        return Err(JwtError::UnknownKey);
    }
    let fitting = candidates.into_iter().filter(|key| key.validation.algorithms.contains(&algorithm));
    let fitting: Vec<&Key> = fitting.take(MAX_TRIED).collect();
    if fitting.is_empty() { Err(JwtError::Algorithm) } else { Ok(fitting) }
}

/// By which key a token says that it was signed, if it is one at all.
fn key_id(token: &str) -> Option<String> {
    decode_header(token).ok()?.kid
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// The bearer token of a request (RFC 6750 §2.1); `None` if it has no Authorization or one of another scheme.
///
/// The error says why a request is to be refused: more than one Authorization, or one that is not text.
pub(crate) fn bearer(headers: &HeaderMap) -> Result<Option<&str>, &'static str> {
    let mut fields = headers.get_all(header::AUTHORIZATION).iter();
    let Some(field) = fields.next() else { return Ok(None) };
    if fields.next().is_some() {
        return Err("more than one Authorization");
    }
    let field = field.to_str().map_err(|_| "Authorization is not text")?.trim();
    let (scheme, token) = field.split_once(' ').unwrap_or((field, ""));
    match (scheme.eq_ignore_ascii_case("bearer"), token.trim_start()) {
        (false, _) => Ok(None),
        (true, "") => Err("Authorization has no token"),
        (true, token) => Ok(Some(token)),
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use jsonwebtoken::{EncodingKey, Header, encode, get_current_timestamp, jwk::Jwk};
    use serde_json::json;

    use super::*;

    /// An issuer with an RSA and an EC key, and the file it publishes.
    struct Issuer {
        rsa: EncodingKey,
        ec: EncodingKey,
        rsa_public_pem: String,
        dir: tempfile::TempDir,
    }

    impl Issuer {
        fn new() -> Self {
            let rsa = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
            let ec = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
            let rsa_public_pem = rsa.public_key_pem();
            // The library wants PKCS#1, which is PKCS#8 of a 2048-bit key without its first 26 bytes.
            let rsa = EncodingKey::from_rsa_der(&rsa.serialize_der()[26..]);
            let ec = EncodingKey::from_ec_der(&ec.serialize_der());
            Self { rsa, ec, rsa_public_pem, dir: tempfile::tempdir().unwrap() }
        }

        fn jwk(key: &EncodingKey, algorithm: Algorithm, id: Option<&str>) -> Value {
            let mut jwk = Jwk::from_encoding_key(key, algorithm).unwrap();
            jwk.common.key_id = id.map(str::to_owned);
            serde_json::to_value(jwk).unwrap()
        }

        fn both(&self) -> Value {
            json!([Self::jwk(&self.rsa, Algorithm::RS256, Some("r")), Self::jwk(&self.ec, Algorithm::ES256, Some("e"))])
        }

        fn load(&self, keys: Value, algorithms: &[&str]) -> Result<Verifier, String> {
            let file = self.dir.path().join("jwks.json");
            std::fs::write(&file, json!({ "keys": keys }).to_string()).unwrap();
            let config = json!({
                "issuer": "https://id.example.com/",
                "audience": ["api", "api2"],
                "jwks": file,
                "algorithms": algorithms,
            });
            let wanted = ["tenant", "realm.roles", "level", "scope"].map(str::to_owned);
            let keys = Keys::of_file(&serde_json::from_value(config).unwrap());
            keys.map(|keys| Verifier::new(Arc::new(keys), wanted.into()))
        }
    }

    fn claims() -> Value {
        let exp = get_current_timestamp() + 60;
        json!({ "iss": "https://id.example.com/", "aud": "api", "sub": "alice", "exp": exp, "scope": "read write" })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut claims = claims();
        claims[key] = value;
        claims
    }

    fn without(key: &str) -> Value {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(key);
        claims
    }

    fn sign(algorithm: Algorithm, id: Option<&str>, key: &EncodingKey, claims: &Value) -> String {
        let header = Header { kid: id.map(str::to_owned), ..Header::new(algorithm) };
        encode(&header, claims, key).unwrap()
    }

    #[test]
    fn good_tokens_of_both_kinds() {
        let issuer = Issuer::new();
        let verifier = issuer.load(issuer.both(), &["RS256", "ES256"]).unwrap();
        let want = Claims {
            subject: "alice".into(),
            consumer: "jwt:alice".into(),
            scopes: vec!["read".into(), "write".into()],
            others: [("scope".to_owned(), json!("read write"))].into(),
        };
        assert_eq!(verifier.verify(&sign(Algorithm::RS256, Some("r"), &issuer.rsa, &claims())), Ok(want.clone()));
        let token = sign(Algorithm::ES256, Some("e"), &issuer.ec, &claims());
        assert_eq!(verifier.remembered(&token), None);
        assert_eq!(verifier.verify(&token), Ok(want.clone()));
        assert_eq!(verifier.remembered(&token), Some(want.clone()));
        // Without an id, it is one of the keys that the algorithm fits; a key without one may be meant by any id.
        assert_eq!(verifier.verify(&sign(Algorithm::ES256, None, &issuer.ec, &claims())), Ok(want.clone()));
        let nameless = json!([Issuer::jwk(&issuer.ec, Algorithm::ES256, None)]);
        let nameless = issuer.load(nameless, &["ES256"]).unwrap();
        assert_eq!(nameless.verify(&sign(Algorithm::ES256, Some("e"), &issuer.ec, &claims())), Ok(want));

        let scopes = |claims| verifier.verify(&sign(Algorithm::ES256, Some("e"), &issuer.ec, &claims)).unwrap().scopes;
        assert_eq!(scopes(without("scope")), [""; 0]);
        assert_eq!(scopes(with("scope", json!(["a", "b"]))), ["a", "b"]);
    }

    #[test]
    fn claims_that_routes_ask_for() {
        let issuer = Issuer::new();
        let verifier = issuer.load(issuer.both(), &["ES256"]).unwrap();
        let mut claims = with("tenant", json!("acme"));
        claims["realm"] = json!({"roles": ["admin", "reader"]});
        claims["level"] = json!(3);
        claims["unasked"] = json!("x".repeat(1000));
        let told = verifier.verify(&sign(Algorithm::ES256, Some("e"), &issuer.ec, &claims)).unwrap();
        let values = |values: &[&str]| values.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
        assert_eq!(told.others.len(), 4, "what nobody asks for is not kept");
        assert!(told.has("tenant", &values(&["other", "acme"])) && !told.has("tenant", &values(&["acm"])));
        assert!(told.has("realm.roles", &values(&["reader"])) && !told.has("realm.roles", &values(&["read"])));
        assert!(told.has("level", &values(&["3"])) && !told.has("unasked", &values(&["x"])));
        assert_eq!(told.field("realm.roles").unwrap(), "admin,reader");
        assert_eq!((told.field("level").unwrap().to_str().unwrap(), told.field("unasked")), ("3", None));
        assert_eq!((told.lacks(&values(&["read", "pay"])), told.lacks(&values(&["read"]))), (Some("pay"), None));
        let mut joined = claims.clone();
        joined["realm"] = json!({"roles": ["reader,admin"]});
        let joined = verifier.verify(&sign(Algorithm::ES256, Some("e"), &issuer.ec, &joined)).unwrap();
        assert_eq!((joined.field("realm.roles"), joined.has("realm.roles", &values(&["admin"]))), (None, false));
        assert_eq!(told.field("scope").unwrap(), "read write");
        let smuggled =
            verifier.verify(&sign(Algorithm::ES256, Some("e"), &issuer.ec, &with("tenant", json!("a\r\nb"))));
        assert_eq!(smuggled.unwrap().field("tenant"), None);
    }

    #[test]
    fn claims_that_are_not_taken() {
        let issuer = Issuer::new();
        let verifier = issuer.load(issuer.both(), &["ES256"]).unwrap();
        let now = get_current_timestamp();
        for (claims, want) in [
            (with("exp", json!(now - 31)), Err(JwtError::Expired)),
            (with("exp", json!(now - 20)), Ok("alice")),
            (with("exp", json!(0)), Err(JwtError::Expired)),
            (with("exp", json!("soon")), Err(JwtError::Missing("exp"))),
            (with("exp", json!(-5)), Err(JwtError::Missing("exp"))),
            (without("exp"), Err(JwtError::Missing("exp"))),
            (with("nbf", json!(now + 90)), Err(JwtError::NotYet)),
            (with("nbf", json!(now + 20)), Ok("alice")),
            (with("nbf", json!("later")), Err(JwtError::Malformed)),
            (with("iss", json!("https://id.example.com")), Err(JwtError::Issuer)),
            (with("iss", json!(["https://id.example.com/", "evil"])), Err(JwtError::Malformed)),
            (without("iss"), Err(JwtError::Missing("iss"))),
            (with("aud", json!("other")), Err(JwtError::Audience)),
            (with("aud", json!(["other", "api2"])), Ok("alice")),
            (with("aud", json!([])), Err(JwtError::Audience)),
            (without("aud"), Err(JwtError::Missing("aud"))),
            (without("sub"), Err(JwtError::Missing("sub"))),
            (with("sub", json!(7)), Err(JwtError::Missing("sub"))),
            (with("sub", json!("")), Err(JwtError::Subject)),
            (with("sub", json!("a b")), Err(JwtError::Subject)),
            (with("sub", json!("a\r\nb")), Err(JwtError::Subject)),
            (with("sub", json!("a".repeat(257))), Err(JwtError::Subject)),
            (with("sub", json!("auth0|1@x")), Ok("auth0|1@x")),
        ] {
            let got = verifier.verify(&sign(Algorithm::ES256, Some("e"), &issuer.ec, &claims));
            assert_eq!(got.map(|claims| claims.subject), want.map(str::to_owned), "{claims}");
        }
    }

    #[test]
    fn signatures_that_are_not_taken() {
        let (issuer, stranger) = (Issuer::new(), Issuer::new());
        let verifier = issuer.load(issuer.both(), &["RS256", "ES256"]).unwrap();
        let good = sign(Algorithm::ES256, Some("e"), &issuer.ec, &claims());
        let parts: Vec<&str> = good.split('.').collect();
        let encoded = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let (body, signature) = (parts[1], parts[2]);
        let hmac = |key: &[u8], id| sign(Algorithm::HS256, id, &EncodingKey::from_secret(key), &claims());
        let pem = issuer.rsa_public_pem.as_bytes();
        let own_jwk = Issuer::jwk(&stranger.ec, Algorithm::ES256, Some("e"));
        let self_made = Header {
            kid: Some("e".into()),
            jwk: Some(serde_json::from_value(own_jwk).unwrap()),
            ..Header::new(Algorithm::ES256)
        };
        let critical =
            Header { kid: Some("e".into()), crit: Some(vec!["b64".into()]), ..Header::new(Algorithm::ES256) };

        for (what, token, want) in [
            ("none", format!("{}.{body}.", encoded(json!({"alg": "none"}))), JwtError::Malformed),
            ("None", format!("{}.{body}.", encoded(json!({"alg": "None", "kid": "e"}))), JwtError::Malformed),
            (
                "none, signed",
                format!("{}.{body}.{signature}", encoded(json!({"alg": "none", "kid": "e"}))),
                JwtError::Malformed,
            ),
            ("no signature", format!("{}.{body}.", parts[0]), JwtError::Signature),
            ("HMAC with the public key", hmac(pem, Some("r")), JwtError::Algorithm),
            ("HMAC with the public key, no kid", hmac(pem, None), JwtError::Algorithm),
            ("HMAC with nothing", hmac(b"", Some("e")), JwtError::Algorithm),
            ("RSA for the EC key", sign(Algorithm::RS256, Some("e"), &issuer.rsa, &claims()), JwtError::Algorithm),
            ("not in the list", sign(Algorithm::RS512, Some("r"), &issuer.rsa, &claims()), JwtError::Algorithm),
            ("PSS for a PKCS#1 key", sign(Algorithm::PS256, Some("r"), &issuer.rsa, &claims()), JwtError::Algorithm),
            ("unknown kid", sign(Algorithm::ES256, Some("x"), &issuer.ec, &claims()), JwtError::UnknownKey),
            (
                "path as kid",
                sign(Algorithm::ES256, Some("../../dev/null"), &issuer.ec, &claims()),
                JwtError::UnknownKey,
            ),
            ("empty kid", sign(Algorithm::ES256, Some(""), &issuer.ec, &claims()), JwtError::UnknownKey),
            ("no kid, a stranger's key", sign(Algorithm::ES256, None, &stranger.ec, &claims()), JwtError::Signature),
            ("a stranger's key", sign(Algorithm::ES256, Some("e"), &stranger.ec, &claims()), JwtError::Signature),
            ("a stranger's RSA key", sign(Algorithm::RS256, Some("r"), &stranger.rsa, &claims()), JwtError::Signature),
            ("key in the header", encode(&self_made, &claims(), &stranger.ec).unwrap(), JwtError::Signature),
            ("critical extension", encode(&critical, &claims(), &issuer.ec).unwrap(), JwtError::Malformed),
            (
                "tampered",
                format!("{}.{}.{signature}", parts[0], encoded(with("sub", json!("bob")))),
                JwtError::Signature,
            ),
            ("oversize", format!("{good}{}", "A".repeat(1 << 20)), JwtError::TooLong),
            ("four parts", format!("{good}.a"), JwtError::Malformed),
            ("two parts", format!("{}.{body}", parts[0]), JwtError::Malformed),
            ("nothing", String::new(), JwtError::Malformed),
        ] {
            assert_eq!(verifier.verify(&token), Err(want), "{what}");
        }
    }

    #[test]
    fn which_keys_are_taken() {
        let issuer = Issuer::new();
        let (rsa, ec) =
            (Issuer::jwk(&issuer.rsa, Algorithm::RS256, Some("r")), Issuer::jwk(&issuer.ec, Algorithm::ES256, None));
        let edited = |jwk: &Value, key: &str, value: Value| {
            let mut jwk = jwk.clone();
            jwk[key] = value;
            jwk
        };
        let token = sign(Algorithm::ES256, None, &issuer.ec, &claims());
        let only = issuer.load(json!([ec]), &["ES256"]).unwrap();
        assert!(only.verify(&token).is_ok(), "the only key needs no kid");

        let secret = json!({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"});
        let odd = json!({"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"});
        let mixed = issuer.load(json!([secret, odd, ec]), &["ES256"]).unwrap();
        assert!(mixed.verify(&token).is_ok(), "keys of no use are left out");

        let mut anonymous = rsa.clone();
        anonymous.as_object_mut().unwrap().remove("alg");
        let any = issuer.load(json!([anonymous]), &["RS256", "PS256"]).unwrap();
        for algorithm in [Algorithm::RS256, Algorithm::PS256] {
            assert!(any.verify(&sign(algorithm, Some("r"), &issuer.rsa, &claims())).is_ok(), "{algorithm:?}");
        }

        for (keys, algorithms, want) in [
            (json!([]), ["ES256"], "has no public key for ES256"),
            (json!([rsa]), ["ES256"], "has no public key"),
            (json!([secret]), ["RS256"], "has no public key"),
            (json!([edited(&rsa, "use", json!("enc"))]), ["RS256"], "has no public key"),
            (json!([edited(&rsa, "key_ops", json!(["encrypt"]))]), ["RS256"], "has no public key"),
            (json!([edited(&rsa, "n", json!("*"))]), ["RS256"], "is broken"),
            (json!("x"), ["RS256"], "is not a JWK Set"),
        ] {
            let error = issuer.load(keys.clone(), &algorithms).err().unwrap();
            assert!(error.contains(want), "{keys} gave {error}");
        }
    }

    #[test]
    fn a_challenge_says_why() {
        let want = "Bearer error=\"invalid_token\", error_description=\"the token has expired\"";
        assert_eq!(JwtError::Expired.challenge(), want);
    }

    #[test]
    fn one_bearer_token() {
        let bearer = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            bearer(&headers).map(|token| token.map(str::to_owned))
        };
        let some = |token: &str| Ok(Some(token.to_owned()));
        for (values, want) in [
            (&[][..], Ok(None)),
            (&["Bearer a.b.c"], some("a.b.c")),
            (&["BEARER  a.b.c "], some("a.b.c")),
            (&["Basic a"], Ok(None)),
            (&["Bearera"], Ok(None)),
            (&["Bearer"], Err("Authorization has no token")),
            (&["Bearer a", "Basic b"], Err("more than one Authorization")),
        ] {
            assert_eq!(bearer(values), want, "{values:?}");
        }
    }
}
