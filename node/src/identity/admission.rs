//! The serving side of `starling-join/1`: answers joins and renewals where an issuer lives, and carries them there elsewhere.
//!
//! Whoever carries a request adds nothing to it and nothing to the answer, which the issuer signs. What was carried once is
//! not carried again, so that no request goes in circles.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use rand::seq::SliceRandom;
use rustls::pki_types::CertificateDer;
use starling_gossip::{GossipHandle, MemberView};
use starling_protocol::{
    Application, CloseCode, Floor, Framed, Grant, Join, Ledger, MAX_JOIN_FRAME_BYTES, Name, NodeId, Refusal, Relayed,
    Renew, SignedAnswer, TokenClaims, Unsupported, alpn, decode, encode,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    Identity,
    authority::{Authority, SharedAuthority},
    certificate::MeshCertificate,
    grant::Request,
    names,
    rooted::Role,
    unix_now,
};
use crate::{
    Documents,
    identity::tls::{self, Peer},
    port::{
        endpoint::{self, MeshEndpoint},
        frames::{self, Frame, StreamFault},
    },
};

/// A joiner that says nothing for this long is let go.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an issuer may take to answer.
pub(super) const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests that are carried to issuers at a time, for everybody.
const MAX_CARRIED: usize = 16;
/// Requests that an issuer decides at a time: each is written to disk.
const MAX_DECIDED: usize = 4;
/// Comparisons of names that an issuer answers at a time.
const MAX_COMPARED: usize = 64;
/// Addresses of members that a new node is told.
const MAX_TOLD: usize = 16;

/// Admits nodes, on any member: directly where an issuer lives, by relay elsewhere. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) identity: Arc<Identity>,
    pub(crate) authority: SharedAuthority,
    pub(crate) gossip: GossipHandle,
    pub(crate) documents: Documents,
    pub(crate) endpoint: MeshEndpoint,
    /// Joins and renewals that are carried elsewhere: neither keeps the other from it.
    carried: [Arc<Semaphore>; 2],
    /// Requests that are decided here at a time.
    decided: Arc<Semaphore>,
    /// Comparisons of names that are answered at a time. Not the same: what is decided waits for those of others.
    compared: Arc<Semaphore>,
}

