//! The mesh client: one call, to one of a service's instances, with the retries that are safe.

pub(crate) mod choose;
pub(crate) mod connect;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h3::error::{Code, StreamError};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header, request, uri};
use http_body_util::BodyExt;
use rand::RngExt;
use starling_gossip::{Instance, Snapshot};
use starling_http::{
    Body, Problem, ProxyError, Source, guard, late,
    normal::{self, Origin},
};
use starling_protocol::{Name, NodeId, headers};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    call::choose::{Candidate, pick},
    call::connect::{Link, Pool},
};

/// Attempts per call, the first one included.
const MAX_ATTEMPTS: u32 = 3;
/// Attempts over all hops: a chain of proxies must not multiply them.
const MAX_TOTAL_ATTEMPTS: u32 = 6;
/// Retries earned by each call, in thousandths, and by each second.
const BUDGET_PER_CALL: u64 = 200;
const BUDGET_PER_SECOND: u64 = 10_000;
const BUDGET_MAX: u64 = 100_000;
/// Pause before a second attempt, at most; a first retry elsewhere needs hardly any.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// A call into the mesh.
#[derive(Debug)]
pub struct Call {
    /// Whom to ask.
    pub service: Name,
    /// Only instances of that API version; any if `None`.
    pub version: Option<String>,
    /// The request, normalised: path and query as its target, no Host, no hop-by-hop fields.
    pub request: Request<Body>,
    /// How long the head of the answer may take, from now or from the last progress of the upload.
    pub timeout: Duration,
}

/// Whose fault a failed call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The caller asked for something impossible, or went away.
    Caller,
    /// The mesh could not carry it.
    Mesh,
    /// The service failed.
    Service,
}

/// Whether the service may have acted on a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// Certainly not: another attempt is safe, whatever the method.
    No,
    /// Perhaps.
    Maybe,
}

/// A call without an answer.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{detail}")]
pub struct CallError {
    /// Whose fault.
    pub fault: Fault,
    /// Whether the service may have acted.
    pub sent: Sent,
    /// Status to answer with.
    pub status: StatusCode,
    /// For Proxy-Status.
    pub error: ProxyError,
    /// What happened, for people.
    pub detail: String,
}

impl CallError {
    fn new(fault: Fault, sent: Sent, status: StatusCode, error: ProxyError, detail: impl Into<String>) -> Self {
        Self { fault, sent, status, error, detail: detail.into() }
    }

    fn terminated(sent: Sent, detail: impl Into<String>) -> Self {
        Self::new(Fault::Service, sent, StatusCode::BAD_GATEWAY, ProxyError::ConnectionTerminated, detail)
    }
}

impl From<CallError> for Problem {
    fn from(error: CallError) -> Self {
        let problem = Problem::proxy(error.status, error.error, error.detail);
        if error.status == StatusCode::SERVICE_UNAVAILABLE {
            problem.retry_after(Duration::from_secs(1))
        } else {
            problem
        }
    }
}

/// Calls services. Cheap to clone; every clone shares connections and experience.
#[derive(Clone)]
pub struct MeshClient(Arc<Shared>);

struct Shared {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    pool: Arc<Pool>,
    zone: String,
    /// How we sign in `Via`.
    pseudonym: String,
    via: HeaderValue,
    budget: RetryBudget,
    retries: AtomicU64,
}

impl MeshClient {
    pub(crate) fn new(
        snapshot: watch::Receiver<Arc<Snapshot>>,
        pool: Arc<Pool>,
        zone: String,
        pseudonym: String,
    ) -> Self {
        let via = HeaderValue::from_str(&format!("2 {pseudonym}")).expect("a pseudonym is ASCII");
        let budget = RetryBudget::default();
        Self(Arc::new(Shared { snapshot, pool, zone, pseudonym, via, budget, retries: AtomicU64::new(0) }))
    }

    /// How this node calls itself in `Via` and `Proxy-Status`.
    pub fn pseudonym(&self) -> &str {
        &self.0.pseudonym
    }

    /// Calls in flight.
    pub fn in_flight(&self) -> usize {
        self.0.pool.in_flight()
    }

    /// Attempts beyond the first, since the start.
    pub fn retries(&self) -> u64 {
        self.0.retries.load(Relaxed)
    }

