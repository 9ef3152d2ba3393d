//! The asking side of `starling-join/1`: how a node gets its first certificate.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use rcgen::KeyPair;
use rustls::{crypto::CryptoProvider, pki_types::CertificateDer};
use starling_protocol::{
    CloseCode, Grant, Join, JoinReply, JoinRequest, JoinToken, MAX_JOIN_FRAME_BYTES, Name, Refusal,
};

use super::{Identity, authority::Authority, csr, load_or_create_key};
use crate::{
    identity::tls,
    port::{
        endpoint::{CONTROL, client_config, joining_endpoint},
        frames::{self, StreamFault},
    },
    state::{StateDir, StateError},
};

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
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
pub(crate) struct Application<'a> {
    pub(crate) token: &'a JoinToken,
    pub(crate) name: &'a Name,
    pub(crate) services: &'a [Name],
    pub(crate) seeds: &'a [String],
}

/// Joins through the first seed that answers. Seeds that do not answer are tried for ever, and said so; a refusal is final.
pub(crate) async fn join(
    state: &StateDir,
    application: &Application<'_>,
    provider: Arc<CryptoProvider>,
) -> Result<(Identity, Vec<SocketAddr>), JoinError> {
    let token = application.token;
    let seeds: Vec<&String> = application.seeds.iter().chain(&token.claims.seeds).collect();
    if seeds.is_empty() {
        return Err(JoinError::NoSeed);
    }
    let key = load_or_create_key(state)?;
    let issuer_key = token.claims.grants.issuer.then(|| KeyPair::generate().expect("the system has randomness"));
    let mut join = Join {
        claims: token.claims_bytes.clone(),
        proof: [0; 32],
        name: application.name.clone(),
        services: application.services.to_vec(),
        csr: csr(&key),
        issuer_csr: issuer_key.as_ref().map(csr),
    };
    let secret = hmac::Key::new(hmac::HMAC_SHA256, &token.secret);
    let proof = hmac::sign(&secret, &join.proven_bytes());
    join.proof.copy_from_slice(proof.as_ref());
    let request = JoinRequest::Join(join);

    let mut pause = RETRY_MIN;
    let grant = 'joined: loop {
        for seed in &seeds {
            match attempt(seed, token, &request, &provider).await {
                Ok(JoinReply::Granted(grant)) => break 'joined grant,
                Ok(JoinReply::Refused(refusal)) if refusal.is_transient() => {
                    tracing::warn!(%seed, %refusal, "cannot join yet; trying again");
                }
                Ok(JoinReply::Refused(refusal)) => return Err(refusal.into()),
                Err(Unreached::Foreign) => return Err(Refusal::Foreign.into()),
                Err(Unreached::Fault(error)) => {
                    tracing::warn!(%seed, error, "seed does not answer; trying again for as long as it takes");
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    };
    let Grant { chain, roots, issuer_cert, peers } = grant;
    let own = |ders: Vec<Vec<u8>>| ders.into_iter().map(CertificateDer::from).collect::<Vec<_>>();
    let (chain, roots) = (own(chain), own(roots));
    if let (Some(key), Some(cert), Some(root)) = (issuer_key, issuer_cert, roots.first()) {
        // Before the identity, which marks the join as done.
        Authority::establish(state, &token.claims.mesh, &key, &CertificateDer::from(cert), root)?;
    }
    let identity = Identity::establish(state, key, chain, roots, provider)?;
    Ok((identity, peers))
}

enum Unreached {
    /// Somebody else's mesh answers there.
    Foreign,
    Fault(String),
}

async fn attempt(
    seed: &str,
    token: &JoinToken,
    request: &JoinRequest,
    provider: &Arc<CryptoProvider>,
) -> Result<JoinReply, Unreached> {
    let fault = |e: &dyn std::fmt::Display| Unreached::Fault(e.to_string());
    let addr = tokio::net::lookup_host(seed)
        .await
        .map_err(|e| fault(&e))?
        .next()
        .ok_or_else(|| Unreached::Fault("the name has no address".into()))?;
    let endpoint = joining_endpoint(addr).map_err(|e| fault(&e))?;
    let crypto = tls::joining_crypto(provider.clone(), token.claims.root);
    let asked = async {
        let connecting =
            endpoint.connect_with(client_config(crypto, CONTROL), addr, tls::SERVER_NAME).map_err(|e| fault(&e))?;
        let connection = connecting.await.map_err(|e| if is_foreign(&e) { Unreached::Foreign } else { fault(&e) })?;
        let reply = exchange(&connection, request).await.map_err(|e| fault(&e));
        connection.close((CloseCode::Done as u32).into(), b"");
        endpoint.wait_idle().await;
        reply
    };
    tokio::time::timeout(ATTEMPT_TIMEOUT, asked)
        .await
        .unwrap_or_else(|_| Err(Unreached::Fault("no answer in time".into())))
}

/// Our own verifier ends the handshake with `unknown_ca` when the pinned root is not in the chain.
fn is_foreign(error: &quinn::ConnectionError) -> bool {
    const UNKNOWN_CA: u8 = 48;
    matches!(error, quinn::ConnectionError::TransportError(e) if e.code == quinn::TransportErrorCode::crypto(UNKNOWN_CA))
}

/// One request, one answer, on a new stream.
pub(crate) async fn exchange(connection: &quinn::Connection, request: &JoinRequest) -> Result<JoinReply, StreamFault> {
    let (mut send, mut receive) = connection.open_bi().await?;
    frames::write_frame(&mut send, request).await?;
    frames::read_frame(&mut receive, MAX_JOIN_FRAME_BYTES).await
}
