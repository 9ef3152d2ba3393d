//! The mesh root and its issuers: who may sign certificates, and the tokens that ask for them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use aws_lc_rs::hmac;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType,
    SigningKey as _,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use serde::{Deserialize, Serialize};
use starling_protocol::{
    Grant, Grants, Join, JoinToken, MeshDocument, MeshName, Name, NodeId, Refusal, SignedDocument, TokenClaims, encode,
};
use subtle::ConstantTimeEq;
use time::OffsetDateTime;

use super::{
    certificate::{ADMIN_UNIT, EDGE_UNIT},
    node_id, pem_certificates, pem_text, sha256, unix_now,
};
use crate::state::{StateDir, StateError};

const ROOT_KEY: &str = "root/key.pem";
const ROOT_CERT: &str = "root/cert.pem";
const ISSUER_KEY: &str = "issuer/key.pem";
const ISSUER_CERT: &str = "issuer/cert.pem";
const ISSUER_MESH: &str = "issuer/mesh";
const TOKEN_KEY: &str = "issuer/token.key";
const SPENT: &str = "issuer/spent.json";

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
    /// Serialises use counting: read, decide, store, answer.
    spent: Mutex<Spent>,
}

/// Uses by token id (hex): which keys joined with it. Kept until the token has expired anyway.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Spent(HashMap<String, SpentToken>);