/// That nothing is decided; until it is dropped.
#[derive(Debug)]
pub(crate) struct Resting(#[expect(dead_code, reason = "it is held")] [Option<OwnedSemaphorePermit>; 2]);

/// What is sent back.
pub(crate) enum Reply {
    /// An issuer's word.
    Signed(SignedAnswer),
    /// Anybody's.
    Hint(Refusal),
}

impl Admission {
    pub(crate) fn new(
        identity: Arc<Identity>,
        authority: SharedAuthority,
        gossip: GossipHandle,
        documents: Documents,
        endpoint: MeshEndpoint,
    ) -> Self {
        let carried = [MAX_CARRIED; 2].map(|most| Arc::new(Semaphore::new(most)));
        let decided = Arc::new(Semaphore::new(MAX_DECIDED));
        let compared = Arc::new(Semaphore::new(MAX_COMPARED));
        Self { identity, authority, gossip, documents, endpoint, carried, decided, compared }
    }

    /// Serves one connection: one request, one answer.
    pub(crate) async fn serve(self, connection: quinn::Connection) {
        let exchange = async {
            let (mut send, mut receive) = connection.accept_bi().await.ok()?;
            let header = frames::read_header(&mut receive, starling_protocol::MAX_LEDGER_BYTES).await.ok()?;
            // Whose certificate is good for more than renewing it.
            let member = Peer::of(&connection, &self.identity).ok();
            if member.is_some() {
                endpoint::welcome_to_gossip(&connection);
            }
            let from = connection.remote_address();
            if header.0 == Ledger::KIND {
                let issuer = member.filter(|peer| self.is_issuer(&peer.id))?;
                let authority = self.authority.clone()?;
                let _turn = self.compared.acquire().await.ok()?;
                let asked = frames::read_body(&mut receive, header).await.ok()?.read().ok()?;
                let answer = names::answer(authority, self.identity.clone(), asked, &issuer.name).await?;
                frames::write_frame(&mut send, &answer).await.ok()?;
            } else {
                let reply = match header.1 > MAX_JOIN_FRAME_BYTES {
                    true => Reply::Hint(Refusal::malformed("it is too long")),
                    false => match frames::read_body(&mut receive, header).await.ok()? {
                        frame if matches!(frame.kind, Join::KIND | Renew::KIND | Relayed::KIND) => {
                            self.answer(frame, member.is_some(), from).await
                        }
                        frame => {
                            frames::write_frame(&mut send, &Unsupported { kind: frame.kind }).await.ok()?;
                            connection.closed().await;
                            return None;
                        }
                    },
                };
                match &reply {
                    Reply::Signed(answer) => frames::write_frame(&mut send, answer).await.ok()?,
                    Reply::Hint(refusal) => {
                        tracing::info!(%from, %refusal, "refused a join");
                        frames::write_frame(&mut send, refusal).await.ok()?;
                    }
                }
            }
            // The peer closes when it has the answer.
            connection.closed().await;
            Some(())
        };
        let _ = tokio::time::timeout(REQUEST_TIMEOUT, exchange).await;
        connection.close((CloseCode::Done as u32).into(), b"");
    }

    /// Decides nothing more, and waits for what is being decided, until what is returned is dropped: the ledger is another
    /// process's.
    pub(crate) async fn rest(&self) -> Resting {
        let all = |turns: &Arc<Semaphore>, count: usize| turns.clone().acquire_many_owned(count as u32);
        let (decided, compared) = tokio::join!(all(&self.decided, MAX_DECIDED), all(&self.compared, MAX_COMPARED));
        Resting([decided.ok(), compared.ok()])
    }

    /// Decides nothing more for good; what comes is carried to others.
    pub(crate) fn retire(&self) {
        self.decided.close();
        self.compared.close();
    }

    async fn answer(&self, frame: Frame, from_member: bool, from: SocketAddr) -> Reply {
        let relayed = frame.kind == Relayed::KIND;
        let request = match relayed {
            false => Request { kind: frame.kind, body: frame.body },
            true => match frame.read::<Relayed>() {
                Ok(relayed) if from_member && matches!(relayed.kind, Join::KIND | Renew::KIND) => {
                    Request { kind: relayed.kind, body: relayed.request }
                }
                Ok(relayed) if from_member => {
                    return Reply::Hint(Refusal::malformed(format!("a request of kind {}", relayed.kind)));
                }
                Ok(_) => return Reply::Hint(Refusal::malformed("only members pass requests on")),
                Err(e) => return Reply::Hint(Refusal::malformed(e)),
            },
        };
        match self.here(&request, from).await {
            Some(reply) => reply,
            None if relayed => Reply::Hint(Refusal::issuer_unreachable()),
            None => self.carry(&request).await,
        }
    }

    /// The local issuer's answer; `None` if it is another's to give.
    async fn here(&self, request: &Request, from: SocketAddr) -> Option<Reply> {
        let authority = self.authority.clone()?;
        let _turn = self.decided.acquire().await.ok()?;
        let outcome = match request.kind {
            Join::KIND => {
                let join: Join = match decode(&request.body) {
                    Ok(join) => join,
                    Err(e) => return Some(Reply::Hint(Refusal::malformed(e))),
                };
                let application = decode::<Application>(&join.application).ok();
                let issuer = application.and_then(|a| TokenClaims::peek_issuer(&a.claims).ok());
                if issuer.is_some_and(|issuer| issuer != authority.id()) {
                    return None;
                }
                self.admit(authority.clone(), join).await
            }
            _ => match decode::<Renew>(&request.body) {
                Ok(renew) => self.renew(authority.clone(), renew).await,
                Err(e) => Err(Refusal::malformed(e)),
            },
        };
        if let Err(refusal) = &outcome {
            tracing::info!(%from, %refusal, "refused a join");
        }
        let outcome = outcome.map(|grant| Grant { peers: self.live_addresses(), floors: self.floors(), ..grant });
        let hash = request.hash();
        Some(Reply::Signed(off_thread(move || Ok(authority.answer(hash, outcome))).await.ok()?))
    }

    /// The local issuer's answer to a request of this node itself.
    pub(super) async fn own_answer(&self, request: &Request) -> Option<SignedAnswer> {
        match self.here(request, ([127, 0, 0, 1], 0).into()).await? {
            Reply::Signed(signed) => Some(signed),
            Reply::Hint(_) => None,
        }
    }

    async fn admit(&self, authority: Arc<Authority>, join: Join) -> Result<Grant, Refusal> {
        let examined = {
            let authority = authority.clone();
            off_thread(move || authority.examine(&join)).await?
        };
        let (name, id) = (examined.application.name.clone(), examined.id);
        if self.is_taken(&name, id) {
            return Err(Refusal::name_taken(&name));
        }
        let services = examined.application.services.clone();
        let examined = Arc::new(examined);
        // What another issuer has given away counts, whatever either's clock says.
        names::share(self, Some(&name)).await;
        {
            let (authority, examined) = (authority.clone(), examined.clone());
            off_thread(move || authority.book(&examined)).await?;
        }
        // Another may be giving it away at this moment: of two, the earlier holds.
        names::share(self, Some(&name)).await;
        let grant = off_thread(move || {
            if authority.is_taken(&examined.application.name, examined.id) {
                authority.unbook(&examined);
                return Err(Refusal::name_taken(&examined.application.name));
            }
            authority.admit(&examined)
        });
        let grant = grant.await?;
        tracing::info!(node = %name, ?services, "admitted a node");
        Ok(grant)
    }

    async fn renew(&self, authority: Arc<Authority>, renew: Renew) -> Result<Grant, Refusal> {
        let leaf = self.renewable(&renew)?;
        let name = leaf.name.clone();
        let grant = off_thread(move || authority.renew(&leaf, &renew.csr)).await?;
        tracing::debug!(node = %name, "renewed a certificate");
        Ok(grant)
    }

    fn renewable(&self, renew: &Renew) -> Result<Arc<MeshCertificate>, Refusal> {
        let chain: Vec<CertificateDer<'_>> = renew.chain.iter().map(|c| CertificateDer::from(&c[..])).collect();
        self.identity.check_chain(&chain, tls::EXPIRED_GRACE).map_err(Refusal::not_renewable)
    }

    /// Carries a request to the issuer that it is for, or to any. What could not be granted anywhere is not carried.
    async fn carry(&self, request: &Request) -> Reply {
        let issuer = match self.addressee(request) {
            Ok(issuer) => issuer,
            Err(refusal) => return Reply::Hint(refusal),
        };
        let [joins, renewals] = &self.carried;
        let permit = if request.kind == Renew::KIND { renewals } else { joins }.try_acquire();
        let Ok(_permit) = permit else {
            return Reply::Hint(Refusal::issuer("too many requests are on their way; try again"));
        };
        let relayed = Relayed { kind: request.kind, request: request.body.clone() };
        let relayed = Request { kind: Relayed::KIND, body: Bytes::from(encode(&relayed)) };
        let mut refused = None;
        for member in self.issuers().into_iter().filter(|(id, _)| issuer.is_none_or(|issuer| issuer == *id)) {
            let member = member.1;
            match ask(&self.endpoint, &self.identity, member.addr, Some(member.id), &relayed).await {
                Ok(frame) if frame.kind == SignedAnswer::KIND => match frame.read() {
                    Ok(signed) => return Reply::Signed(signed),
                    Err(error) => tracing::warn!(issuer = %member.addr, %error, "an issuer answers nonsense"),
                },
                Ok(frame) => refused = frame.read::<Refusal>().ok(),
                Err(error) => tracing::debug!(issuer = %member.addr, error, "issuer does not answer"),
            }
        }
        Reply::Hint(refused.unwrap_or_else(Refusal::issuer_unreachable))
    }

    /// Who is to decide, by the request; an error if nobody of this mesh could.
    fn addressee(&self, request: &Request) -> Result<Option<NodeId>, Refusal> {
        if request.kind == Renew::KIND {
            let renew: Renew = decode(&request.body).map_err(Refusal::malformed)?;
            return self.renewable(&renew).map(|_| None);
        }
        let join: Join = decode(&request.body).map_err(Refusal::malformed)?;
        let application: Application = decode(&join.application).map_err(Refusal::malformed)?;
        // What else it says is its issuer's to judge, which may be newer than this node.
        if let Ok(claims) = TokenClaims::decode(&application.claims)
            && (claims.mesh != *self.identity.mesh() || claims.root != self.identity.root().fingerprint())
        {
            return Err(Refusal::foreign());
        }
        TokenClaims::peek_issuer(&application.claims).map(Some).map_err(|_| Refusal::forged())
    }

    /// Live members other than this one that have proved that they can issue, with their issuing key's id, in random order.
    pub(super) fn issuers(&self) -> Vec<(NodeId, MemberView)> {
        let snapshot = self.gossip.snapshot();
        let now = unix_now();
        let issuing = |member: &MemberView| {
            let proof = member.record.as_ref()?.issuer.as_ref()?;
            // Verified with the record; this is for the id.
            let key = self.identity.root().key(&proof.certificate, now).ok()?;
            (key.role == Role::Issuer).then(|| (key.id, member.clone()))
        };
        let mut issuers: Vec<_> =
            snapshot.members.iter().filter(|m| !m.is_self && m.is_live()).filter_map(issuing).collect();
        issuers.shuffle(&mut rand::rng());
        issuers
    }

    fn is_issuer(&self, id: &NodeId) -> bool {
        let snapshot = self.gossip.snapshot();
        snapshot.member(id).and_then(|member| member.record.as_ref()).is_some_and(|record| record.issuer.is_some())
    }

    /// Whether a live member of another key has the name.
    fn is_taken(&self, name: &Name, id: NodeId) -> bool {
        let snapshot = self.gossip.snapshot();
        let has = |m: &MemberView| m.id != id && m.is_live() && m.record.as_ref().is_some_and(|r| r.name == *name);
        snapshot.members.iter().any(has)
    }

    fn live_addresses(&self) -> Vec<SocketAddr> {
        self.gossip.snapshot().members.iter().filter(|m| m.is_live()).map(|m| m.addr).take(MAX_TOLD).collect()
    }

    fn floors(&self) -> Vec<Floor> {
        let floor = |sight: starling_protocol::DocumentSight| Floor {
            kind: sight.edition.kind,
            version: sight.edition.version,
        };
        self.documents.sights().into_iter().map(floor).collect()
    }
}

/// Signing and syncing to disk take milliseconds, in which the control thread must answer probes.
pub(super) async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(Refusal::issuer(e)))
}

