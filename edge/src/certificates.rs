//! Public certificates: chosen by server name, replaced while connections live.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::{
    crypto::CryptoProvider,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use starling_node::unix_now;

use crate::{config::Certificate, key_pair};

/// The certificates in use. A reload changes new handshakes only.
pub(crate) struct Certificates {
    provider: Arc<CryptoProvider>,
    current: ArcSwap<Vec<Loaded>>,
}

struct Loaded {
    hosts: Vec<String>,
    key: Arc<CertifiedKey>,
}

impl Certificates {
    /// Loads all files, or says which one is wrong.
    pub(crate) fn load(config: &[Certificate], provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let current = ArcSwap::from_pointee(load(config, &provider)?);
        Ok(Self { provider, current })
    }

    /// Loads again; on an error the old ones stay.
    pub(crate) fn reload(&self, config: &[Certificate]) -> Result<(), String> {
        self.current.store(Arc::new(load(config, &self.provider)?));
        Ok(())
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
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
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

fn load(config: &[Certificate], provider: &CryptoProvider) -> Result<Vec<Loaded>, String> {
    let load = |certificate: &Certificate| {
        let pair = key_pair::read(certificate, provider).map_err(|problems| {
            let problems: Vec<String> =
                problems.into_iter().map(|(_, why)| format!("certificate file {why}")).collect();
            problems.join("; ")
        })?;
        for why in key_pair::doubts(&pair.cert, &certificate.hosts, unix_now()) {
            tracing::warn!(cert = %certificate.cert.display(), why, "clients will not like a certificate");
        }
        Ok(Loaded { hosts: certificate.hosts.clone(), key: Arc::new(pair) })
    };
    config.iter().map(load).collect()
}
