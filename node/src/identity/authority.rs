//! The mesh root and its issuers: who may sign certificates, and the tokens that ask for them.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use aws_lc_rs::hmac;
use bytes::Bytes;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519,
    PublicKeyData, SanType, SigningKey as _,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use starling_protocol::{
    Answer, Application, Grant, Grants, IssuerProof, Join, JoinToken, MeshDocument, MeshName, Name, NodeId, Refusal,
    Reservation, SignedAnswer, SignedDocument, SignedReservation, SignedStrike, Strike, TokenClaims, decode, encode,
};
use subtle::ConstantTimeEq;
use time::OffsetDateTime;

use super::{
    certificate::{ADMIN_UNIT, EDGE_UNIT},
    grant::MAX_CERT_LIFE,
    ledger::Ledger,
    node_id, pem_certificates, pem_text,
    rooted::{Role, Root},
    sha256,
    tls::EXPIRED_GRACE,
    unix_now,
};
use crate::state::{StateDir, StateError};

const ROOT_KEY: &str = "root/key.pem";
const ROOT_CERT: &str = "root/cert.pem";
const ISSUER_KEY: &str = "issuer/key.pem";
const ISSUER_CERT: &str = "issuer/cert.pem";
const ISSUER_MESH: &str = "issuer/mesh";
const TOKEN_KEY: &str = "issuer/token.key";

/// Length of the key behind all tokens.
const TOKEN_KEY_BYTES: usize = 32;

const ADMIN_KEY: &str = "admin/key.pem";
const ADMIN_CERT: &str = "admin/cert.pem";

const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86400);
/// As long as the root's, because nothing renews it yet.
const ISSUER_LIFE: Duration = ROOT_LIFE;
/// Clocks of nodes may differ by this much.
pub(crate) const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Default life of a node's certificate.
pub(crate) const DEFAULT_CERT_LIFE: Duration = Duration::from_secs(24 * 3600);

/// Why a mesh cannot be made or its issuer not be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The directory has a mesh already.
    #[error("{path} holds the mesh {mesh:?} already; nothing was changed. Use another --state to make another mesh")]
    Exists {
        /// The directory.
        path: String,
        /// The mesh in it.
        mesh: String,
    },
    /// The directory belongs to a node that joined.
    #[error("{path} belongs to a node that joined a mesh; nothing was changed. Use an empty --state")]
    Joined {
        /// The directory.
        path: String,
    },
    /// No issuer here.
    #[error("{path} holds no issuer; run this where `starling init` was run, or make one with `--issuer`")]
    NotAnIssuer {
        /// The directory.
        path: String,
    },
    /// No admin key here.
    #[error("{path} holds no admin key; run this where `starling init` was run")]
    NoAdmin {
        /// The directory.
        path: String,
    },
    /// A file.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What a token is asked to be.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// What its bearer may be.
    pub grants: Grants,
    /// Where to join.
    pub seeds: Vec<String>,
    /// How long it is good.
    pub ttl: Duration,
    /// How many nodes may join with it.
    pub uses: u32,
}

/// An issuer: signs certificates for nodes, makes tokens and counts their uses.
pub struct Authority {
    state: StateDir,
    mesh: MeshName,
    key: KeyPair,
    cert: CertificateDer<'static>,
    root: CertificateDer<'static>,
    token_key: hmac::Key,
    cert_life: Duration,
    /// Serialises what may happen once: read, decide, store, answer.
    ledger: Mutex<Ledger>,
}

/// A join whose proof holds and which its token allows.
pub(crate) struct Examined {
    claims: TokenClaims,
    pub(crate) application: Application,
    key: rcgen::PublicKey,
    pub(crate) id: NodeId,
}

impl Examined {
    /// SHA-256 of what is asked for: the keys, the name and the services. The signatures differ each time.
    fn identity(&self) -> [u8; 32] {
        let Application { name, services, issuer_csr, .. } = &self.application;
        let issuer = issuer_csr.as_deref().and_then(|csr| read_csr(csr).ok()).map(|key| node_id(&key));
        let services: Vec<&str> = services.iter().map(Name::as_str).collect();
        let text = format!("{} {} {issuer:?} {}", self.id, name, services.join(" "));
        sha256(text.as_bytes())
    }
}

