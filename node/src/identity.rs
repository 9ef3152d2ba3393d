//! Who this node is, who vouches for it, and how it checks others.

pub(crate) mod admission;
pub(crate) mod authority;
pub(crate) mod certificate;
mod chains;
mod grant;
pub(crate) mod join;
pub(crate) mod ledger;
pub(crate) mod names;
pub(crate) mod renewal;
pub(crate) mod rooted;
pub(crate) mod tls;

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use bytes::Bytes;
use rcgen::{KeyPair, PublicKeyData, SigningKey as _};
use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject},
    server::ParsedCertificate,
    sign::CertifiedKey,
};
use starling_gossip::{Credentials, DocumentError, RecordError};
use starling_protocol::{
    Grants, IssuerProof, MeshDocument, MeshName, Name, NodeId, NodeKind, NodeRecord, SignedDocument, SignedRecord,
    SignedStrike, Strike,
};

use self::{
    certificate::MeshCertificate,
    chains::Chains,
    rooted::{Role, Root},
};
use crate::state::{StateDir, StateError};

const KEY: &str = "identity/key.pem";
const CHAIN: &str = "identity/chain.pem";
const ROOTS: &str = "identity/roots.pem";

/// Why a certificate is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CertificateError {
    /// No chain to a root of this mesh.
    #[error("it was not issued by this mesh: {0}")]
    Chain(String),
    /// Past its end.
    #[error("it has expired")]
    Expired,
    /// Its names are not those of a node.
    #[error("its names are not those of a node: {0}")]
    Names(String),
    /// Of another trust domain.
    #[error("it belongs to mesh {0:?}")]
    OtherMesh(String),
}

/// This node's key and certificates. The key never changes while the state directory lives; the certificate does, and new
/// connections then use the new one.
pub(crate) struct Identity {
    key: KeyPair,
    roots: RootCertStore,
    root: Root,
    provider: Arc<CryptoProvider>,
    mesh: MeshName,
    name: Name,
    id: NodeId,
    current: ArcSwap<Current>,
    /// Those of others that were checked; the roots never change while the process lives.
    chains: Chains,
}

/// The certificate in use.
pub(crate) struct Current {
    pub(crate) leaf: MeshCertificate,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// For TLS: the chain without the root, as members need it.
    pub(crate) certified: Arc<CertifiedKey>,
    /// For TLS with joiners, who know the root only by its fingerprint.
    pub(crate) certified_with_root: Arc<CertifiedKey>,
}

impl Identity {
    /// Loads what the state directory holds; `None` if this node has not joined yet.
    pub(crate) fn load(state: &StateDir, provider: Arc<CryptoProvider>) -> Result<Option<Self>, StateError> {
        let (Some(key), Some(chain), Some(roots)) =
            (state.read_text(KEY)?, state.read_text(CHAIN)?, state.read_text(ROOTS)?)
        else {
            return Ok(None);
        };
        let key = KeyPair::from_pem(&key).map_err(|e| state.damaged(KEY, e))?;
        let chain = pem_certificates(&chain).map_err(|e| state.damaged(CHAIN, e))?;
        let roots = pem_certificates(&roots).map_err(|e| state.damaged(ROOTS, e))?;
        let [root] = &roots[..] else { return Err(state.damaged(ROOTS, "a mesh has one root, and it holds more")) };
        Self::new(key, chain, root.clone(), provider).map(Some).map_err(|e| state.damaged(CHAIN, e))
    }

    /// Puts an identity together, and stores it if it holds: what is stored was verified.
    pub(crate) fn establish(
        state: &StateDir,
        key: KeyPair,
        chain: Vec<CertificateDer<'static>>,
        root: CertificateDer<'static>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, StateError> {
        let identity = Self::new(key, chain.clone(), root.clone(), provider)
            .map_err(|e| state.damaged("the new certificate", e))?;
        // The chain last: its presence is what makes the identity complete.
        state.write(KEY, identity.key.serialize_pem().as_bytes())?;
        state.write(ROOTS, pem_text(&[root]).as_bytes())?;
        state.write(CHAIN, pem_text(&chain).as_bytes())?;
        Ok(identity)
    }

