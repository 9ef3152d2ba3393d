//! Public certificates: chosen by server name, replaced while connections live.

use std::{
    cell::LazyCell,
    sync::{Arc, Mutex, MutexGuard},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use instant_acme::CertificateIdentifier;
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::{
    crypto::CryptoProvider,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::PrivatePkcs8KeyDer;
use starling_node::{rfc3339, unix_now};

use crate::{
    acme::{Challenges, Id, Pair, Store},
    config::{Certificate, Files, Source},
    key_pair,
};

/// The certificates in use. A reload changes new handshakes only.
pub(crate) struct Certificates {
    provider: Arc<CryptoProvider>,
    /// Those that authorities issued.
    store: Store,
    challenges: Challenges,
    current: ArcSwap<Vec<Loaded>>,
    /// One at a time replaces what is in use.
    replacing: Mutex<()>,
}

#[derive(Clone)]
struct Loaded {
    hosts: Vec<String>,
    key: Arc<CertifiedKey>,
    /// If an authority issues it.
    id: Option<Id>,
    /// What it issued; until then another certificate stands in.
    issued: Option<Pair>,
    /// Whether that is one of the edge's own, for which nobody vouches.
    is_own: bool,
}

impl Loaded {
    fn stands_in(&self) -> bool {
        self.id.is_some() && self.issued.is_none()
    }
}

/// A certificate that an authority issued.
pub(crate) struct IssuedCertificate {
    /// Seconds since 1970.
    pub(crate) from: u64,
    /// Seconds since 1970.
    pub(crate) until: u64,
    /// For the authority; `None` if the certificate does not say enough for that.
    pub(crate) identifier: Option<CertificateIdentifier<'static>>,
}

/// A certificate as it is shown to an operator.
pub(crate) struct Shown {
    pub(crate) hosts: Vec<String>,
    pub(crate) id: Option<Id>,
    pub(crate) stands_in: bool,
    /// Seconds since 1970; `None` of one of the edge's own.
    pub(crate) until: Option<u64>,
}

impl Certificates {
    /// Loads all files, or says which one is wrong.
    pub(crate) fn load(
        config: &[Certificate],
        store: Store,
        challenges: Challenges,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let current = ArcSwap::from_pointee(load(config, &[], &store, &provider)?);
        Ok(Self { provider, store, challenges, current, replacing: Mutex::default() })
    }

    /// Loads again; on an error the old ones stay. One that was issued stays, too.
    pub(crate) fn reload(&self, config: &[Certificate]) -> Result<(), String> {
        let _one = self.replacing();
        let loaded = load(config, &self.current.load(), &self.store, &self.provider)?;
        self.current.store(Arc::new(loaded));
        Ok(())
    }

    /// Shows what an authority has issued from now on.
    pub(crate) fn put(&self, id: &Id, pair: Pair) {
        let _one = self.replacing();
        let mut current = Vec::clone(&self.current.load());
        for loaded in current.iter_mut().filter(|loaded| loaded.id.as_ref() == Some(id)) {
            (loaded.key, loaded.issued, loaded.is_own) = (pair.key.clone(), Some(pair.clone()), false);
        }
        self.current.store(Arc::new(current));
    }

    /// What an authority issued, if it has.
    pub(crate) fn issued(&self, id: &Id) -> Option<IssuedCertificate> {
        let current = self.current.load();
        let issued = current.iter().find(|loaded| loaded.id.as_ref() == Some(id))?.issued.as_ref()?;
        let leaf = issued.key.cert.first()?;
        let (from, until) = key_pair::validity(leaf)?;
        let identifier = CertificateIdentifier::try_from(leaf).ok().map(CertificateIdentifier::into_owned);
        Some(IssuedCertificate { from, until, identifier })
    }

    /// Key and chain of what an authority issued, in PEM, if that was later, in seconds since 1970: what was issued last is right, also
    /// where lives become shorter.
    pub(crate) fn pem_newer_than(&self, id: &Id, than: u64) -> Option<Bytes> {
        let current = self.current.load();
        let issued = current.iter().find(|loaded| loaded.id.as_ref() == Some(id))?.issued.as_ref()?;
        (issued.issued_at() > than).then(|| issued.pem.clone())
    }

    /// All of them, in the order of the file.
    pub(crate) fn shown(&self) -> Vec<Shown> {
        let leaf = |loaded: &'_ Loaded| loaded.key.cert.first().filter(|_| !loaded.is_own).cloned();
        let shown = |loaded: &Loaded| Shown {
            hosts: loaded.hosts.clone(),
            id: loaded.id.clone(),
            stands_in: loaded.stands_in(),
            until: leaf(loaded).and_then(|leaf| key_pair::validity(&leaf)).map(|(_, until)| until),
        };
        self.current.load().iter().map(shown).collect()
    }

    /// Whether a connection whose client asked for `sni` may carry requests for `host` (RFC 9110 §7.4): the same name, or
    /// another one of the same certificate.
    pub(crate) fn covers(&self, sni: &str, host: &str) -> bool {
        if sni.eq_ignore_ascii_case(host) {
            return true;
        }
        let current = self.current.load();
        find(&current, sni).is_some_and(|loaded| loaded.hosts.iter().any(|pattern| matches(pattern, host)))
    }

    fn replacing(&self) -> MutexGuard<'_, ()> {
        self.replacing.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(challenge) = self.challenges.certificate(&hello) {
            return challenge;
        }
        let current = self.current.load();
        let named = hello.server_name().and_then(|name| find(&current, name));
        // Without a name, or with one that nobody configured, the first: the client then judges the mismatch.
        named.or_else(|| current.first()).map(|loaded| loaded.key.clone())
    }
}

fn find<'a>(loaded: &'a [Loaded], name: &str) -> Option<&'a Loaded> {
    let exact = loaded.iter().find(|l| l.hosts.iter().any(|h| h.eq_ignore_ascii_case(name)));
    exact.or_else(|| loaded.iter().find(|l| l.hosts.iter().any(|h| matches(h, name))))
}