impl Authority {
    /// Makes the mesh root and the first issuer. Changes nothing if the directory is taken.
    pub fn init(state: &StateDir, mesh: &MeshName) -> Result<(), AuthorityError> {
        let path = || state.path().display().to_string();
        if let Some(existing) = state.read_text(ISSUER_MESH)? {
            return Err(AuthorityError::Exists { path: path(), mesh: existing });
        }
        if state.has("identity/chain.pem") {
            return Err(AuthorityError::Joined { path: path() });
        }
        let root_key = KeyPair::generate().expect("the system has randomness");
        let mut root = ca_params(&format!("{mesh} root"), ROOT_LIFE);
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root_cert = root.self_signed(&root_key).expect("a P-256 key can sign");
        let issuer_key = KeyPair::generate().expect("the system has randomness");
        let issuer_cert = sign_issuer(mesh, &issuer_key, root_cert.der(), &root_key).expect("a P-256 key can sign");
        let token_key: [u8; 32] = rand::random();

        let admin_key = KeyPair::generate_for(&PKCS_ED25519).expect("the system has randomness");
        let admin_cert = sign_admin(mesh, &admin_key, root_cert.der(), &root_key).expect("a P-256 key can sign");

        state.write(ADMIN_KEY, admin_key.serialize_pem().as_bytes())?;
        state.write(ADMIN_CERT, pem_text(std::slice::from_ref(&admin_cert)).as_bytes())?;
        state.write(ROOT_KEY, root_key.serialize_pem().as_bytes())?;
        state.write(ROOT_CERT, root_cert.pem().as_bytes())?;
        Self::store_issuer(state, mesh, &issuer_key, &issuer_cert, &token_key)?;
        Ok(())
    }

    /// Stores a second issuer's key and the certificate that a first one gave it.
    pub(crate) fn establish(
        state: &StateDir,
        mesh: &MeshName,
        key: &KeyPair,
        cert: &CertificateDer<'_>,
        root: &CertificateDer<'_>,
    ) -> Result<(), StateError> {
        state.write(ROOT_CERT, pem_text(std::slice::from_ref(root)).as_bytes())?;
        Self::store_issuer(state, mesh, key, cert, &rand::random())
    }

    /// The key of an issuer that is to be: the stored one, or a new one that is stored before it is used for anything.
    pub(crate) fn load_or_create_key(state: &StateDir) -> Result<KeyPair, StateError> {
        if let Some(pem) = state.read_text(ISSUER_KEY)? {
            return KeyPair::from_pem(&pem).map_err(|e| state.damaged(ISSUER_KEY, e));
        }
        let key = KeyPair::generate().expect("the system has randomness");
        state.write(ISSUER_KEY, key.serialize_pem().as_bytes())?;
        Ok(key)
    }

    fn store_issuer(
        state: &StateDir,
        mesh: &MeshName,
        key: &KeyPair,
        cert: &CertificateDer<'_>,
        token_key: &[u8; 32],
    ) -> Result<(), StateError> {
        state.write(ISSUER_KEY, key.serialize_pem().as_bytes())?;
        state.write(ISSUER_CERT, pem_text(std::slice::from_ref(cert)).as_bytes())?;
        state.write(TOKEN_KEY, token_key)?;
        // The mesh name last: its presence is what makes the issuer complete.
        state.write(ISSUER_MESH, mesh.as_str().as_bytes())
    }

