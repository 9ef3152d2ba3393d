//! The asking side of `starling-join/1`: how a node gets its first certificate.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use bytes::Bytes;
use rustls::{crypto::CryptoProvider, pki_types::CertificateDer};
use starling_protocol::{
    Application, CloseCode, Floor, Grants, Join, JoinToken, Name, NodeId, Refusal, RefusalCode, SignedAnswer, encode,
};

use super::{
    Identity,
    admission::exchange,
    authority::Authority,
    csr,
    grant::{self, Expected, Request},
    load_or_create_key, node_id,
    rooted::{Role, Root},
    sha256, unix_now,
};
use crate::{
    identity::tls,
    mesh::documents,
    port::endpoint::{CONTROL, client_config, joining_endpoint},
    state::{StateDir, StateError},
};

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a seed's address may take to show that somebody is there.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(15);

/// Why a node cannot join, and will not by trying again.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The mesh says no.
    #[error("the mesh refused: {0}")]
    Refused(#[from] Refusal),
    /// Neither the token nor the flags name one.
    #[error("no seed to join at; add --seed HOST:PORT")]
    NoSeed,
    /// A file.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What a node brings to a join.
pub(crate) struct Bid<'a> {
    pub(crate) token: &'a JoinToken,
    pub(crate) name: &'a Name,
    pub(crate) services: &'a [Name],
    pub(crate) seeds: &'a [String],
}

/// What a node has after one.
pub(crate) struct Joined {
    pub(crate) identity: Identity,
    pub(crate) peers: Vec<SocketAddr>,
}

/// Joins through the first seed whose answer holds. Seeds that do not answer, or answer with something else than the word of
/// the token's issuer, are told about and tried again for ever; an issuer's refusal is final.
pub(crate) async fn join(state: &StateDir, bid: &Bid<'_>, provider: Arc<CryptoProvider>) -> Result<Joined, JoinError> {
    let token = bid.token;
    let seeds: Vec<&String> = bid.seeds.iter().chain(&token.claims.seeds).collect();
    if seeds.is_empty() {
        return Err(JoinError::NoSeed);
    }
    let key = load_or_create_key(state)?;
    // Kept, so that a join that broke off can be repeated.
    let issuer_key = match token.claims.grants.issuer {
        true => Some(Authority::load_or_create_key(state)?),
        false => None,
    };
    let application = Application {
        version: Application::VERSION,
        claims: token.claims_bytes.clone(),
        name: bid.name.clone(),
        services: bid.services.to_vec(),
        csr: csr(&key).into(),
        issuer_csr: issuer_key.as_ref().map(|key| csr(key).into()),
    };
    let application: Bytes = encode(&application).into();
    let secret = hmac::Key::new(hmac::HMAC_SHA256, &token.secret);
    let mut proof = [0; 32];
    proof.copy_from_slice(hmac::sign(&secret, &Join::proven_bytes(&application)).as_ref());
    let request = Request::new(&Join { application, proof });
    let wanted = Wanted { token, name: bid.name, id: node_id(&key), issuer: issuer_key.as_ref().map(node_id) };

    let mut pause = RETRY_MIN;
    let granted = 'joined: loop {
        let mut foreign = 0;
        for seed in &seeds {
            match attempt(seed, &wanted, &request, &provider).await {
                Ok(granted) => break 'joined granted,
                Err(Unjoined::Refused(refusal)) if refusal.passes => {
                    tracing::warn!(%seed, %refusal, "cannot join yet; trying again");
                }
                Err(Unjoined::Refused(refusal)) => return Err(refusal.into()),
                Err(Unjoined::Foreign) => {
                    tracing::warn!(%seed, "a node of another mesh answers there");
                    foreign += 1;
                }
                Err(Unjoined::Hint(refusal)) => {
                    tracing::warn!(%seed, %refusal, "the seed says no, which is not its to say; trying again");
                }
                Err(Unjoined::Bad(why)) => {
                    tracing::error!(%seed, why, "the seed's answer is not from the token's issuer; nothing of it is used");
                }
                Err(Unjoined::Fault(error)) => {
                    tracing::warn!(%seed, error, "seed does not answer; trying again for as long as it takes");
                }
            }
        }
        if foreign == seeds.len() {
            return Err(Refusal::foreign().into());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    };
    let Granted { chain, root, issuer_cert, peers, floors } = granted;
    if let (Some(key), Some(cert)) = (issuer_key, issuer_cert) {
        // Before the identity, which marks the join as done.
        Authority::establish(state, &token.claims.mesh, &key, &cert, &root)?;
    }
    documents::keep_floors(state, &floors)?;
    let identity = Identity::establish(state, key, chain, root, provider)?;
    Ok(Joined { identity, peers })
}

/// What the answer must be about.
struct Wanted<'a> {
    token: &'a JoinToken,
    name: &'a Name,
    id: NodeId,
    /// Of the issuing key, if there is to be one.
    issuer: Option<NodeId>,
}

/// A grant that was checked.
struct Granted {
    chain: Vec<CertificateDer<'static>>,
    root: CertificateDer<'static>,
    issuer_cert: Option<CertificateDer<'static>>,
    peers: Vec<SocketAddr>,
    floors: Vec<Floor>,
}