/// One request over a new connection on which both sides are members, and the answer, whatever it is. With `whom`, nobody
/// else may answer.
pub(super) async fn ask(
    endpoint: &MeshEndpoint,
    identity: &Arc<Identity>,
    addr: SocketAddr,
    whom: Option<NodeId>,
    request: &Request,
) -> Result<Frame, String> {
    let asked = async {
        let crypto = tls::client_crypto(identity, alpn::JOIN);
        let connection = endpoint.dial(addr, crypto, 0).map_err(|e| e.to_string())?;
        let connection = connection.await.map_err(|e| e.to_string())?;
        let answer = async {
            let peer = Peer::of(&connection, identity).map_err(|e| e.to_string())?;
            if whom.is_some_and(|whom| whom != peer.id) || peer.id == identity.id() {
                return Err(format!("{} answers at its address", peer.name));
            }
            exchange(&connection, request).await.map_err(|e| e.to_string())
        };
        let answer = answer.await;
        connection.close((CloseCode::Done as u32).into(), b"");
        answer
    };
    tokio::time::timeout(ASK_TIMEOUT, asked).await.unwrap_or_else(|_| Err("no answer in time".into()))
}

/// One request, one answer, on a new stream.
pub(super) async fn exchange(connection: &quinn::Connection, request: &Request) -> Result<Frame, StreamFault> {
    let (mut send, mut receive) = connection.open_bi().await?;
    frames::write_encoded(&mut send, request.kind, &request.body).await?;
    let limit = if request.kind == Ledger::KIND { starling_protocol::MAX_LEDGER_BYTES } else { MAX_JOIN_FRAME_BYTES };
    frames::read_frame(&mut receive, limit).await
}