    /// Loads the issuer of a state directory; `None` if it has none.
    pub fn load(state: &StateDir) -> Result<Option<Self>, StateError> {
        let Some(mesh) = state.read_text(ISSUER_MESH)? else { return Ok(None) };
        let text = |name| state.read_text(name)?.ok_or_else(|| state.damaged(name, "missing"));
        let certificate = |name| -> Result<CertificateDer<'static>, StateError> {
            pem_certificates(&text(name)?).map(|mut c| c.swap_remove(0)).map_err(|e| state.damaged(name, e))
        };
        let token_key = state.read(TOKEN_KEY)?.ok_or_else(|| state.damaged(TOKEN_KEY, "missing"))?;
        if token_key.len() != TOKEN_KEY_BYTES || token_key.iter().all(|byte| *byte == 0) {
            return Err(state.damaged(TOKEN_KEY, format!("it is not {TOKEN_KEY_BYTES} random bytes")));
        }
        let key = KeyPair::from_pem(&text(ISSUER_KEY)?).map_err(|e| state.damaged(ISSUER_KEY, e))?;
        let (cert, root) = (certificate(ISSUER_CERT)?, certificate(ROOT_CERT)?);
        let vouched = Root::new(root.clone()).key(&cert, unix_now()).map_err(|why| state.damaged(ISSUER_CERT, why))?;
        if vouched.role != Role::Issuer || vouched.id != node_id(&key) {
            return Err(state.damaged(ISSUER_CERT, "it is not for the issuing key"));
        }
        Ok(Some(Self {
            mesh: mesh.trim().parse().map_err(|e| state.damaged(ISSUER_MESH, e))?,
            key,
            cert,
            root,
            token_key: hmac::Key::new(hmac::HMAC_SHA256, &token_key),
            cert_life: DEFAULT_CERT_LIFE,
            ledger: Mutex::new(Ledger::open(state)?),
            state: state.clone(),
        }))
    }

    /// Loads the issuer of a state directory, or says that there is none.
    pub fn require(state: &StateDir) -> Result<Self, AuthorityError> {
        Self::load(state)?.ok_or_else(|| AuthorityError::NotAnIssuer { path: state.path().display().to_string() })
    }

    /// Sets how long certificates live.
    pub(crate) fn with_cert_life(mut self, life: Duration) -> Self {
        // Nodes take none that is good for longer.
        self.cert_life = life.min(MAX_CERT_LIFE);
        self
    }

    /// The mesh.
    pub fn mesh(&self) -> &MeshName {
        &self.mesh
    }

    /// The issuing key's id, as tokens name it.
    pub fn id(&self) -> NodeId {
        node_id(&self.key)
    }

    /// Makes a token. Needs no running node, and leaves no trace until it is used.
    pub fn token(&self, request: &TokenRequest) -> JoinToken {
        let claims = TokenClaims {
            mesh: self.mesh.clone(),
            root: sha256(&self.root),
            issuer: self.id(),
            id: rand::random(),
            expires: unix_now().saturating_add(request.ttl.as_secs()),
            uses: request.uses,
            grants: request.grants.clone(),
            seeds: request.seeds.clone(),
        };
        let secret = self.token_secret(&claims.encode());
        JoinToken::new(claims, secret)
    }

    fn token_secret(&self, claims: &[u8]) -> [u8; 32] {
        hmac::sign(&self.token_key, claims).as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")
    }

    /// The word of this issuer that the node in whose directory it lives may admit others.
    pub(crate) fn proof(&self, node: NodeId) -> IssuerProof {
        let signature = self.sign(&IssuerProof::signed_bytes(node));
        IssuerProof { certificate: Bytes::copy_from_slice(&self.cert), signature }
    }

    /// An answer that nobody can alter, to the request of that hash.
    pub(crate) fn answer(&self, request: [u8; 32], outcome: Result<Grant, Refusal>) -> SignedAnswer {
        let (granted, refused) = match outcome {
            Ok(grant) => (Some(grant), None),
            Err(refusal) => (None, Some(refusal)),
        };
        let body: Bytes = encode(&Answer { request, granted, refused }).into();
        let signature = self.sign(&SignedAnswer::signed_bytes(&body));
        SignedAnswer { body, signature, issuer: Bytes::copy_from_slice(&self.cert) }
    }

    /// Strikes a dead member off, in this issuer's name.
    pub(crate) fn strike(&self, strike: &Strike) -> SignedStrike {
        let body = SignedStrike::encode_body(strike);
        let signature = self.sign(&SignedStrike::signed_bytes(&body));
        SignedStrike { body, signature, certificate: Bytes::copy_from_slice(&self.cert) }
    }

    fn sign(&self, bytes: &[u8]) -> Bytes {
        self.key.sign(bytes).expect("a P-256 key can sign").into()
    }

    fn sign_reservation(&self, reservation: &Reservation) -> SignedReservation {
        let body: Bytes = encode(reservation).into();
        let signature = self.sign(&SignedReservation::signed_bytes(&body));
        SignedReservation { body, signature, issuer: Bytes::copy_from_slice(&self.cert) }
    }

    /// Looks at a join: who asks, and whether the token lets it. Changes nothing.
    pub(crate) fn examine(&self, join: &Join) -> Result<Examined, Refusal> {
        let application: Application = decode(&join.application).map_err(Refusal::malformed)?;
        let secret = self.token_secret(&application.claims);
        let proof = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), &Join::proven_bytes(&join.application));
        if !bool::from(proof.as_ref().ct_eq(&join.proof)) {
            return Err(Refusal::forged());
        }
        let claims = TokenClaims::decode_in_full(&application.claims).map_err(Refusal::malformed)?;
        if claims.mesh != self.mesh {
            return Err(Refusal::foreign());
        }
        if claims.expires <= unix_now() {
            return Err(Refusal::expired());
        }
        if let Some(service) = application.services.iter().find(|s| !claims.grants.services.contains(s)) {
            return Err(Refusal::not_granted(format!("service {service}")));
        }
        if !claims.grants.admits_name(&application.name) {
            return Err(Refusal::not_granted(format!("the name {}", application.name)));
        }
        if application.issuer_csr.is_some() && !claims.grants.issuer {
            return Err(Refusal::not_granted("an issuer"));
        }
        let key = read_csr(&application.csr)?;
        let id = node_id(&key);
        Ok(Examined { claims, application, key, id })
    }

    /// Counts a use of the token, and makes the name the joiner's, on disk. In that order: a token that is used up gives no
    /// names away.
    pub(crate) fn book(&self, examined: &Examined) -> Result<(), Refusal> {
        let mut ledger = self.ledger();
        ledger.spend(&examined.claims, &examined.identity(), unix_now())?;
        let reserved = self.reserve(&mut ledger, &examined.application.name, examined.id);
        if reserved.is_err() {
            ledger.unspend(&examined.claims, &examined.identity());
        }
        reserved
    }

    /// The name has turned out to be another's.
    pub(crate) fn unbook(&self, examined: &Examined) {
        self.ledger().unspend(&examined.claims, &examined.identity());
    }

    fn reserve(&self, ledger: &mut Ledger, name: &Name, id: NodeId) -> Result<(), Refusal> {
        let now = unix_now();
        let until = now + self.cert_life.as_secs() + EXPIRED_GRACE.as_secs();
        ledger.reserve(name, id, until, now, |reservation| self.sign_reservation(reservation))
    }

    /// Whether the name is another key's.
    pub(crate) fn is_taken(&self, name: &Name, id: NodeId) -> bool {
        self.ledger().holder(name, unix_now()).is_some_and(|holder| holder != id.to_string())
    }

    /// Admits. The use is counted and the name reserved already.
    pub(crate) fn admit(&self, examined: &Examined) -> Result<Grant, Refusal> {
        let Examined { claims, application, key, .. } = examined;
        let issuer_cert = application.issuer_csr.as_deref().map(|csr| self.sign_second_issuer(csr)).transpose()?;
        let leaf = self.sign_node(&application.name, &claims.grants, key)?;
        Ok(self.grant(leaf, issuer_cert))
    }

    /// Signs the next certificate for the key and names of `current`, which the caller has verified. The name must still be
    /// that key's.
    pub(crate) fn renew(&self, current: &super::certificate::MeshCertificate, csr: &[u8]) -> Result<Grant, Refusal> {
        let key = read_csr(csr)?;
        if node_id(&key) != current.id {
            return Err(Refusal::not_renewable("the request is for another key"));
        }
        {
            let mut ledger = self.ledger();
            if ledger.was_freed(&current.name, current.id) {
                return Err(Refusal::not_renewable("its name was freed"));
            }
            self.reserve(&mut ledger, &current.name, current.id)?;
        }
        let (services, zone) = (current.services.clone(), current.zone.clone());
        let grants = Grants { services, edge: current.edge, zone, ..Grants::default() };
        Ok(self.grant(self.sign_node(&current.name, &grants, &key)?, None))
    }

    fn grant(&self, leaf: CertificateDer<'static>, issuer_cert: Option<CertificateDer<'static>>) -> Grant {
        let bytes = |der: &CertificateDer<'_>| Bytes::copy_from_slice(der);
        Grant {
            chain: vec![bytes(&leaf), bytes(&self.cert)],
            root: bytes(&self.root),
            issuer_cert: issuer_cert.as_ref().map(bytes),
            peers: Vec::new(),
            floors: Vec::new(),
        }
    }

    /// A certificate for the node in whose directory this issuer lives.
    pub(crate) fn self_issue(
        &self,
        name: &Name,
        grants: &Grants,
        key: &KeyPair,
    ) -> Result<(Vec<CertificateDer<'static>>, CertificateDer<'static>), Refusal> {
        self.reserve(&mut self.ledger(), name, node_id(key))?;
        let leaf = self.sign_node(name, grants, key)?;
        Ok((vec![leaf, self.cert.clone()], self.root.clone()))
    }

    /// Names, for other issuers: that one, or all.
    pub(crate) fn reservations(&self, of: Option<&Name>) -> Vec<SignedReservation> {
        self.ledger().signed(of)
    }

    /// The same at issuers that have the same names.
    pub(crate) fn names_digest(&self) -> [u8; 32] {
        self.ledger().digest()
    }

    /// Takes names that other issuers have given; each must be signed by an issuer of this mesh, and is passed over if not.
    /// Which of them were passed over.
    pub(crate) fn take_reservations(&self, entries: &[SignedReservation], root: &Root) -> Result<usize, String> {
        let now = unix_now();
        let (mut verified, mut wrong) = (Vec::new(), 0);
        for signed in entries {
            let Ok(reservation) = decode::<Reservation>(&signed.body) else {
                wrong += 1;
                continue;
            };
            if self.ledger().has(&reservation.name, signed) {
                continue;
            }
            let bytes = SignedReservation::signed_bytes(&signed.body);
            let key = root.key(&signed.issuer, now);
            match key.is_ok_and(|key| key.role == Role::Issuer && key.signed(&bytes, &signed.signature)) {
                true => verified.push((reservation, signed.clone())),
                false => wrong += 1,
            }
        }
        self.ledger().merge(verified, now).map(|_| wrong)
    }

    /// Names that are somebody's: the key's id, since when and until when, unix seconds.
    pub(crate) fn names(&self) -> Vec<(Name, String, u64, u64)> {
        self.ledger().names(unix_now())
    }

    /// Frees a name; `false` if nobody has it.
    pub(crate) fn free(&self, name: &Name) -> Result<bool, String> {
        self.ledger().free(name, unix_now(), |reservation| self.sign_reservation(reservation))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn sign_node(
        &self,
        name: &Name,
        grants: &Grants,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, Refusal> {
        let refuse = |e: rcgen::Error| Refusal::issuer(e);
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name.as_str());
        if grants.edge {
            params.distinguished_name.push(DnType::OrganizationalUnitName, EDGE_UNIT);
        }
        if !grants.zone.is_empty() {
            params.distinguished_name.push(DnType::LocalityName, grants.zone.as_str());
        }
        let uri = self.mesh.spiffe_id(name).try_into().map_err(refuse)?;
        params.subject_alt_names.push(SanType::URI(uri));
        for service in &grants.services {
            params.subject_alt_names.push(SanType::DnsName(service.service_host().try_into().map_err(refuse)?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        validity(&mut params, self.cert_life);
        let issuer = Issuer::from_ca_cert_der(&self.cert, &self.key).map_err(refuse)?;
        Ok(params.signed_by(key, &issuer).map_err(refuse)?.der().clone())
    }

    fn sign_second_issuer(&self, csr: &[u8]) -> Result<CertificateDer<'static>, Refusal> {
        let pem = self.state.read_text(ROOT_KEY).map_err(Refusal::issuer)?.ok_or_else(|| {
            Refusal::issuer("the root key is not on the issuer that made the token; use it where the key is")
        })?;
        let root_key = KeyPair::from_pem(&pem).map_err(Refusal::issuer)?;
        sign_issuer(&self.mesh, &read_csr(csr)?, &self.root, &root_key).map_err(Refusal::issuer)
    }
}

/// A holder of the mesh's admin key: signs what the whole mesh shall follow.
pub struct Admin {
    key: KeyPair,
    cert: CertificateDer<'static>,
}

impl Admin {
    /// Loads the admin key of a state directory, or says that there is none.
    pub fn require(state: &StateDir) -> Result<Self, AuthorityError> {
        let none = || AuthorityError::NoAdmin { path: state.path().display().to_string() };
        let (key, cert) = (state.read_text(ADMIN_KEY)?.ok_or_else(none)?, state.read_text(ADMIN_CERT)?);
        let cert = cert.ok_or_else(|| state.damaged(ADMIN_CERT, "missing"))?;
        let key = KeyPair::from_pem(&key).map_err(|e| state.damaged(ADMIN_KEY, e))?;
        let cert = pem_certificates(&cert).map_err(|e| state.damaged(ADMIN_CERT, e))?.swap_remove(0);
        Ok(Self { key, cert })
    }

    /// Signs a document.
    pub fn sign(&self, document: &MeshDocument) -> SignedDocument {
        let body = SignedDocument::encode_body(document);
        let signature = self.sign_bytes(&SignedDocument::signed_bytes(&body));
        SignedDocument { body, signature, certificate: Bytes::copy_from_slice(&self.cert) }
    }

    /// Signs that a dead member is given up.
    pub fn strike(&self, strike: &Strike) -> SignedStrike {
        let body = SignedStrike::encode_body(strike);
        let signature = self.sign_bytes(&SignedStrike::signed_bytes(&body));
        SignedStrike { body, signature, certificate: Bytes::copy_from_slice(&self.cert) }
    }

    fn sign_bytes(&self, bytes: &[u8]) -> Bytes {
        self.key.sign(bytes).expect("an Ed25519 key can sign").into()
    }
}

/// Shared by the parts of a node that sign.
pub(crate) type SharedAuthority = Option<Arc<Authority>>;

fn read_csr(der: &[u8]) -> Result<rcgen::PublicKey, Refusal> {
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
        .map_err(|e| Refusal::malformed(format!("certificate request: {e}")))?;
    // Everything that a node signs is verified as P-256.
    match request.public_key.algorithm() == &PKCS_ECDSA_P256_SHA256 && request.public_key.der_bytes().len() == 65 {
        true => Ok(request.public_key),
        false => Err(Refusal::malformed("certificate request: the key is not ECDSA P-256")),
    }
}

fn sign_issuer(
    mesh: &MeshName,
    key: &impl PublicKeyData,
    root: &CertificateDer<'_>,
    root_key: &KeyPair,
) -> Result<CertificateDer<'static>, rcgen::Error> {
    // Issuers of one mesh differ by key; a name of its own keeps path building unambiguous.
    let mut params = ca_params(&format!("{mesh} issuer {:?}", node_id(key)), ISSUER_LIFE);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let issuer = Issuer::from_ca_cert_der(root, root_key)?;
    Ok(params.signed_by(key, &issuer)?.der().clone())
}

/// The admin key's certificate: good for documents and for nothing else, as it has none of a node's names.
fn sign_admin(
    mesh: &MeshName,
    key: &KeyPair,
    root: &CertificateDer<'_>,
    root_key: &KeyPair,
) -> Result<CertificateDer<'static>, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(&format!("{mesh} admin"));
    params.distinguished_name.push(DnType::OrganizationalUnitName, ADMIN_UNIT);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    validity(&mut params, ROOT_LIFE);
    let issuer = Issuer::from_ca_cert_der(root, root_key)?;
    Ok(params.signed_by(key, &issuer)?.der().clone())
}

fn ca_params(name: &str, life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, life);
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    dn
}

fn validity(params: &mut CertificateParams, life: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + life;
}
