//! The mesh client: one call, to one of a service's instances, with the retries that are safe.

mod attempt;
mod budget;
mod error;
mod hedge;
mod introduction;
mod kind;
mod repeat;

pub(crate) mod choose;
pub(crate) mod connect;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header, request};
use rand::RngExt;
use starling_gossip::Snapshot;
use starling_http::{
    Body, Due, Guarded, ProxyError, Source, grpc_timeout, is_grpc, names,
    normal::{self, Tunnel, number},
};
use starling_protocol::{Name, NodeId, Protocol, headers};
use tokio::sync::watch;

use self::{
    attempt::Terms,
    choose::{Candidate, KnownPeers, Seen, Wish, has_another, pick},
    connect::Pool,
    hedge::Hedge,
};
use crate::{
    identity::Identity,
    observe::{
        observer::Observed,
        trace::{OpenSpan, Value},
    },
    port::endpoint::MeshEndpoint,
};

pub use self::{
    attempt::{Carried, MadeByNode},
    error::{CallError, Fault, Sent},
    repeat::{HedgeAfter, HedgeSettings, RepeatSettings, RetrySettings},
};
pub(crate) use self::{
    budget::RetryBudget,
    introduction::Introduction,
    kind::Kind,
    repeat::{Called, Repeats},
};

/// Time to the head of an answer, if nobody sets it.
const DEFAULT_HEAD: Duration = Duration::from_secs(15);
/// Silence of a call that ends it, if nobody sets it.
const DEFAULT_IDLE: Duration = Duration::from_secs(3600);
/// Attempts per call that are not counted either, because the connection fell silent or broke under them: after a cut, one
/// after the other may do so, until one is left that answers. They do cost the retry budget.
const MAX_BROKEN: u32 = 3;
/// Nodes per call that cannot be reached until it is given up.
const MAX_UNREACHED: usize = 8;
/// Attempts over all hops: a chain of proxies must not multiply them.
const MAX_TOTAL_ATTEMPTS: u32 = 6;
/// How often one call may pass through the same node before it is a loop.
const MAX_VISITS: usize = 4;
/// How often a call that came too early looks whether its service is known by now.
const INTRODUCED: Duration = Duration::from_millis(20);
/// Pause before a third attempt, at most; a first retry elsewhere needs none.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// A call into the mesh.
#[derive(Debug)]
pub struct Call {
    /// Whom to ask.
    pub service: Name,
    /// Only instances of that API version; any if `None`.
    pub version: Option<String>,
    /// The request, normalised: path and query as its target, no Host, no hop-by-hop fields. CONNECT asks for a tunnel, as
    /// [`starling_http::tunnel`] has it.
    pub request: Request<Body>,
    /// How long it may take.
    pub limits: Limits,
    /// How often it may be made. Attempts that found nobody at the other end are not counted.
    pub repeats: RepeatSettings,
}

/// How long a call may take; `None` is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Until the head of the answer is there, from the end of the upload on.
    pub head: Option<Duration>,
    /// Until something moves again, in either direction.
    pub idle: Option<Duration>,
    /// Until the end of the answer.
    pub total: Option<Duration>,
    /// How long an operator would wait for the head, or is usual: an instance that takes half as long is at fault, whoever waits
    /// no longer.
    pub patience: Duration,
}

/// Limits as an operator sets them, for an upstream, a service or a route: what is left out is as usual.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitSettings {
    /// Sets [`Limits::head`].
    pub timeout: Option<Duration>,
    /// Sets [`Limits::idle`].
    pub idle_timeout: Option<Duration>,
    /// Sets [`Limits::total`].
    pub total_timeout: Option<Duration>,
}

impl LimitSettings {
    /// The limits of one request. A gRPC caller that names a deadline gets it, unless the operator's is shorter; one that
    /// names none has none, because its protocol has none.
    pub fn of(&self, request: &HeaderMap) -> Limits {
        let (named, usual) = match is_grpc(request) {
            true => (grpc_timeout(request), None),
            false => (None, Some(DEFAULT_HEAD)),
        };
        Limits {
            patience: self.timeout.unwrap_or(DEFAULT_HEAD),
            head: [self.timeout, named].into_iter().flatten().min().or(usual),
            idle: Some(self.idle_timeout.unwrap_or(DEFAULT_IDLE)),
            total: [self.total_timeout, named].into_iter().flatten().min(),
        }
    }
}