/// Whether a name, or `*.` and a domain, is good for a name (RFC 6125 §6.4.3).
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix("*.") {
        Some(domain) => name.split_once('.').is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(domain)),
        None => pattern.eq_ignore_ascii_case(name),
    }
}

fn load(
    config: &[Certificate],
    former: &[Loaded],
    store: &Store,
    provider: &CryptoProvider,
) -> Result<Vec<Loaded>, String> {
    // Looked at only if there is one that was not issued yet.
    let kept = LazyCell::new(|| store.pairs(provider));
    let load = |certificate: &Certificate| {
        let hosts = certificate.hosts.clone();
        match &certificate.source {
            Source::Files(files) => {
                let key = Arc::new(load_files(files, &hosts, provider)?);
                Ok(Loaded { hosts, key, id: None, issued: None, is_own: false })
            }
            Source::Acme(acme) => {
                let id = Id::of(&hosts, acme);
                if let Some(former) = former.iter().find(|former| former.id.as_ref() == Some(&id)) {
                    return Ok(Loaded { hosts, ..former.clone() });
                }
                let issued = store.pair(&id, provider);
                let (key, is_own) = match &issued {
                    Some(pair) => (pair.key.clone(), false),
                    None => stand_in(&hosts, former, &kept, provider)?,
                };
                Ok(Loaded { hosts, key, id: Some(id), issued, is_own })
            }
        }
    };
    config.iter().map(load).collect()
}

fn load_files(files: &Files, hosts: &[String], provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let pair = key_pair::read(files, provider).map_err(|problems| {
        let problems: Vec<String> = problems.into_iter().map(|(_, why)| format!("certificate file {why}")).collect();
        problems.join("; ")
    })?;
    for why in key_pair::doubts(&pair.cert, hosts, unix_now()) {
        tracing::warn!(cert = %files.cert.display(), why, "clients will not like a certificate");
    }
    Ok(pair)
}

/// What is shown until an authority has issued one: another one that was issued, and is good for most of the names, such as the one from
/// before a name was added; or else one that nobody vouches for, which is said beside it.
fn stand_in(
    hosts: &[String],
    former: &[Loaded],
    kept: &[Pair],
    provider: &CryptoProvider,
) -> Result<(Arc<CertifiedKey>, bool), String> {
    let shown = hosts.join(", ");
    let issued = former.iter().filter_map(|former| former.issued.clone()).chain(kept.iter().cloned());
    let good = |pair: Pair| (key_pair::covered(&pair.key.cert, hosts, unix_now()), pair.issued_at(), pair);
    let best = issued.map(good).filter(|(covered, ..)| *covered > 0).max_by_key(|(covered, at, _)| (*covered, *at));
    if let Some((covered, _, pair)) = best {
        let missing = hosts.len() - covered;
        let until = pair.key.cert.first().and_then(key_pair::validity).map_or(0, |(_, until)| until);
        let what = "no certificate was issued yet: the edge shows another one, which nobody renews";
        tracing::warn!(hosts = shown, missing, until = rfc3339(until), "{what}");
        return Ok((pair.key, false));
    }
    tracing::warn!(hosts = shown, "no certificate was issued yet: the edge shows one of its own, which clients refuse");
    let made = || -> Result<CertifiedKey, Box<dyn std::error::Error>> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(hosts)?;
        params.distinguished_name.push(DnType::CommonName, "Starling, until a certificate is issued");
        let certificate = params.self_signed(&key)?.der().clone();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Ok(CertifiedKey::from_der(vec![certificate], key, provider)?)
    };
    made().map(|key| (Arc::new(key), true)).map_err(|e| format!("a certificate for {shown} cannot be made: {e}"))
}
