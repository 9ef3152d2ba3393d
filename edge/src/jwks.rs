//! The keys of an issuer of tokens, a JWK Set (RFC 7517 §5): from a file, or from its URL, fetched again and again for as long as
//! it is in use.
//!
//! The last keys that were fetched stay while the issuer is down, also over a restart. A token that names a key which is not among
//! them is reason to look at once, with everybody who has one waiting for the same look: an issuer may sign with a new key as soon
//! as it has published it. Whoever makes up keys can have that look made every few seconds, and no more.

use std::{
    collections::HashMap,
    fs,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Request, Response, StatusCode, Uri, header};
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse},
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use starling_node::{StateDir, unix_now, web::Web};
use tokio::sync::{Notify, Semaphore, watch};

use crate::config::{self, Jwks};

/// How far the issuer's clock may be off, in seconds.
pub(crate) const LEEWAY_S: u64 = 30;
/// How long an issuer may take to tell its keys.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest set, in bytes, and how many keys of it are used.
const MAX_SET_BYTES: usize = 256 << 10;
const MAX_KEYS: usize = 100;
/// How often keys are fetched, if the issuer does not say how long they hold; and within what it may say.
const REFRESH: Duration = Duration::from_secs(5 * 60);
const MIN_REFRESH: Duration = Duration::from_secs(60);
const MAX_REFRESH: Duration = Duration::from_secs(60 * 60);
/// The same after a failure: it doubles.
const MIN_RETRY: Duration = Duration::from_secs(5);
/// Pause between two looks for keys that are not known.
const BETWEEN_LOOKS: Duration = Duration::from_secs(3);
/// How long a token waits for such a look: for the pause, and then for the issuer.
const WAIT: Duration = Duration::from_secs(8);
/// Tokens that wait at a time.
const MAX_WAITING: usize = 1024;
/// For how long a key that was looked for in vain is not looked for again, and how many of these are remembered.
const UNKNOWN_FOR: Duration = Duration::from_secs(10);
const MAX_UNKNOWN: usize = 1000;

/// A key, and what it is good for.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) id: Option<String>,
    pub(crate) decoding: DecodingKey,
    /// Carries the algorithms: never empty, and all of the key's own type.
    pub(crate) validation: Validation,
}

/// The keys of an issuer, as they are at the moment.
pub(crate) struct Keys {
    current: ArcSwap<Vec<Key>>,
    /// How often they changed.
    edition: AtomicU64,
    /// `None` if they are from a file.
    remote: Option<Remote>,
}

/// Where keys are fetched.
struct Remote {
    config: config::Jwt,
    url: Uri,
    web: ArcSwap<Web>,
    /// Where the last set is kept.
    state: StateDir,
    looks: watch::Sender<Looks>,
    /// Somebody has a token whose key is not known.
    wanted: Arc<Notify>,
    waiting: Semaphore,
    /// Keys that were looked for in vain, and when.
    unknown: Mutex<HashMap<String, Instant>>,
}

/// How fetching goes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Looks {
    /// How many looks were begun, and how many of them have ended.
    begun: u64,
    ended: u64,
    /// When the keys were told last, in seconds since 1970; 0 if never.
    pub(crate) told_at: u64,
    /// Looks that failed, one after the other.
    pub(crate) failures: u32,
}

impl Keys {
    /// Reads the file; or begins to fetch from the URL, with what was fetched last until that has worked. Needs a runtime for that.
    ///
    /// # Errors
    /// What is wrong with the file, and what to do. That an issuer is down is none.
    pub(crate) fn load(config: &config::Jwt, state: &StateDir) -> Result<Arc<Self>, String> {
        let url = match &config.jwks {
            Jwks::File(_) => return Self::of_file(config).map(Arc::new),
            Jwks::Url(url) => url.clone(),
        };
        let web = web(config)?;
        let kept = state.read(&kept_name(&url)).ok().flatten();
        let kept = kept.and_then(|document| parse(&document, config, "what was fetched last").ok());
        if kept.is_none() {
            tracing::info!(%url, "the issuer's keys are not there yet: tokens are refused until they are");
        }
        let remote = Remote {
            config: config.clone(),
            url,
            web: ArcSwap::from_pointee(web),
            state: state.clone(),
            looks: watch::Sender::default(),
            wanted: Arc::default(),
            waiting: Semaphore::new(MAX_WAITING),
            unknown: Mutex::default(),
        };
        let keys = Arc::new(Self::new(kept.unwrap_or_default(), Some(remote)));
        tokio::spawn(follow(Arc::downgrade(&keys)));
        Ok(keys)
    }