/// Calls services, from one worker. Cheap to clone; every clone shares its worker's connections, and what the node knows of its
/// peers.
#[derive(Clone)]
pub struct MeshClient {
    node: Arc<Calls>,
    pool: Arc<Pool>,
}

/// All calls of a node: what its workers share.
pub(crate) struct Calls {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    known: Arc<KnownPeers>,
    zone: String,
    /// How we sign in `Via`.
    pseudonym: String,
    via: HeaderValue,
    introduction: Introduction,
}

impl Calls {
    pub(crate) fn new(
        snapshot: watch::Receiver<Arc<Snapshot>>,
        zone: String,
        pseudonym: String,
        introduction: Introduction,
    ) -> Self {
        let via = HeaderValue::from_str(&format!("2 {pseudonym}")).expect("a pseudonym is ASCII");
        Self { snapshot, known: Arc::default(), zone, pseudonym, via, introduction }
    }

    /// Calls in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.known.in_flight()
    }

    /// Attempts beyond the first, by service.
    pub(crate) fn repeats(&self) -> Vec<(Name, Repeats)> {
        self.known.repeats()
    }

    /// The same for one.
    pub(crate) fn repeats_of(&self, service: &Name) -> Repeats {
        self.known.repeats_of(service)
    }

    /// What an instance looks like from here; `None` if it was never looked at.
    pub(crate) fn seen(&self, id: &NodeId, service: &Name) -> Option<Seen> {
        self.known.seen(id, service)
    }

    /// Whether calls keep away from that instance for now.
    pub(crate) fn is_ejected(&self, id: &NodeId, service: &Name) -> bool {
        self.known.is_ejected(id, service)
    }
}

impl MeshClient {
    /// For a worker: with connections of its own.
    pub(crate) fn on(node: Arc<Calls>, identity: Arc<Identity>, endpoint: MeshEndpoint) -> Self {
        let pool = Arc::new(Pool::new(identity, endpoint, node.snapshot.clone(), node.known.clone()));
        Self { node, pool }
    }

    /// How this node calls itself in `Via` and `Proxy-Status`.
    pub fn pseudonym(&self) -> &str {
        &self.node.pseudonym
    }