    /// Whether calls keep away from that peer for now.
    pub fn is_ejected(&self, id: &NodeId) -> bool {
        self.0.pool.is_ejected(id)
    }

    /// The mesh as calls see it.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.snapshot.borrow().clone()
    }

    pub(crate) fn forget_strangers(&self) {
        let snapshot = self.snapshot();
        self.0.pool.retain(|id| snapshot.member(id).is_some());
    }

    /// Makes a call. Dropping the future cancels it at the service's node too.
    pub async fn call(&self, call: Call) -> Result<Response<Body>, CallError> {
        let Call { service, version, request, timeout } = call;
        let (mut parts, body) = request.into_parts();
        let earlier = attempts_so_far(&parts.headers);
        self.prepare(&mut parts)?;
        self.0.budget.earn();

        let bodiless = http_body::Body::is_end_stream(&body);
        let source = (!bodiless).then(|| Source::new(body));
        let started = Instant::now();
        let mut tried: Vec<NodeId> = Vec::new();
        loop {
            let candidate = self.candidate(&service, version.as_deref(), &tried)?;
            let attempt = tried.len() as u32 + 1;
            tried.push(candidate.instance.node);
            parts.headers.insert(headers::ATTEMPT, HeaderValue::from(earlier + attempt));
            let timing = Timing { started, timeout };
            let outcome = self.attempt(&candidate, &service, &parts, source.as_ref(), timing).await;

            let last = attempt >= MAX_ATTEMPTS || earlier + attempt >= MAX_TOTAL_ATTEMPTS;
            let may_repeat = |sent: Sent| {
                !last
                    && started.elapsed() < timeout
                    && (sent == Sent::No || parts.method.is_idempotent())
                    && source.as_ref().is_none_or(Source::can_replay)
                    && self.0.budget.spend()
            };
            match outcome {
                Ok(answer) => match answer.unanswered {
                    Some(sent) if may_repeat(sent) => {}
                    _ => return Ok(answer.response),
                },
                Err(error) if error.fault == Fault::Caller || !may_repeat(error.sent) => return Err(error),
                Err(_) => {}
            }
            self.0.retries.fetch_add(1, Relaxed);
            if attempt > 1 {
                let pause = RETRY_PAUSE.mul_f64(rand::rng().random_range(0.1..1.0));
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// What is the same for every attempt.
    fn prepare(&self, parts: &mut request::Parts) -> Result<(), CallError> {
        let own = &self.0.pseudonym;
        let visits = parts
            .headers
            .get_all(header::VIA)
            .iter()
            .filter_map(|via| via.to_str().ok())
            .flat_map(|via| via.split(','))
            .filter(|via| via.split_whitespace().nth(1) == Some(own))
            .count();
        if visits >= normal::MAX_VISITS {
            return Err(CallError::new(
                Fault::Caller,
                Sent::No,
                StatusCode::LOOP_DETECTED,
                ProxyError::ProxyLoopDetected,
                format!("the call has been through this node {visits} times already"),
            ));
        }
        parts.headers.append(header::VIA, self.0.via.clone());
        Ok(())
    }

    fn candidate(&self, service: &Name, version: Option<&str>, tried: &[NodeId]) -> Result<Candidate, CallError> {
        let snapshot = self.snapshot();
        let unavailable = |detail| {
            let status = StatusCode::SERVICE_UNAVAILABLE;
            CallError::new(Fault::Mesh, Sent::No, status, ProxyError::DestinationUnavailable, detail)
        };
        let Some(instances) = snapshot.instances(service) else {
            return Err(CallError::new(
                Fault::Caller,
                Sent::No,
                StatusCode::NOT_FOUND,
                ProxyError::DestinationNotFound,
                format!("no node of the mesh serves {service}"),
            ));
        };
        let matching = instances.iter().filter(|i| version.is_none_or(|v| i.version == v)).cloned();
        let candidates = self.0.pool.candidates(matching);
        pick(&candidates, &self.0.zone, tried, &mut rand::rng()).cloned().ok_or_else(|| match version {
            Some(version) => unavailable(format!("no instance of {service} {version} is alive")),
            None => unavailable(format!("no instance of {service} is alive")),
        })
    }

    async fn attempt(
        &self,
        candidate: &Candidate,
        service: &Name,
        parts: &request::Parts,
        source: Option<&Source>,
        timing: Timing,
    ) -> Result<Answer, CallError> {
        let Candidate { instance, load } = candidate;
        let link = self.0.pool.link(instance).await.map_err(|e| {
            CallError::new(
                Fault::Mesh,
                Sent::No,
                StatusCode::SERVICE_UNAVAILABLE,
                ProxyError::DestinationUnavailable,
                format!("node {} of {service} cannot be reached: {e}", instance.node_name),
            )
        })?;
        let counted = load.begin();
        link.wake_watch();
        let begun = Instant::now();
        let exchanged = exchange(&link, instance, head(service, parts, timing.left()), source, timing).await;
        let (response, receive, upload) = match exchanged {
            Ok(exchanged) => exchanged,
            Err(error) => {
                if source.is_some_and(Source::is_broken) {
                    let status = StatusCode::BAD_REQUEST;
                    let detail = "the request body broke off";
                    return Err(CallError::new(
                        Fault::Caller,
                        Sent::Maybe,
                        status,
                        ProxyError::HttpRequestError,
                        detail,
                    ));
                }
                match error.error {
                    ProxyError::HttpResponseTimeout => load.answered(timing.timeout, true),
                    _ => load.answered(begun.elapsed(), error.fault != Fault::Caller),
                }
                return Err(error);
            }
        };
        let (mut head, ()) = response.into_parts();
        let failed = head.status.is_server_error() || head.status == StatusCode::TOO_MANY_REQUESTS;
        load.answered(begun.elapsed(), failed);
        let length = normal::normalise_response(&mut head, &parts.method, Origin::Mesh).map_err(|m| {
            let error = ProxyError::HttpProtocolError;
            CallError::new(Fault::Service, Sent::Maybe, StatusCode::BAD_GATEWAY, error, m.reason)
        })?;
        if let Some(told) = number(&head.headers, headers::LOAD) {
            load.told(told);
        }
        // Only a node sets this field, on answers of its own making: the service's word is never taken for it.
        let unanswered = head.headers.remove(headers::SENT).map(|v| if v == "no" { Sent::No } else { Sent::Maybe });
        head.headers.remove(headers::LOAD);
        head.version = http::Version::HTTP_11;
        // gRPC's "Trailers-Only": the status stands in the head, and clients want the stream to end with it. Over h3 the end
        // may come in a later packet, so it is not waited for but known.
        let body =
            if starling_http::is_grpc(&head.headers) && length.is_none() && head.headers.contains_key("grpc-status") {
                Body::empty()
            } else {
                Body::h3_client(receive)
            };
        let body = body.with_length(length).keep((counted, link, upload));
        Ok(Answer { response: Response::from_parts(head, body), unanswered })
    }
}

/// A response, and whether it was made by the service's node in place of the service.
struct Answer {
    response: Response<Body>,
    unanswered: Option<Sent>,
}

#[derive(Clone, Copy)]
struct Timing {
    started: Instant,
    timeout: Duration,
}

impl Timing {
    fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.started.elapsed())
    }
}