    /// Errors if anything does not belong together: the key, the chain up to the root, the names. The certificate's end is
    /// another question: one that has just ended can still be renewed.
    fn new(
        key: KeyPair,
        chain: Vec<CertificateDer<'static>>,
        root: CertificateDer<'static>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, CertificateError> {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).map_err(|e| CertificateError::Chain(e.to_string()))?;
        let current = Current::new(&key, chain.clone(), &root, &provider)?;
        if current.leaf.id != node_id(&key) {
            return Err(CertificateError::Names("the certificate is for another key".into()));
        }
        let identity = Self {
            roots,
            root: Root::new(root),
            provider,
            mesh: current.leaf.mesh.clone(),
            name: current.leaf.name.clone(),
            id: current.leaf.id,
            current: ArcSwap::from_pointee(current),
            chains: Chains::default(),
            key,
        };
        // At a moment at which it is good: whether this host's clock is right is no question of what is on disk.
        let leaf = &identity.current.load().leaf;
        let at = unix_now().clamp(leaf.not_before, leaf.not_after.max(leaf.not_before));
        identity.root.check_time(at).map_err(CertificateError::Chain)?;
        let [leaf_der, issuer_der] = &chain[..] else {
            return Err(CertificateError::Chain(format!("{} certificates instead of two", chain.len())));
        };
        verify_chain(leaf_der, std::slice::from_ref(issuer_der), &identity.roots, at, &identity.provider)
            .map_err(|e| CertificateError::Chain(e.to_string()))?;
        if unix_now() < leaf.not_before {
            tracing::error!(
                begins = leaf.not_before,
                now = unix_now(),
                "this host's clock is behind: the certificate has not begun"
            );
        }
        Ok(identity)
    }

