//! What comes back from a join or a renewal is checked here, in full, before anything of it is used or stored. Whoever
//! carried it can have lost it, and not altered it.

use std::time::Duration;

use aws_lc_rs::digest;
use bytes::Bytes;
use rustls::{RootCertStore, crypto::CryptoProvider, pki_types::CertificateDer};
use starling_protocol::{
    Answer, Framed, Grant, Grants, MeshName, Name, NodeId, Refusal, SignedAnswer, decode, encode, put_varint,
};

use super::{
    authority::CLOCK_SKEW,
    certificate::MeshCertificate,
    rooted::{Role, Root},
    unix_now, verify_chain,
};

/// Longest life of a certificate that a node takes: an issuer that was stolen must not give it one for ever.
pub(crate) const MAX_CERT_LIFE: Duration = Duration::from_secs(31 * 86400);

/// A request as it travels: the answer is bound to these bytes.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) kind: u64,
    pub(crate) body: Bytes,
}

impl Request {
    pub(crate) fn new<T: Framed>(message: &T) -> Self {
        Self { kind: T::KIND, body: encode(message).into() }
    }

    /// SHA-256 over kind and bytes.
    pub(crate) fn hash(&self) -> [u8; 32] {
        let mut kind = Vec::new();
        put_varint(self.kind, &mut kind);
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(&kind);
        hash.update(&self.body);
        hash.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

/// What an issuer has said for sure, and which.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) issuer: NodeId,
    pub(crate) outcome: Result<Grant, Refusal>,
}

/// Checks that an issuer of this mesh signed that answer to that request.
pub(crate) fn verdict(signed: &SignedAnswer, request: &Request, root: &Root) -> Result<Verdict, String> {
    let key = root.key(&signed.issuer, unix_now()).map_err(|why| format!("the answer's issuer: {why}"))?;
    if key.role != Role::Issuer {
        return Err("whoever signed the answer is no issuer".into());
    }
    if !key.signed(&SignedAnswer::signed_bytes(&signed.body), &signed.signature) {
        return Err("the answer has a wrong signature".into());
    }
    let answer: Answer = decode(&signed.body).map_err(|e| format!("the answer does not decode: {e}"))?;
    if answer.request != request.hash() {
        return Err("the answer is to another request".into());
    }
    let outcome = match (answer.granted, answer.refused) {
        (Some(grant), None) => Ok(grant),
        (None, Some(refusal)) => Err(refusal),
        _ => return Err("the answer says neither yes nor no".into()),
    };
    Ok(Verdict { issuer: key.id, outcome })
}

/// What a node's new certificate must say.
#[derive(Debug)]
pub(crate) struct Expected<'a> {
    pub(crate) id: NodeId,
    pub(crate) mesh: &'a MeshName,
    pub(crate) name: &'a Name,
    pub(crate) grants: &'a Grants,
}

/// Checks a granted chain, and returns it. `issuer` is who signed the answer: the same must have signed the certificate.
pub(crate) fn check_chain(
    grant: &Grant,
    issuer: NodeId,
    root: &Root,
    expected: &Expected<'_>,
    provider: &CryptoProvider,
) -> Result<Vec<CertificateDer<'static>>, String> {
    if root.der().as_ref() != grant.root.as_ref() {
        return Err("it comes with another root than this mesh's".into());
    }
    let chain: Vec<CertificateDer<'static>> =
        grant.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    let [leaf_der, issuer_der] = &chain[..] else {
        return Err("it is not a certificate and its issuer's".into());
    };
    let now = unix_now();
    let key = root.key(issuer_der, now)?;
    if key.role != Role::Issuer || key.id != issuer {
        return Err("its issuer is not the one that answered".into());
    }
    let leaf = MeshCertificate::parse(leaf_der).map_err(|e| e.to_string())?;
    let mut roots = RootCertStore::empty();
    roots.add(root.der().clone()).map_err(|e| e.to_string())?;
    verify_chain(leaf_der, std::slice::from_ref(issuer_der), &roots, now, provider).map_err(|e| e.to_string())?;
    let sorted = |names: &[Name]| {
        let mut names = names.to_vec();
        names.sort();
        names.dedup();
        names
    };
    let wrong = match () {
        () if leaf.id != expected.id => "it is for another key",
        () if leaf.mesh != *expected.mesh => "it is for another mesh",
        () if leaf.name != *expected.name => "it is for another name",
        () if leaf.edge != expected.grants.edge => "it says otherwise whether this may be an edge",
        () if leaf.zone != expected.grants.zone => "it is for another zone",
        () if sorted(&leaf.services) != sorted(&expected.grants.services) => "it is for other services",
        () if leaf.not_after > now + MAX_CERT_LIFE.as_secs() + CLOCK_SKEW.as_secs() => "it is good for too long",
        () => return Ok(chain),
    };
    Err(wrong.into())
}