    /// The mesh as calls see it.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.node.snapshot.borrow().clone()
    }

    /// Whether a service is spoken to by HTTP, as far as it is known.
    pub(crate) fn takes_http(&self, service: &Name) -> bool {
        self.is_spoken_to(service, |protocol| Kind::of_service(protocol) == Some(Kind::Http))
    }

    fn is_spoken_to(&self, service: &Name, so: impl Fn(&Protocol) -> bool) -> bool {
        let snapshot = self.snapshot();
        let instances = snapshot.instances(service).unwrap_or_default();
        instances.iter().any(|instance| so(&instance.protocol))
    }

    /// Forgets peers that are not in the mesh any more. To be done on the worker's own thread.
    pub(crate) fn forget_strangers(&self) {
        let snapshot = self.snapshot();
        let is_member = |id: &NodeId| snapshot.member(id).is_some();
        self.pool.retain(is_member);
        self.node.known.retain(is_member, |service| snapshot.instances(service).is_some());
    }

    /// Makes a call, for the one that `observed` notes. Dropping the future cancels it at the service's node too.
    pub async fn call(&self, call: Call, observed: &mut Observed) -> Result<Response<Guarded<Carried>>, CallError> {
        let Call { service, version, request, limits, repeats: RepeatSettings { retry, hedge } } = call;
        let (mut parts, body) = request.into_parts();
        let earlier = attempts_so_far(&parts.headers);
        self.prepare(&mut parts)?;

        let bodiless = http_body::Body::is_end_stream(&body);
        let source = (!bodiless).then(|| Source::new(body));
        let tunnel = normal::tunnel(&parts);
        let until = limits.total.map(|total| Instant::now() + total);
        // Only gRPC's callers may wait for ever, and gRPC needs HTTP/2, whatever a content type says.
        let head = limits.head.or_else(|| {
            let may_wait = self.is_spoken_to(&service, |protocol| *protocol == Protocol::H2c);
            (!may_wait).then_some(DEFAULT_HEAD)
        });
        // What goes into a tunnel is no upload that must come first.
        let due = Due::new(head, until, source.as_ref().filter(|_| tunnel.is_none())).or_idle(limits.idle);
        // Its packets do not move its stream; who opened it, ends it.
        let idle = limits.idle.filter(|_| tunnel != Some(Tunnel::Udp));
        let terms =
            Terms { service: &service, source: source.as_ref(), due: &due, idle, until, patience: limits.patience };
        let (kind, version, zone) = (Kind::of_request(tunnel), version.as_deref(), self.node.zone.as_str());
        let wish = Wish { kind, version, zone, ..Wish::default() };
        // What an operator says of methods, he says of calls.
        let is_repeatable = parts.method.is_idempotent() || retry.any_method && tunnel.is_none();
        let (mut tried, mut dead): (Vec<NodeId>, Vec<NodeId>) = Default::default();
        // Those of `dead` who had no work with it at all.
        let mut unreached = 0;
        let mut unreachable = false;
        let mut broken = 0;
        let mut failed = None;
        loop {
            let attempted = Wish { tried: &tried, dead: &dead, ..wish };
            let (candidate, called) = match self.candidate(&service, attempted, observed) {
                Ok(candidate) => candidate,
                // Just started, a node does not know yet what there is.
                Err(_) if failed.is_none() && !self.node.introduction.is_over(&self.snapshot()) && !due.is_over() => {
                    tokio::time::sleep(INTRODUCED).await;
                    continue;
                }
                // What the last one said tells more than that there is no other.
                Err(none_left) => return Err(failed.unwrap_or(none_left)),
            };
            if tried.is_empty() {
                called.budget.earn(retry.budget);
            }
            if std::mem::take(&mut unreachable) {
                called.passed_over();
            }
            let attempt = (tried.len() - unreached) as u32 + 1;
            tried.push(candidate.instance.node);
            parts.headers.insert(names::ATTEMPT.clone(), names::numeral((earlier + attempt).into()));
            observed.attempted();
            let span = observed.departure(&mut parts.headers);
            let span = span.map(|span| of_attempt(span, &service, &candidate, attempt));
            let hedge_after = hedge
                .filter(|_| attempt == 1 && bodiless && is_repeatable && earlier + 2 <= MAX_TOTAL_ATTEMPTS)
                .and_then(|hedge| called.hedges_after(hedge));
            let begun = Instant::now();
            let mut node = candidate.instance.node;
            let outcome = match hedge_after {
                None => self.attempt(&candidate, &mut parts, terms, span).await,
                Some(after) => {
                    let wish = Wish { dead: &dead, ..wish };
                    let hedge = Hedge { after, wish, called: &called, retry: &retry, earlier };
                    let hedged = self.hedged(&candidate, &mut parts, terms, span, hedge, observed).await;
                    tried.extend(hedged.other);
                    node = hedged.node;
                    hedged.outcome
                }
            };
            if hedge.is_some() && bodiless && tunnel.is_none() && outcome.is_ok() {
                called.answered(begun.elapsed());
            }

            let may_repeat = |sent: Sent, broken: u32| {
                attempt - broken < retry.attempts
                    && earlier + attempt < MAX_TOTAL_ATTEMPTS
                    && !due.is_over()
                    && (sent == Sent::No || is_repeatable)
                    && source.as_ref().is_none_or(Source::can_replay)
                    && called.may_retry(&retry)
            };
            match outcome {
                Ok(answer) => {
                    // Who has too much to do already is not asked again for the same.
                    let is_shed = answer.response.status() == StatusCode::SERVICE_UNAVAILABLE;
                    let has_whom = || !is_shed || self.has_other_than(&tried, &service, wish);
                    match answer.unanswered {
                        Some(sent) if has_whom() && may_repeat(sent, broken) => {
                            if is_shed {
                                dead.push(node);
                                failed = Some(too_busy(&service));
                            }
                        }
                        _ => return Ok(answer.into_response()),
                    }
                }
                // Nobody had any work with it, so that it costs no retry, only time.
                Err(error) if error.fault == Fault::Mesh && !due.is_over() && unreached < MAX_UNREACHED => {
                    unreached += 1;
                    unreachable = true;
                    dead.push(node);
                    failed = Some(error);
                    continue;
                }
                Err(error) if matches!(error.fault, Fault::Caller | Fault::Mesh) => return Err(error),
                Err(error) => {
                    if error.fault == Fault::Connection {
                        broken = MAX_BROKEN.min(broken + 1);
                    }
                    if !may_repeat(error.sent, broken) {
                        return Err(error);
                    }
                    failed = Some(error);
                }
            }
            if attempt > 1 {
                let pause = RETRY_PAUSE.mul_f64(rand::rng().random_range(0.1..1.0));
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// What is the same for every attempt.
    fn prepare(&self, parts: &mut request::Parts) -> Result<(), CallError> {
        let own = &self.node.pseudonym;
        let visits = parts
            .headers
            .get_all(header::VIA)
            .iter()
            .filter_map(|via| via.to_str().ok())
            .flat_map(|via| via.split(','))
            .filter(|via| via.split_whitespace().nth(1) == Some(own))
            .count();
        if visits >= MAX_VISITS {
            return Err(CallError::new(
                Fault::Caller,
                Sent::No,
                StatusCode::LOOP_DETECTED,
                ProxyError::ProxyLoopDetected,
                format!("the call has been through this node {visits} times already"),
            ));
        }
        parts.headers.append(header::VIA, self.node.via.clone());
        Ok(())
    }

    /// Whether there is an instance that was not tried yet.
    fn has_other_than(&self, tried: &[NodeId], service: &Name, wish: Wish<'_>) -> bool {
        let Some((candidates, _)) = self.pool.candidates(&self.snapshot(), service) else { return false };
        has_another(&candidates, wish, tried, Instant::now())
    }

    fn candidate(
        &self,
        service: &Name,
        wish: Wish<'_>,
        observed: &mut Observed,
    ) -> Result<(Candidate, Arc<Called>), CallError> {
        let snapshot = self.snapshot();
        let unavailable = |detail| {
            let status = StatusCode::SERVICE_UNAVAILABLE;
            CallError::new(Fault::Mesh, Sent::No, status, ProxyError::DestinationUnavailable, detail)
        };
        let Some((candidates, called)) = self.pool.candidates(&snapshot, service) else {
            return Err(CallError::new(
                Fault::Caller,
                Sent::No,
                StatusCode::NOT_FOUND,
                ProxyError::DestinationNotFound,
                format!("no node of the mesh serves {service}"),
            ));
        };
        // Only names that the mesh knows are counted by name.
        observed.is_for(service.as_str());
        let picked =
            pick(&candidates, wish, Instant::now(), &mut rand::rng(), |lost| self.pool.look_for(lost)).cloned();
        picked.map(|picked| (picked, called)).ok_or_else(|| {
            let takes = |c: &Candidate| Kind::of_service(&c.instance.protocol);
            if candidates.iter().all(|candidate| takes(candidate) != Some(wish.kind))
                && let Some(takes) = candidates.first().and_then(takes)
            {
                return not_that(service, takes, wish.kind);
            }
            match wish.version {
                Some(version) => unavailable(format!("no instance of {service} {version} is alive")),
                None => unavailable(format!("no instance of {service} is alive")),
            }
        })
    }
}

/// What is told of a call that one instance had no room for, if there is no other then.
fn too_busy(service: &Name) -> CallError {
    let (status, error) = (StatusCode::SERVICE_UNAVAILABLE, ProxyError::DestinationUnavailable);
    CallError::new(Fault::Service, Sent::No, status, error, format!("{service} has as many calls as it takes"))
}

/// What is told of a call that its service does not take, whichever instance it is.
fn not_that(service: &Name, takes: Kind, kind: Kind) -> CallError {
    let detail = format!("{service} takes {takes}, not {kind}: {}", takes.advice());
    CallError::new(Fault::Caller, Sent::No, StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, detail)
}

/// What is told of an attempt before it is made.
fn of_attempt(mut span: Box<OpenSpan>, service: &Name, candidate: &Candidate, attempt: u32) -> Box<OpenSpan> {
    span.name(format!("attempt {service}"));
    span.tell("server.address", service.to_string());
    span.tell("starling.instance", candidate.instance.node_name.to_string());
    span.tell("starling.attempt", Value::Number(attempt.into()));
    span
}

fn attempts_so_far(fields: &HeaderMap) -> u32 {
    number(fields, headers::ATTEMPT).unwrap_or(1u32).saturating_sub(1).min(MAX_TOTAL_ATTEMPTS)
}
