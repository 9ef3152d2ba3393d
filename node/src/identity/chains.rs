//! Chains that were verified, so that none is verified twice: a peer shows its chain with each connection, and sends it
//! along with each of its records.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate::MeshCertificate;

/// Chains that are remembered; above, those that are over go, and then all.
const MAX_CHAINS: usize = 4096;

/// Chains under the roots of one mesh. Only those that are good are remembered, so that nobody else can fill it.
#[derive(Debug, Default)]
pub(super) struct Chains(Mutex<HashMap<[u8; 32], Verified>>);

/// A leaf whose chain's signatures, names and constraints are right. What time says about it is not part of that.
#[derive(Debug, Clone)]
struct Verified {
    leaf: Arc<MeshCertificate>,
    /// When all its issuers are valid, unix seconds.
    issuers: (u64, u64),
}

impl Chains {
    /// The leaf, if the chain was verified and its issuers are valid `at` that time, in unix seconds.
    pub(super) fn get(&self, chain: &[CertificateDer<'_>], at: u64) -> Option<Arc<MeshCertificate>> {
        let chains = self.lock();
        let known = chains.get(&fingerprint(chain))?;
        let (from, until) = known.issuers;
        (from <= at && at <= until).then(|| known.leaf.clone())
    }

    /// Remembers a chain that was found to be good at `now`.
    pub(super) fn put(&self, chain: &[CertificateDer<'_>], leaf: Arc<MeshCertificate>, now: u64) {
        let Some(issuers) = validity(&chain[1..]) else { return };
        let mut chains = self.lock();
        if chains.len() >= MAX_CHAINS {
            chains.retain(|_, known| known.leaf.not_after >= now);
        }
        if chains.len() >= MAX_CHAINS {
            chains.clear();
        }
        chains.insert(fingerprint(chain), Verified { leaf, issuers });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Verified>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// SHA-256 of all certificates, each with its length in front.
fn fingerprint(chain: &[CertificateDer<'_>]) -> [u8; 32] {
    let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for der in chain {
        hash.update(&(der.len() as u64).to_be_bytes());
        hash.update(der);
    }
    hash.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// The time in which all of them are valid.
fn validity(certificates: &[CertificateDer<'_>]) -> Option<(u64, u64)> {
    let mut all = (0, u64::MAX);
    for der in certificates {
        let (_, cert) = X509Certificate::from_der(der).ok()?;
        let time = |t: i64| u64::try_from(t).ok();
        let validity = cert.validity();
        all.0 = all.0.max(time(validity.not_before.timestamp())?);
        all.1 = all.1.min(time(validity.not_after.timestamp())?);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

    use super::*;

    fn time(unix: u64) -> time::OffsetDateTime {
        time::OffsetDateTime::from_unix_timestamp(unix as i64).unwrap()
    }

    /// A leaf that is good from 1000 to 9000, and its issuer, from 2000 to 5000.
    fn chain(name: &str) -> (Vec<CertificateDer<'static>>, Arc<MeshCertificate>) {
        let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (ca.not_before, ca.not_after) = (time(2000), time(5000));
        let ca_der = ca.self_signed(&ca_key).unwrap().der().clone();
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI(format!("spiffe://shop/node/{name}").as_str().try_into().unwrap())];
        (leaf.not_before, leaf.not_after) = (time(1000), time(9000));
        let leaf = leaf.signed_by(&key, &Issuer::from_params(&ca, &ca_key)).unwrap().der().clone();
        let parsed = MeshCertificate::parse(&leaf).unwrap();
        (vec![leaf, ca_der], Arc::new(parsed))
    }

    #[test]
    fn a_chain_is_known_as_long_as_its_issuers_are_valid_and_no_other_is() {
        let chains = Chains::default();
        let (good, leaf) = chain("a");
        chains.put(&good, leaf.clone(), 3000);
        for (at, known) in [(1999, false), (2000, true), (5000, true), (5001, false)] {
            assert_eq!(chains.get(&good, at), known.then(|| leaf.clone()), "at {at}");
        }
        let (other, _) = chain("a");
        let crossed = [good[0].clone(), other[1].clone()];
        for unknown in [&other[..], &crossed[..], &good[..1]] {
            assert_eq!(chains.get(unknown, 3000), None);
        }
    }

    #[test]
    fn it_is_bounded() {
        let chains = Chains::default();
        let (good, leaf) = chain("a");
        for n in 0..MAX_CHAINS + 10 {
            let fake = CertificateDer::from(n.to_be_bytes().to_vec());
            chains.put(&[fake], leaf.clone(), 3000);
        }
        chains.put(&good, leaf, 3000);
        assert!(chains.lock().len() <= MAX_CHAINS);
        assert!(chains.get(&good, 3000).is_some());
    }
}