    /// Takes a renewed chain, which the caller has checked in full: stored first, then used for new connections; live ones
    /// stay as they are.
    pub(crate) fn replace_chain(
        &self,
        state: &StateDir,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<(), StateError> {
        let current = Current::new(&self.key, chain, self.root.der(), &self.provider)
            .map_err(|e| state.damaged("the renewed certificate", e))?;
        state.write(CHAIN, pem_text(&current.chain).as_bytes())?;
        self.current.store(Arc::new(current));
        Ok(())
    }

    /// The mesh.
    pub(crate) fn mesh(&self) -> &MeshName {
        &self.mesh
    }

    /// This node's name.
    pub(crate) fn name(&self) -> &Name {
        &self.name
    }

    /// This node's id.
    pub(crate) fn id(&self) -> NodeId {
        self.id
    }

    /// Services that the certificate grants.
    pub(crate) fn services(&self) -> Vec<Name> {
        self.current.load().leaf.services.clone()
    }

    /// Whether the certificate lets it be an edge.
    pub(crate) fn is_edge(&self) -> bool {
        self.current.load().leaf.edge
    }

    /// Start and end of the certificate, unix seconds.
    pub(crate) fn validity(&self) -> (u64, u64) {
        let current = self.current.load();
        (current.leaf.not_before, current.leaf.not_after)
    }

    pub(crate) fn current(&self) -> Arc<Current> {
        self.current.load_full()
    }

    pub(crate) fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    /// The mesh's root, and what it vouches for.
    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    /// What the certificate grants.
    pub(crate) fn grants(&self) -> Grants {
        let leaf = &self.current.load().leaf;
        Grants { services: leaf.services.clone(), edge: leaf.edge, zone: leaf.zone.clone(), ..Grants::default() }
    }

    /// A request for the next certificate of the same key.
    pub(crate) fn csr(&self) -> Vec<u8> {
        csr(&self.key)
    }

    /// Checks a chain, its names and its end. With `grace`, a certificate that ended less than that ago is still taken.
    pub(crate) fn check_chain(
        &self,
        chain: &[CertificateDer<'_>],
        grace: Duration,
    ) -> Result<Arc<MeshCertificate>, CertificateError> {
        // Anything else costs time and place, and can only be sent to cost them. Where somebody may be joining, the root is
        // shown, too.
        let chain = match chain {
            [leaf, issuer, root] if root == self.root.der() => &[leaf.clone(), issuer.clone()],
            _ => chain,
        };
        let [leaf_der, issuer_der] = chain else {
            return Err(CertificateError::Chain(format!("{} certificates instead of two", chain.len())));
        };
        let leaf = MeshCertificate::parse(leaf_der)?;
        let now = unix_now();
        if now > leaf.not_after.saturating_add(grace.as_secs()) {
            return Err(CertificateError::Expired);
        }
        // Within the grace the chain is judged at the certificate's own last moment.
        let at = now.min(leaf.not_after);
        self.root.check_time(at).map_err(CertificateError::Chain)?;
        if at >= leaf.not_before
            && let Some(known) = self.chains.get(chain, at)
        {
            return Ok(known);
        }
        verify_chain(leaf_der, std::slice::from_ref(issuer_der), &self.roots, at, &self.provider)
            .map_err(|e| CertificateError::Chain(e.to_string()))?;
        if leaf.mesh != self.mesh {
            return Err(CertificateError::OtherMesh(leaf.mesh.to_string()));
        }
        let leaf = Arc::new(leaf);
        self.chains.put(chain, leaf.clone(), now);
        Ok(leaf)
    }
}

impl Current {
    fn new(
        key: &KeyPair,
        chain: Vec<CertificateDer<'static>>,
        root: &CertificateDer<'static>,
        provider: &CryptoProvider,
    ) -> Result<Self, CertificateError> {
        let leaf = chain.first().ok_or_else(|| CertificateError::Chain("no certificate".into()))?;
        let leaf = MeshCertificate::parse(leaf)?;
        let signing = provider
            .key_provider
            .load_private_key(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
            .map_err(|e| CertificateError::Chain(e.to_string()))?;
        let with_root = [&chain[..], std::slice::from_ref(root)].concat();
        Ok(Self {
            leaf,
            certified: Arc::new(CertifiedKey::new(chain.clone(), signing.clone())),
            certified_with_root: Arc::new(CertifiedKey::new(with_root, signing)),
            chain,
        })
    }
}

/// The identity as gossip needs it.
pub(crate) struct RecordCredentials(pub(crate) Arc<Identity>);

impl Credentials for RecordCredentials {
    fn sign(&self, record: &NodeRecord) -> SignedRecord {
        let body = SignedRecord::encode_body(record);
        let signature = self.0.key.sign(&SignedRecord::signed_bytes(&body)).expect("a P-256 key can sign").into();
        let chain = self.0.current().chain.iter().map(|c| Bytes::copy_from_slice(c)).collect();
        SignedRecord { body, signature, chain }
    }

    fn sign_word(&self, bytes: &[u8]) -> Vec<u8> {
        self.0.key.sign(bytes).expect("a P-256 key can sign")
    }

    fn verify_word(&self, signer: &SignedRecord, bytes: &[u8], signature: &[u8]) -> bool {
        let chain: Vec<CertificateDer<'_>> = signer.chain.iter().map(|c| CertificateDer::from(&c[..])).collect();
        // Verified with the record, and so remembered.
        let leaf = self.0.check_chain(&chain, tls::EXPIRED_GRACE);
        leaf.is_ok_and(|leaf| {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &leaf.public_key).verify(bytes, signature).is_ok()
        })
    }

    fn verify_document(&self, signed: &SignedDocument) -> Result<MeshDocument, DocumentError> {
        let refuse = |why: String| DocumentError::Unverified(why);
        let document = signed.peek().map_err(|e| refuse(e.to_string()))?;
        let refuse = |why: &str| refuse(format!("document {} version {}: {why}", document.kind, document.version));
        let key = self.0.root.key(&signed.certificate, unix_now());
        let key = key.map_err(|why| refuse(&format!("its certificate: {why}")))?;
        if key.role != Role::Admin {
            return Err(refuse("its certificate is not an admin's"));
        }
        match key.signed(&SignedDocument::signed_bytes(&signed.body), &signed.signature) {
            true => Ok(document),
            false => Err(refuse("wrong signature")),
        }
    }

    fn verify_strike(&self, signed: &SignedStrike) -> Result<Strike, RecordError> {
        let strike = signed.peek().map_err(|e| RecordError::Forged(format!("a strike: {e}")))?;
        let refuse = |why: &str| RecordError::Forged(format!("a strike against {:?}: {why}", strike.id));
        let key = self.0.root.key(&signed.certificate, unix_now()).map_err(|why| refuse(&why))?;
        match key.signed(&SignedStrike::signed_bytes(&signed.body), &signed.signature) {
            true => Ok(strike),
            false => Err(refuse("wrong signature")),
        }
    }

    fn verify(&self, signed: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError> {
        let refuse = RecordError::Forged;
        let mut record = signed.peek().map_err(|e| refuse(e.to_string()))?;
        if signed.chain.len() != 2 {
            return Err(refuse(format!(
                "record of {}: {} certificates instead of two",
                record.name,
                signed.chain.len()
            )));
        }
        let chain: Vec<CertificateDer<'_>> = signed.chain.iter().map(|c| CertificateDer::from(&c[..])).collect();
        // A record of a node whose certificate has just ended stays readable: its end is shown, its calls are refused.
        let leaf = self.0.check_chain(&chain, tls::EXPIRED_GRACE).map_err(|e| match e {
            // Clocks differ, and whoever had it before may have kept it.
            CertificateError::Expired => RecordError::Unfit(format!("record of {}: {e}", record.name)),
            _ => refuse(format!("record of {}: {e}", record.name)),
        })?;
        if leaf.id != record.id || leaf.name != record.name {
            return Err(refuse(format!("record of {} is signed by {}", record.name, leaf.name)));
        }
        // Everything else says what the signer means to say; so that first.
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &leaf.public_key);
        key.verify(&SignedRecord::signed_bytes(&signed.body), &signed.signature)
            .map_err(|_| refuse(format!("record of {} has a wrong signature", record.name)))?;
        if record.kind == NodeKind::Edge && !leaf.edge {
            return Err(refuse(format!("{} claims to be an edge without a grant", record.name)));
        }
        if let Some(service) = record.services.iter().find(|s| !leaf.services.contains(&s.name)) {
            return Err(refuse(format!("{} claims service {} without a grant", record.name, service.name)));
        }
        if !leaf.zone.is_empty() && leaf.zone != record.zone {
            return Err(refuse(format!("{} claims to stand in another zone than it was let into", record.name)));
        }
        if let Some(proof) = &record.issuer {
            let key = self.0.root.key(&proof.certificate, unix_now());
            let key = key.map_err(|why| refuse(format!("{} claims to be an issuer: {why}", record.name)))?;
            if key.role != Role::Issuer || !key.signed(&IssuerProof::signed_bytes(leaf.id), &proof.signature) {
                return Err(refuse(format!("{} claims to be an issuer without its key", record.name)));
            }
        }
        // The certificate says when it ends, and not the node.
        record.cert_expires = leaf.not_after;
        Ok(Arc::new(record))
    }
}

/// Checks `leaf` up to one of `roots` at a moment, in unix seconds. Client and server use of certificates is one thing in a mesh.
pub(crate) fn verify_chain(
    leaf: &CertificateDer<'_>,
    issuers: &[CertificateDer<'_>],
    roots: &RootCertStore,
    at: u64,
    provider: &CryptoProvider,
) -> Result<(), rustls::Error> {
    let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
    let parsed = ParsedCertificate::try_from(leaf)?;
    rustls::client::verify_server_cert_signed_by_trust_anchor(
        &parsed,
        roots,
        issuers,
        at,
        provider.signature_verification_algorithms.all,
    )
}

/// The one crypto provider: aws-lc-rs, post-quantum key exchange first.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Now, in unix seconds.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The id that belongs to a key.
pub(crate) fn node_id(key: &impl PublicKeyData) -> NodeId {
    certificate::id_of_spki(&key.subject_public_key_info())
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// The node's key: the stored one, or a new one that is stored before it is used for anything, so that a join that broke
/// off can be repeated with the same key.
pub(crate) fn load_or_create_key(state: &StateDir) -> Result<KeyPair, StateError> {
    if let Some(pem) = state.read_text(KEY)? {
        return KeyPair::from_pem(&pem).map_err(|e| state.damaged(KEY, e));
    }
    let key = KeyPair::generate().expect("the system has randomness");
    state.write(KEY, key.serialize_pem().as_bytes())?;
    Ok(key)
}

pub(crate) fn csr(key: &KeyPair) -> Vec<u8> {
    let mut params = rcgen::CertificateParams::default();
    // The names are the issuer's to give; a CSR only proves the key.
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.serialize_request(key).expect("a P-256 key can sign").der().to_vec()
}

pub(crate) fn pem_text(ders: &[CertificateDer<'_>]) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    ders.iter()
        .map(|der| {
            let body = STANDARD.encode(der);
            let lines: Vec<&str> = (0..body.len()).step_by(64).map(|i| &body[i..body.len().min(i + 64)]).collect();
            format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
        })
        .collect()
}

pub(crate) fn pem_certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let ders: Vec<_> =
        CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    if ders.is_empty() { Err("no certificate in it".into()) } else { Ok(ders) }
}