#[derive(Debug, Serialize, Deserialize)]
struct SpentToken {
    expires: u64,
    /// Ids of the keys, hex. The same key may repeat its join: its answer may have been lost.
    keys: Vec<String>,
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
        let spent = match state.read(SPENT)? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| state.damaged(SPENT, e))?,
            None => Spent::default(),
        };
        Ok(Some(Self {
            mesh: mesh.trim().parse().map_err(|e| state.damaged(ISSUER_MESH, e))?,
            key: KeyPair::from_pem(&text(ISSUER_KEY)?).map_err(|e| state.damaged(ISSUER_KEY, e))?,
            cert: certificate(ISSUER_CERT)?,
            root: certificate(ROOT_CERT)?,
            token_key: hmac::Key::new(hmac::HMAC_SHA256, &token_key),
            cert_life: DEFAULT_CERT_LIFE,
            spent: Mutex::new(spent),
            state: state.clone(),
        }))
    }

    /// Loads the issuer of a state directory, or says that there is none.
    pub fn require(state: &StateDir) -> Result<Self, AuthorityError> {
        Self::load(state)?.ok_or_else(|| AuthorityError::NotAnIssuer { path: state.path().display().to_string() })
    }

    /// Sets how long certificates live.
    pub(crate) fn with_cert_life(mut self, life: Duration) -> Self {
        self.cert_life = life;
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
        let secret = self.token_secret(&encode(&claims));
        JoinToken::new(claims, secret)
    }

    fn token_secret(&self, claims: &[u8]) -> [u8; 32] {
        hmac::sign(&self.token_key, claims).as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")
    }

    /// Decides about a join; counts the use on disk before it answers. `is_taken` tells whether a live node other than the
    /// given one has the name.
    pub(crate) fn admit(
        &self,
        join: &Join,
        is_taken: impl Fn(&Name, NodeId) -> bool,
    ) -> Result<(Grant, Grants), Refusal> {
        let proof =
            hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.token_secret(&join.claims)), &join.proven_bytes());
        if !bool::from(proof.as_ref().ct_eq(&join.proof)) {
            return Err(Refusal::Forged);
        }
        let claims: TokenClaims = starling_protocol::decode(&join.claims).map_err(|_| Refusal::Forged)?;
        if claims.mesh != self.mesh {
            return Err(Refusal::Foreign);
        }
        if claims.expires <= unix_now() {
            return Err(Refusal::Expired);
        }
        if let Some(service) = join.services.iter().find(|s| !claims.grants.services.contains(s)) {
            return Err(Refusal::NotGranted(format!("service {service}")));
        }
        if join.issuer_csr.is_some() && !claims.grants.issuer {
            return Err(Refusal::NotGranted("an issuer".into()));
        }
        let key = read_csr(&join.csr)?;
        let id = node_id(&key);
        if is_taken(&join.name, id) {
            return Err(Refusal::NameTaken(join.name.clone()));
        }
        // Everything that can fail for another reason comes before the use is counted.
        let issuer_cert = join.issuer_csr.as_deref().map(|csr| self.sign_second_issuer(csr)).transpose()?;
        let leaf = self.sign_node(&join.name, &claims.grants.services, claims.grants.edge, &key)?;
        self.spend(&claims, id)?;
        let grant = Grant {
            chain: vec![leaf.to_vec(), self.cert.to_vec()],
            roots: vec![self.root.to_vec()],
            issuer_cert: issuer_cert.map(|c| c.to_vec()),
            peers: Vec::new(),
        };
        Ok((grant, claims.grants))
    }

    /// Signs the next certificate for the key and names of `current`, which the caller has verified.
    pub(crate) fn renew(
        &self,
        current: &super::certificate::MeshCertificate,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let key = read_csr(csr)?;
        if node_id(&key) != current.id {
            return Err(Refusal::NotRenewable("the request is for another key".into()));
        }
        let leaf = self.sign_node(&current.name, &current.services, current.edge, &key)?;
        Ok(vec![leaf, self.cert.clone()])
    }

    /// A certificate for the node in whose directory this issuer lives.
    pub(crate) fn self_issue(
        &self,
        name: &Name,
        services: &[Name],
        edge: bool,
        key: &KeyPair,
    ) -> Result<(Vec<CertificateDer<'static>>, CertificateDer<'static>), Refusal> {
        let leaf = self.sign_node(name, services, edge, key)?;
        Ok((vec![leaf, self.cert.clone()], self.root.clone()))
    }

    fn sign_node(
        &self,
        name: &Name,
        services: &[Name],
        edge: bool,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, Refusal> {
        let refuse = |e: rcgen::Error| Refusal::Issuer(e.to_string());
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name.as_str());
        if edge {
            params.distinguished_name.push(DnType::OrganizationalUnitName, EDGE_UNIT);
        }
        let uri = self.mesh.spiffe_id(name).try_into().map_err(refuse)?;
        params.subject_alt_names.push(SanType::URI(uri));
        for service in services {
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
        let pem = self.state.read_text(ROOT_KEY).map_err(|e| Refusal::Issuer(e.to_string()))?.ok_or_else(|| {
            Refusal::Issuer("the root key is not on the issuer that made the token; use it where the key is".into())
        })?;
        let root_key = KeyPair::from_pem(&pem).map_err(|e| Refusal::Issuer(e.to_string()))?;
        sign_issuer(&self.mesh, &read_csr(csr)?, &self.root, &root_key).map_err(|e| Refusal::Issuer(e.to_string()))
    }

    fn spend(&self, claims: &TokenClaims, id: NodeId) -> Result<(), Refusal> {
        let mut spent = self.spent.lock().unwrap_or_else(|e| e.into_inner());
        let now = unix_now();
        spent.0.retain(|_, token| token.expires > now);
        let token_id = NodeId(claims.id).to_string();
        let token = spent.0.entry(token_id).or_insert_with(|| SpentToken { expires: claims.expires, keys: Vec::new() });
        let key = id.to_string();
        if token.keys.contains(&key) {
            return Ok(());
        }
        if token.keys.len() >= claims.uses as usize {
            return Err(Refusal::Used);
        }
        token.keys.push(key.clone());
        let stored = serde_json::to_vec_pretty(&*spent).map_err(|e| e.to_string());
        let stored = stored.and_then(|bytes| self.state.write(SPENT, &bytes).map_err(|e| e.to_string()));
        stored.map_err(|e| {
            // Not on disk, so not spent: the joiner gets no certificate either.
            if let Some(token) = spent.0.get_mut(&NodeId(claims.id).to_string()) {
                token.keys.retain(|k| *k != key);
            }
            Refusal::Issuer(e)
        })
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
        let signature = self.key.sign(&SignedDocument::signed_bytes(&body)).expect("an Ed25519 key can sign");
        SignedDocument { body, signature, certificate: self.cert.to_vec() }
    }
}

/// Shared by the parts of a node that sign.
pub(crate) type SharedAuthority = Option<Arc<Authority>>;

fn read_csr(der: &[u8]) -> Result<rcgen::PublicKey, Refusal> {
    CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
        .map(|request| request.public_key)
        .map_err(|e| Refusal::Malformed(format!("certificate request: {e}")))
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