enum Unjoined {
    /// Somebody else's mesh answers there.
    Foreign,
    /// The token's issuer says no.
    Refused(Refusal),
    /// Somebody says no.
    Hint(Refusal),
    /// What came back does not hold.
    Bad(String),
    Fault(String),
}

async fn attempt(
    seed: &str,
    wanted: &Wanted<'_>,
    request: &Request,
    provider: &Arc<CryptoProvider>,
) -> Result<Granted, Unjoined> {
    let addrs = tokio::net::lookup_host(seed).await.map_err(|e| Unjoined::Fault(e.to_string()))?;
    let mut silent = Unjoined::Fault("the name has no address".into());
    // A name may have an address that leads nowhere from here, such as an IPv6 one; the next may do.
    for addr in addrs {
        match attempt_at(addr, wanted, request, provider).await {
            Err(Unjoined::Fault(why)) => silent = Unjoined::Fault(format!("{addr}: {why}")),
            outcome => return outcome,
        }
    }
    Err(silent)
}

async fn attempt_at(
    addr: SocketAddr,
    wanted: &Wanted<'_>,
    request: &Request,
    provider: &Arc<CryptoProvider>,
) -> Result<Granted, Unjoined> {
    let fault = |e: &dyn std::fmt::Display| Unjoined::Fault(e.to_string());
    let endpoint = joining_endpoint(addr).map_err(|e| fault(&e))?;
    let pinned = wanted.token.claims.root;
    let crypto = tls::joining_crypto(provider.clone(), pinned);
    let asked = async {
        let connecting =
            endpoint.connect_with(client_config(crypto, CONTROL), addr, tls::SERVER_NAME).map_err(|e| fault(&e))?;
        let connection = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await;
        let connection = connection
            .map_err(|_| Unjoined::Fault("no answer in time".into()))?
            .map_err(|e| if is_foreign(&e) { Unjoined::Foreign } else { fault(&e) })?;
        let root = shown_root(&connection, pinned).ok_or_else(|| Unjoined::Fault("it shows no root".into()))?;
        let reply = exchange(&connection, request).await.map_err(|e| fault(&e));
        connection.close((CloseCode::Done as u32).into(), b"");
        endpoint.wait_idle().await;
        Ok((reply?, root))
    };
    let asked = tokio::time::timeout(ATTEMPT_TIMEOUT, asked).await;
    let (frame, root) = asked.unwrap_or_else(|_| Err(Unjoined::Fault("no answer in time".into())))?;
    if let Ok(hint) = frame.read::<Refusal>() {
        let passes = hint.passes || hint.code == RefusalCode::IssuerUnreachable;
        return Err(if passes { Unjoined::Refused(Refusal { passes, ..hint }) } else { Unjoined::Hint(hint) });
    }
    let signed: SignedAnswer = frame.read().map_err(|e| Unjoined::Bad(e.to_string()))?;
    check(&signed, wanted, request, &Root::new(root), provider)
}

/// Checks an answer in full: that the token's issuer gave it, to this request, and that what is granted is what the token
/// says.
fn check(
    signed: &SignedAnswer,
    wanted: &Wanted<'_>,
    request: &Request,
    root: &Root,
    provider: &CryptoProvider,
) -> Result<Granted, Unjoined> {
    let claims = &wanted.token.claims;
    let verdict = grant::verdict(signed, request, root).map_err(Unjoined::Bad)?;
    if verdict.issuer != claims.issuer {
        return Err(Unjoined::Bad("another issuer has signed it".into()));
    }
    let grant = verdict.outcome.map_err(Unjoined::Refused)?;
    let Grants { services, edge, zone, .. } = claims.grants.clone();
    let grants = Grants { services, edge, zone, ..Grants::default() };
    let expected = Expected { id: wanted.id, mesh: &claims.mesh, name: wanted.name, grants: &grants };
    let chain = grant::check_chain(&grant, verdict.issuer, root, &expected, provider).map_err(Unjoined::Bad)?;
    let issuer_cert = match (wanted.issuer, &grant.issuer_cert) {
        (None, _) => None,
        (Some(_), None) => return Err(Unjoined::Bad("the issuing key's certificate is missing".into())),
        (Some(id), Some(der)) => {
            let key = root.key(der, unix_now()).map_err(Unjoined::Bad)?;
            if key.role != Role::Issuer || key.id != id {
                return Err(Unjoined::Bad("the issuing key's certificate is for another key".into()));
            }
            Some(CertificateDer::from(der.to_vec()))
        }
    };
    let root = root.der().clone();
    Ok(Granted { chain, root, issuer_cert, peers: grant.peers, floors: grant.floors })
}

/// The pinned root, as the seed has shown it in the handshake.
fn shown_root(connection: &quinn::Connection, pinned: [u8; 32]) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.into_iter().find(|der| sha256(der) == pinned)
}

/// Our own verifier ends the handshake with `unknown_ca` when the pinned root is not in the chain.
fn is_foreign(error: &quinn::ConnectionError) -> bool {
    const UNKNOWN_CA: u8 = 48;
    matches!(error, quinn::ConnectionError::TransportError(e) if e.code == quinn::TransportErrorCode::crypto(UNKNOWN_CA))
}