type ReceiveStream = h3::client::RequestStream<guard::Recv, Bytes>;
type SendStream = h3::client::RequestStream<guard::Send, Bytes>;

/// Sends a request and waits for the head of the answer. The upload goes on after it; dropping its handle resets it.
async fn exchange(
    link: &Link,
    instance: &Instance,
    head: Request<()>,
    source: Option<&Source>,
    timing: Timing,
) -> Result<(Response<()>, ReceiveStream, Option<AbortOnDropHandle<()>>), CallError> {
    let node = &instance.node_name;
    let opened = async {
        let stream = link.send.clone().send_request(head).await.map_err(|e| fault_of(&e, link, node, Sent::No))?;
        let (mut send, mut receive) = stream.split();
        let upload = match source {
            None => {
                send.finish().await.map_err(|e| fault_of(&e, link, node, Sent::Maybe))?;
                None
            }
            Some(source) => Some(AbortOnDropHandle::new(tokio::spawn(upload(send, source.attempt())))),
        };
        let response = receive.recv_response().await.map_err(|e| fault_of(&e, link, node, Sent::Maybe))?;
        Ok((response, receive, upload))
    };
    tokio::select! {
        exchanged = opened => exchanged,
        () = link.silent.cancelled() => {
            Err(CallError::terminated(Sent::Maybe, format!("node {node} does not answer any more")))
        }
        () = late(source, timing.left()) => Err(CallError::new(
            Fault::Service,
            Sent::Maybe,
            StatusCode::GATEWAY_TIMEOUT,
            ProxyError::HttpResponseTimeout,
            format!("no answer within {} ms", timing.timeout.as_millis()),
        )),
    }
}

