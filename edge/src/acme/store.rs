//! What is kept of ACME in the state directory: accounts, certificates with their keys, and how the last tries went.

use std::sync::Arc;

use bytes::Bytes;
use instant_acme::AccountCredentials;
use rustls::{crypto::CryptoProvider, sign::CertifiedKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use starling_node::StateDir;

use super::schedule::Tries;
use crate::{config, key_pair};

/// Which certificate: whose, and for which names. Others of a route or an account do not make it another one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Id(String);

impl Id {
    /// That of an authority for these names, in whatever order they stand.
    pub(crate) fn of(hosts: &[String], acme: &config::Acme) -> Self {
        let mut sorted: Vec<&str> = hosts.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let first = sorted.first().copied().unwrap_or_default();
        let digest = short_digest(std::iter::once(acme.directory.0.as_str()).chain(sorted.iter().copied()));
        Self(format!("{first}-{digest}"))
    }

    /// As edges tell each other.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// A number from 0 to 1 that is its own: it comes out the same after a restart.
    pub(crate) fn dice(&self) -> f64 {
        let digest: [u8; 32] = Sha256::digest(&self.0).into();
        let (first, _) = digest.split_first_chunk().expect("a digest has 32 bytes");
        f64::from(u32::from_be_bytes(*first)) / f64::from(u32::MAX)
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn short_digest<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part);
        digest.update([0]);
    }
    digest.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A certificate that was issued, with its key. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Pair {
    /// Key and chain, in one text so that they are replaced together.
    pub(crate) pem: Bytes,
    pub(crate) key: Arc<CertifiedKey>,
}

impl Pair {
    /// Reads one; why not, if it cannot be used.
    pub(crate) fn new(pem: Bytes, provider: &CryptoProvider) -> Result<Self, String> {
        let key = Arc::new(key_pair::of_pem(&pem, provider)?);
        Ok(Self { pem, key })
    }

    /// When it was issued, in seconds since 1970; 0 if it does not say.
    pub(crate) fn issued_at(&self) -> u64 {
        self.key.cert.first().and_then(key_pair::validity).map_or(0, |(from, _)| from)
    }
}

/// Without the key.
impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").finish_non_exhaustive()
    }
}

/// An order that was begun (RFC 8555 §7.4), and the key of the certificate that it is for.
#[derive(Serialize, Deserialize)]
pub(super) struct Begun {
    /// Its URL.
    pub(super) order: String,
    /// In PEM.
    pub(super) key: String,
}

/// The files. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Store(StateDir);

impl Store {
    pub(crate) fn new(state: StateDir) -> Self {
        Self(state)
    }

    /// The certificate that was issued last, if there is one that can be used.
    pub(crate) fn pair(&self, id: &Id, provider: &CryptoProvider) -> Option<Pair> {
        let name = pem_name(id);
        let pem = self.0.read(&name).unwrap_or_else(|error| {
            tracing::warn!(%error, "a certificate that was issued is not used");
            None
        })?;
        Pair::new(pem.into(), provider)
            .map_err(|why| {
                let error = self.0.damaged(&name, why);
                tracing::warn!(%error, "a certificate that was issued is not used");
            })
            .ok()
    }

