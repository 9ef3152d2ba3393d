//! The serving side of `starling-join/1`: answers joins and renewals, or relays them to an issuer.

use std::{sync::Arc, time::Duration};

use rustls::pki_types::CertificateDer;
use starling_gossip::GossipHandle;
use starling_protocol::{
    CloseCode, Join, JoinReply, JoinRequest, MAX_JOIN_FRAME_BYTES, NodeId, Refusal, Renew, TokenClaims, alpn,
};

use super::{Identity, authority::SharedAuthority};
use crate::{
    identity::tls,
    port::{
        endpoint::{CONTROL, MeshEndpoint},
        frames,
    },
};

/// A joiner that says nothing for this long is let go.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an issuer may take to answer a relayed request.
const RELAY_TIMEOUT: Duration = Duration::from_secs(5);

/// Admits nodes, on any member: directly where an issuer lives, by relay elsewhere.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) identity: Arc<Identity>,
    pub(crate) authority: SharedAuthority,
    pub(crate) gossip: GossipHandle,
    pub(crate) endpoint: MeshEndpoint,
}

impl Admission {
    /// Serves one connection: one request, one answer.
    pub(crate) async fn serve(self, connection: quinn::Connection) {
        let exchange = async {
            let (mut send, mut receive) = connection.accept_bi().await.ok()?;
            let reply = match frames::read_frame::<JoinRequest>(&mut receive, MAX_JOIN_FRAME_BYTES).await {
                Ok(request) => self.answer(request).await,
                Err(e) => JoinReply::Refused(Refusal::Malformed(e.to_string())),
            };
            if let JoinReply::Refused(why) = &reply {
                tracing::info!(from = %connection.remote_address(), %why, "refused a join");
            }
            frames::write_frame(&mut send, &reply).await.ok()?;
            // The peer closes when it has the answer.
            connection.closed().await;
            Some(())
        };
        let _ = tokio::time::timeout(REQUEST_TIMEOUT, exchange).await;
        connection.close((CloseCode::Done as u32).into(), b"");
    }

    /// Answers a request: the local issuer's word, or a remote one's.
    pub(crate) async fn answer(&self, request: JoinRequest) -> JoinReply {
        let result = match &request {
            JoinRequest::Join(join) => match self.local_issuer_of(join) {
                Some(Ok(reply)) => Ok(reply),
                Some(Err(refusal)) => Err(refusal),
                None => self.relay(issuer_of(join), &request).await,
            },
            JoinRequest::Renew(renew) => match &self.authority {
                Some(_) => self.renew_here(renew),
                None => self.relay(None, &request).await,
            },
        };
        match result {
            Ok(JoinReply::Granted(mut grant)) => {
                grant.peers = self.live_addresses();
                JoinReply::Granted(grant)
            }
            Ok(refused) => refused,
            Err(refusal) => JoinReply::Refused(refusal),
        }
    }

    /// `None` when the token is another issuer's to judge.
    fn local_issuer_of(&self, join: &Join) -> Option<Result<JoinReply, Refusal>> {
        let claims: TokenClaims = match starling_protocol::decode(&join.claims) {
            Ok(claims) => claims,
            Err(_) => return Some(Err(Refusal::Forged)),
        };
        if claims.mesh != *self.identity.mesh() {
            return Some(Err(Refusal::Foreign));
        }
        let authority = self.authority.as_ref().filter(|a| a.id() == claims.issuer)?;
        let admitted = authority.admit(join, |name, id| self.is_taken(name, id));
        Some(admitted.map(|(grant, grants)| {
            tracing::info!(node = %join.name, services = ?grants.services, "admitted a node");
            JoinReply::Granted(grant)
        }))
    }

    fn renew_here(&self, renew: &Renew) -> Result<JoinReply, Refusal> {
        let authority = self.authority.as_ref().ok_or(Refusal::IssuerUnreachable)?;
        let chain: Vec<CertificateDer<'_>> = renew.chain.iter().map(|c| CertificateDer::from(c.as_slice())).collect();
        let leaf =
            self.identity.check_chain(&chain, tls::EXPIRED_GRACE).map_err(|e| Refusal::NotRenewable(e.to_string()))?;
        let chain = authority.renew(&leaf, &renew.csr)?;
        tracing::debug!(node = %leaf.name, "renewed a certificate");
        Ok(JoinReply::Granted(starling_protocol::Grant {
            chain: chain.iter().map(|c| c.to_vec()).collect(),
            roots: self.identity.root_ders().iter().map(|c| c.to_vec()).collect(),
            issuer_cert: None,
            peers: Vec::new(),
        }))
    }

    fn is_taken(&self, name: &starling_protocol::Name, id: NodeId) -> bool {
        self.gossip
            .snapshot()
            .members
            .iter()
            .any(|m| m.is_live() && m.id != id && m.record.as_ref().is_some_and(|r| r.name == *name))
    }

    fn live_addresses(&self) -> Vec<std::net::SocketAddr> {
        self.gossip.snapshot().members.iter().filter(|m| m.is_live()).map(|m| m.addr).take(16).collect()
    }

    /// Passes the request on, to the named issuer or to any. The request proves itself, so nothing depends on the relay.
    async fn relay(&self, issuer: Option<NodeId>, request: &JoinRequest) -> Result<JoinReply, Refusal> {
        let snapshot = self.gossip.snapshot();
        let issuers = snapshot.members.iter().filter(|m| {
            let record = m.record.as_ref();
            !m.is_self
                && m.is_live()
                && record.is_some_and(|r| r.issuer.is_some() && (issuer.is_none() || r.issuer == issuer))
        });
        for member in issuers {
            let ask = ask(&self.endpoint, &self.identity, member.addr, request);
            match tokio::time::timeout(RELAY_TIMEOUT, ask).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(error)) => tracing::debug!(issuer = %member.addr, %error, "issuer does not answer"),
                Err(_) => tracing::debug!(issuer = %member.addr, "issuer does not answer in time"),
            }
        }
        Err(Refusal::IssuerUnreachable)
    }
}

fn issuer_of(join: &Join) -> Option<NodeId> {
    starling_protocol::decode::<TokenClaims>(&join.claims).ok().map(|claims| claims.issuer)
}

/// One request over a new connection on which both sides are members.
pub(crate) async fn ask(
    endpoint: &MeshEndpoint,
    identity: &Arc<Identity>,
    addr: std::net::SocketAddr,
    request: &JoinRequest,
) -> Result<JoinReply, frames::StreamFault> {
    let crypto = tls::client_crypto(identity, alpn::JOIN);
    let connection = endpoint.dial(addr, crypto, CONTROL)?.await?;
    let reply = super::join::exchange(&connection, request).await;
    connection.close((CloseCode::Done as u32).into(), b"");
    reply
}