    /// Reads the file.
    pub(crate) fn of_file(config: &config::Jwt) -> Result<Self, String> {
        let Jwks::File(path) = &config.jwks else { return Err("its keys are fetched".into()) };
        let file = path.display().to_string();
        let document = fs::read(path).map_err(|e| {
            format!("{file} cannot be read ({e}); save the issuer's JWK Set there, or correct the path")
        })?;
        Ok(Self::new(parse(&document, config, &file)?, None))
    }

    fn new(keys: Vec<Key>, remote: Option<Remote>) -> Self {
        Self { current: ArcSwap::from_pointee(keys), edition: AtomicU64::new(0), remote }
    }

    /// Whether there may be others than are there now.
    pub(crate) fn are_fetched(&self) -> bool {
        self.remote.is_some()
    }

    /// Whom to trust in the issuer's place may have changed: the files are read again.
    pub(crate) fn trust_anew(&self) -> Result<(), String> {
        if let Some(remote) = &self.remote {
            remote.web.store(Arc::new(web(&remote.config)?));
        }
        Ok(())
    }

    /// What is there now.
    pub(crate) fn current(&self) -> arc_swap::Guard<Arc<Vec<Key>>> {
        self.current.load()
    }

    /// A number that is another one when the keys are others. To be read before they are.
    pub(crate) fn edition(&self) -> u64 {
        self.edition.load(Acquire)
    }

    /// How fetching goes; `None` if they are from a file.
    pub(crate) fn looks(&self) -> Option<Looks> {
        self.remote.as_ref().map(|remote| remote.looks.borrow().clone())
    }

    /// Waits until the issuer was asked once more, for a key that is not among its keys; whether it may be by now. Cancel safe.
    pub(crate) async fn look_for(&self, id: Option<&str>) -> bool {
        let Some(remote) = &self.remote else { return false };
        let id = id.unwrap_or_default();
        if remote.unknown().get(id).is_some_and(|since| since.elapsed() < UNKNOWN_FOR) {
            return false;
        }
        let Ok(_waiting) = remote.waiting.try_acquire() else { return false };
        let mut looks = remote.looks.subscribe();
        // One that has begun already may not have seen it.
        let begun = looks.borrow_and_update().begun;
        remote.wanted.notify_one();
        let looked = tokio::time::timeout(WAIT, looks.wait_for(|looks| looks.ended > begun)).await;
        let Ok(Ok(looks)) = looked else { return false };
        if looks.failures == 0 && !self.current.load().iter().any(|key| key.id.as_deref() == Some(id)) {
            remote.remember_unknown(id);
        }
        true
    }
}

