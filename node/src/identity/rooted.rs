//! Certificates directly under the mesh's root: issuers', and the admin key's.

use std::{collections::HashMap, sync::Mutex};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;
use starling_protocol::NodeId;
use x509_parser::{
    oid_registry::{OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ED25519},
    prelude::{FromDer, X509Certificate},
};

use super::{
    certificate::{ADMIN_UNIT, id_of_spki},
    sha256,
};

/// Certificates that are remembered as good. A mesh has a few issuers and admins.
const MAX_REMEMBERED: usize = 256;

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Issue certificates of nodes.
    Issuer,
    /// Sign what the whole mesh follows.
    Admin,
}

/// A key that the root vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootedKey {
    pub(crate) role: Role,
    /// The key's id, as tokens name issuers.
    pub(crate) id: NodeId,
    public_key: Vec<u8>,
    not_before: u64,
    not_after: u64,
}

impl RootedKey {
    /// Whether the key signed those bytes.
    pub(crate) fn signed(&self, bytes: &[u8], signature: &[u8]) -> bool {
        let verified = match self.role {
            Role::Issuer => UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.public_key).verify(bytes, signature),
            Role::Admin => UnparsedPublicKey::new(&ED25519, &self.public_key).verify(bytes, signature),
        };
        verified.is_ok()
    }
}

/// The one root of a mesh, and what it has signed. A root is trusted until its own end, and no longer.
#[derive(Debug)]
pub(crate) struct Root {
    der: CertificateDer<'static>,
    known: Mutex<HashMap<[u8; 32], RootedKey>>,
}

impl Root {
    pub(crate) fn new(der: CertificateDer<'static>) -> Self {
        Self { der, known: Mutex::default() }
    }

    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        sha256(&self.der)
    }

    /// Whether the root's own time is not over, unix seconds.
    pub(crate) fn check_time(&self, now: u64) -> Result<(), String> {
        let (_, root) = X509Certificate::from_der(&self.der).map_err(|e| e.to_string())?;
        within(span(&root), now).map_err(|why| format!("the mesh's root {why}"))
    }

    /// Checks a certificate that the root has signed, at that time.
    pub(crate) fn key(&self, der: &[u8], now: u64) -> Result<RootedKey, String> {
        self.check_time(now)?;
        let hash = sha256(der);
        let known = self.lock().get(&hash).cloned();
        let key = match known {
            Some(known) => known,
            None => {
                let key = self.verify(der)?;
                let mut known = self.lock();
                if known.len() >= MAX_REMEMBERED {
                    known.clear();
                }
                known.insert(hash, key.clone());
                key
            }
        };
        within((key.not_before, key.not_after), now).map(|()| key)
    }

    /// Everything that time does not change.
    fn verify(&self, der: &[u8]) -> Result<RootedKey, String> {
        let (_, root) = X509Certificate::from_der(&self.der).map_err(|e| e.to_string())?;
        let (rest, cert) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
        if !rest.is_empty() {
            return Err("bytes after the certificate".into());
        }
        if cert.issuer().as_raw() != root.subject().as_raw() {
            return Err("it was not issued by this mesh's root".into());
        }
        if cert.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
            return Err("its signature is not ECDSA with SHA-256".into());
        }
        let root_key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &root.public_key().subject_public_key.data);
        root_key
            .verify(cert.tbs_certificate.as_ref(), &cert.signature_value.data)
            .map_err(|_| "it was not signed by this mesh's root")?;
        let algorithm = &cert.public_key().algorithm.algorithm;
        let is_admin = cert.subject().iter_organizational_unit().any(|unit| unit.as_str() == Ok(ADMIN_UNIT));
        let signs_certificates = cert.key_usage().ok().flatten().is_some_and(|usage| usage.value.key_cert_sign());
        let role = match cert.is_ca() {
            true if signs_certificates && *algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY => Role::Issuer,
            false if is_admin && *algorithm == OID_SIG_ED25519 => Role::Admin,
            _ => return Err("it is neither an issuer's nor the admin key's".into()),
        };
        let (not_before, not_after) = span(&cert);
        let public_key = cert.public_key().subject_public_key.data.to_vec();
        Ok(RootedKey { role, id: id_of_spki(cert.public_key().raw), public_key, not_before, not_after })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 32], RootedKey>> {
        self.known.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// When a certificate is valid, unix seconds.
fn span(cert: &X509Certificate<'_>) -> (u64, u64) {
    let time = |t: i64| u64::try_from(t).unwrap_or(0);
    (time(cert.validity().not_before.timestamp()), time(cert.validity().not_after.timestamp()))
}

fn within((from, until): (u64, u64), now: u64) -> Result<(), String> {
    match () {
        () if now < from => Err("is not valid yet".into()),
        () if now > until => Err("has ended".into()),
        () => Ok(()),
    }
}