/// Sends a body. One that breaks off resets the stream, so that the service never sees a short one as complete.
async fn upload(mut stream: SendStream, mut body: Body) {
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            stream.stop_stream(Code::H3_REQUEST_CANCELLED);
            return;
        };
        let sent = match frame.into_data() {
            Ok(data) => stream.send_data(data).await,
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => stream.send_trailers(trailers).await,
                Err(_) => Ok(()),
            },
        };
        // The service answered without wanting the rest, or is gone: the answer tells.
        if sent.is_err() {
            return;
        }
    }
    let _ = stream.finish().await;
}

fn fault_of(error: &StreamError, link: &Link, node: &Name, sent: Sent) -> CallError {
    match error {
        StreamError::HeaderTooBig { .. } => CallError::new(
            Fault::Caller,
            Sent::No,
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ProxyError::HttpRequestError,
            "the header fields are too large",
        ),
        StreamError::RemoteTerminate { code, .. } if *code == Code::H3_REQUEST_REJECTED => {
            link.retire();
            CallError::terminated(Sent::No, format!("node {node} is going away"))
        }
        StreamError::RemoteTerminate { code, .. } => {
            CallError::terminated(Sent::Maybe, format!("node {node} broke the call off ({code})"))
        }
        other => {
            link.retire();
            CallError::terminated(sent, format!("connection to node {node}: {other}"))
        }
    }
}

/// The head for one attempt. h3 closes the connection over a target without scheme or authority, so they are always set.
fn head(service: &Name, parts: &request::Parts, left: Duration) -> Request<()> {
    let mut uri = uri::Parts::default();
    uri.scheme = Some(uri::Scheme::HTTPS);
    uri.authority = service.service_host().parse().ok();
    uri.path_and_query = Some(parts.uri.path_and_query().cloned().unwrap_or(uri::PathAndQuery::from_static("/")));
    let mut request = Request::new(());
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = Uri::from_parts(uri).expect("scheme, authority and path make a target");
    request.headers_mut().clone_from(&parts.headers);
    request.headers_mut().insert(headers::DEADLINE, HeaderValue::from(left.as_millis() as u64));
    request
}

fn attempts_so_far(fields: &HeaderMap) -> u32 {
    number(fields, headers::ATTEMPT).unwrap_or(1u32).saturating_sub(1).min(MAX_TOTAL_ATTEMPTS)
}

pub(crate) fn number<T: std::str::FromStr>(fields: &HeaderMap, name: &str) -> Option<T> {
    fields.get(name)?.to_str().ok()?.parse().ok()
}

/// Retries are bounded by what succeeds: a fifth of the calls, and ten a second for quiet times.
struct RetryBudget(Mutex<Budget>);

struct Budget {
    /// In thousandths of a retry.
    balance: u64,
    refilled: Instant,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self(Mutex::new(Budget { balance: BUDGET_PER_SECOND, refilled: Instant::now() }))
    }
}

impl RetryBudget {
    fn earn(&self) {
        let mut budget = self.lock();
        budget.balance = (budget.balance + BUDGET_PER_CALL).min(BUDGET_MAX);
    }

    fn spend(&self) -> bool {
        let mut budget = self.lock();
        let elapsed = budget.refilled.elapsed();
        budget.refilled = Instant::now();
        let earned = (elapsed.as_secs_f64() * BUDGET_PER_SECOND as f64) as u64;
        // Time alone never saves up more than a second's worth.
        budget.balance = budget.balance.max((budget.balance + earned).min(BUDGET_PER_SECOND)).min(BUDGET_MAX);
        let enough = budget.balance >= 1000;
        if enough {
            budget.balance -= 1000;
        }
        enough
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Budget> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stay_within_a_fifth_of_the_calls() {
        let budget = RetryBudget::default();
        while budget.spend() {}
        for _ in 0..1000 {
            budget.earn();
        }
        let retries = (0..).take_while(|_| budget.spend()).count();
        assert!((99..=112).contains(&retries), "{retries}: capped at 100, and what the time of the test earned");
    }
}