    /// All that were issued and can be used, those that are not wanted any more included.
    pub(crate) fn pairs(&self, provider: &CryptoProvider) -> Vec<Pair> {
        let files = std::fs::read_dir(self.0.path().join("acme")).into_iter().flatten().flatten();
        let files = files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|e| e == "pem"));
        files.filter_map(|path| Pair::new(std::fs::read(path).ok()?.into(), provider).ok()).collect()
    }

    /// Keeps one; whatever order there was is done with.
    pub(crate) fn keep_pair(&self, id: &Id, pair: &Pair) {
        self.0.keep(&pem_name(id), &pair.pem);
        self.forget_begun(id);
    }

    /// How the last tries went; from the start, if it cannot be read.
    pub(crate) fn tries(&self, id: &Id) -> Tries {
        let text = self.0.read(&tries_name(id)).ok().flatten();
        text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    pub(crate) fn keep_tries(&self, id: &Id, tries: &Tries) {
        self.0.keep(&tries_name(id), &serde_json::to_vec(tries).unwrap_or_default());
    }

    /// The order that was begun and has not ended.
    pub(super) fn begun(&self, id: &Id) -> Option<Begun> {
        serde_json::from_slice(&self.0.read(&order_name(id)).ok().flatten()?).ok()
    }

    pub(super) fn keep_begun(&self, id: &Id, begun: &Begun) {
        self.0.keep(&order_name(id), &serde_json::to_vec(begun).unwrap_or_default());
    }

    /// It came to an end.
    pub(super) fn forget_begun(&self, id: &Id) {
        let _ = std::fs::remove_file(self.0.path().join(order_name(id)));
    }

    /// Our account with an authority.
    pub(crate) fn account(&self, acme: &config::Acme) -> Option<AccountCredentials> {
        let name = account_name(acme);
        let text = self.0.read(&name).ok().flatten()?;
        serde_json::from_slice(&text)
            .map_err(|e| tracing::warn!(error = %self.0.damaged(&name, e), "a new account is made"))
            .ok()
    }

    pub(crate) fn keep_account(&self, acme: &config::Acme, account: &AccountCredentials) {
        self.0.keep(&account_name(acme), &serde_json::to_vec(account).unwrap_or_default());
    }

    /// Puts an account aside that the authority does not know any more.
    pub(crate) fn forget_account(&self, acme: &config::Acme) {
        let path = self.0.path().join(account_name(acme));
        let _ = std::fs::rename(&path, path.with_extension("unknown"));
    }
}

fn pem_name(id: &Id) -> String {
    format!("acme/{id}.pem")
}

fn tries_name(id: &Id) -> String {
    format!("acme/{id}.json")
}

fn order_name(id: &Id) -> String {
    format!("acme/{id}.order.json")
}

fn account_name(acme: &config::Acme) -> String {
    let of_all = [acme.directory.0.as_str(), acme.email.as_deref().unwrap_or_default()];
    let digest = short_digest(of_all.into_iter().chain(acme.eab.as_ref().map(|eab| eab.kid.as_str())));
    format!("acme/account-{digest}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acme(directory: &str) -> config::Acme {
        config::Acme {
            directory: directory.to_owned().try_into().unwrap(),
            email: None,
            ca: None,
            challenge: None,
            eab: None,
        }
    }

    #[test]
    fn a_certificate_is_known_by_authority_and_names() {
        let id = |hosts: &[&str], directory| {
            Id::of(&hosts.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>(), &acme(directory))
        };
        let one = id(&["a.example", "b.example"], "https://x/");
        assert_eq!(one.0.split_once('-').unwrap().0, "a.example");
        assert_eq!(one, id(&["a.example", "b.example", "a.example"], "https://x/"));
        assert_eq!(one, id(&["b.example", "a.example"], "https://x/"));
        assert_ne!(one, id(&["a.example"], "https://x/"));
        assert_ne!(one, id(&["a.example", "b.example"], "https://y/"));
        assert!((0.0..=1.0).contains(&one.dice()));
        assert_ne!(one.dice(), id(&["a.example"], "https://x/").dice());
    }

    #[test]
    fn what_is_kept_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(StateDir::open(dir.path()).unwrap());
        let (hosts, provider) = (["a.example".to_owned()], starling_node::crypto_provider());
        let id = Id::of(&hosts, &acme("https://x/"));
        assert!(store.pair(&id, &provider).is_none());
        assert_eq!(store.tries(&id), Tries::default());
        let key = rcgen::KeyPair::generate().unwrap();
        let chain = rcgen::CertificateParams::new(hosts.to_vec()).unwrap().self_signed(&key).unwrap().pem();
        let pem = format!("{}{chain}", key.serialize_pem());
        store.keep_pair(&id, &Pair::new(pem.into(), &provider).unwrap());
        let mut tries = Tries::default();
        tries.failed(7, "no".into(), None, 0.0);
        store.keep_tries(&id, &tries);
        assert_eq!(store.pair(&id, &provider).unwrap().key.cert.len(), 1);
        assert_eq!(store.tries(&id), tries);
        // A file that is cut, as a full disk leaves it, is none.
        store.0.write(&pem_name(&id), &chain.as_bytes()[..20]).unwrap();
        assert!(store.pair(&id, &provider).is_none());
    }
}