impl Remote {
    fn unknown(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.unknown.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn remember_unknown(&self, id: &str) {
        let mut unknown = self.unknown();
        if unknown.len() >= MAX_UNKNOWN {
            unknown.retain(|_, since| since.elapsed() < UNKNOWN_FOR);
            if unknown.len() >= MAX_UNKNOWN {
                unknown.clear();
            }
        }
        unknown.insert(id.to_owned(), Instant::now());
    }

    /// Asks the issuer. The keys, the set they are from, and how long it says that they hold.
    async fn fetch(&self) -> Result<(Vec<Key>, Bytes, Option<Duration>), String> {
        let request =
            Request::get(self.url.clone()).header(header::ACCEPT, "application/jwk-set+json, application/json");
        let request = request.body(Bytes::new()).map_err(|e| e.to_string())?;
        let answer = self.web.load_full().fetch(request, MAX_SET_BYTES, PATIENCE).await.map_err(|e| e.to_string())?;
        if answer.status() != StatusCode::OK {
            return Err(format!("it answers {}", answer.status()));
        }
        let holds = max_age(&answer);
        let document = answer.into_body();
        Ok((parse(&document, &self.config, "its answer")?, document, holds))
    }
}

/// Fetches keys for as long as anybody has them.
async fn follow(keys: Weak<Keys>) {
    let (mut pause, mut last) = (Duration::ZERO, None::<Instant>);
    let mut kept: Option<[u8; 32]> = None;
    loop {
        let wanted = {
            let Some(keys) = keys.upgrade() else { return };
            let Some(remote) = &keys.remote else { return };
            remote.wanted.clone()
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = wanted.notified() => {
                if let Some(last) = last {
                    tokio::time::sleep_until((last + BETWEEN_LOOKS).into()).await;
                }
            }
        }
        let Some(keys) = keys.upgrade() else { return };
        let Some(remote) = &keys.remote else { return };
        remote.looks.send_modify(|looks| looks.begun += 1);
        let fetched = remote.fetch().await;
        last = Some(Instant::now());
        let failures = remote.looks.borrow().failures;
        match fetched {
            Ok((found, document, holds)) => {
                let digest = Sha256::digest(&document).into();
                if kept.replace(digest) != Some(digest) {
                    remote.state.keep(&kept_name(&remote.url), &document);
                    keys.current.store(Arc::new(found));
                    keys.edition.fetch_add(1, Release);
                }
                if failures > 0 {
                    tracing::info!(url = %remote.url, "the issuer tells its keys again");
                }
                remote.looks.send_modify(|looks| {
                    (looks.ended, looks.told_at, looks.failures) = (looks.begun, unix_now(), 0);
                });
                pause = holds.unwrap_or(REFRESH).clamp(MIN_REFRESH, MAX_REFRESH);
            }
            Err(why) => {
                if failures == 0 {
                    tracing::warn!(url = %remote.url, why, "the issuer does not tell its keys; the last ones stay");
                }
                remote.looks.send_modify(|looks| {
                    (looks.ended, looks.failures) = (looks.begun, looks.failures.saturating_add(1));
                });
                pause = (MIN_RETRY * 2u32.saturating_pow(failures.min(16))).min(REFRESH);
            }
        }
    }
}

/// The way to the issuer.
pub(crate) fn web(config: &config::Jwt) -> Result<Web, String> {
    Web::trusting(config.ca.as_deref()).map_err(|e| e.to_string())
}

fn kept_name(url: &Uri) -> String {
    let digest = Sha256::digest(url.to_string());
    format!("jwks/{}.json", digest[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// For how long an answer says that it holds (RFC 9111 §5.2.2.1).
fn max_age(answer: &Response<Bytes>) -> Option<Duration> {
    let control = answer.headers().get(header::CACHE_CONTROL)?.to_str().ok()?;
    let age = control.split(',').find_map(|part| part.trim().strip_prefix("max-age="))?;
    age.trim_matches('"').parse().ok().map(Duration::from_secs)
}

/// The keys of a set that are for signatures, and for an algorithm of the list; there must be one. Others are left out, and so are
/// those that are broken, or of a kind that is not known (RFC 7517 §5).
fn parse(document: &[u8], config: &config::Jwt, from: &str) -> Result<Vec<Key>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(document)
        .map_err(|e| format!("{from} is not a JWK Set ({e}); it should be what the issuer's jwks_uri answers"))?;
    let mut broken = None;
    let mut keys = Vec::new();
    for value in set.keys {
        let Ok(jwk) = Jwk::deserialize(value) else { continue };
        let algorithms = algorithms(&jwk, config);
        let Some(first) = algorithms.first() else { continue };
        let id = jwk.common.key_id.clone();
        let decoding = match DecodingKey::from_jwk(&jwk) {
            Ok(decoding) => decoding,
            Err(error) => {
                broken = Some(format!("; its key {:?} is broken ({error})", id.unwrap_or_default()));
                continue;
            }
        };
        let mut validation = Validation::new(*first);
        validation.algorithms = algorithms;
        validation.leeway = LEEWAY_S;
        validation.validate_nbf = true;
        validation.set_issuer(&[&config.issuer]);
        validation.set_audience(&config.audience);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        keys.push(Key { id, decoding, validation });
    }
    if keys.is_empty() {
        let list = config.algorithms.iter().map(|a| format!("{:?}", a.get())).collect::<Vec<_>>().join(", ");
        let broken = broken.unwrap_or_default();
        return Err(format!("{from} has no public key for {list}{broken}; fetch it again, or correct jwt.algorithms"));
    }
    keys.truncate(MAX_KEYS);
    Ok(keys)
}

/// The algorithms of the list that a key is made for, by its type and by what it says of itself (RFC 7517 §4.2 to
/// §4.4).
fn algorithms(jwk: &Jwk, config: &config::Jwt) -> Vec<Algorithm> {
    let common = &jwk.common;
    let verifies = common.public_key_use.as_ref().is_none_or(|purpose| *purpose == PublicKeyUse::Signature)
        && common.key_operations.as_ref().is_none_or(|operations| operations.contains(&KeyOperations::Verify));
    let fits = |algorithm: Algorithm| match (&jwk.algorithm, algorithm) {
        (AlgorithmParameters::RSA(_), _) => algorithm.family() == jsonwebtoken::AlgorithmFamily::Rsa,
        (AlgorithmParameters::EllipticCurve(key), Algorithm::ES256) => key.curve == EllipticCurve::P256,
        (AlgorithmParameters::EllipticCurve(key), Algorithm::ES384) => key.curve == EllipticCurve::P384,
        (AlgorithmParameters::OctetKeyPair(key), Algorithm::EdDSA) => key.curve == EllipticCurve::Ed25519,
        _ => false,
    };
    let allowed = config.algorithms.iter().map(|algorithm| algorithm.get());
    allowed
        .filter(|algorithm| verifies && fits(*algorithm))
        .filter(|algorithm| common.key_algorithm.is_none_or(|own| own == KeyAlgorithm::from(*algorithm)))
        .collect()
}
