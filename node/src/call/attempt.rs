//! One attempt of a call, at one instance.

use std::time::{Duration, Instant};

use http::{HeaderValue, Method, Response, StatusCode, Version, request};
use starling_gossip::Instance;
use starling_http::{
    Body, Due, Guard, Guarded, Head, Interim, Late, ProxyError, Source, grpc_timeout,
    h3::{
        Broken, Code,
        client::{self, RequestError},
    },
    is_grpc, names,
    normal::{self, Origin, number},
    tunnel::{self, NotSwitched, Protocol},
};
use starling_protocol::{Name, headers};
use tokio_util::task::AbortOnDropHandle;

use super::{
    CallError, Fault, MeshClient, Sent,
    choose::{Candidate, PendingCall},
    connect::{Connection, InUse, Lane},
};
use crate::observe::trace::{OpenSpan, Value};

/// What all attempts of a call have in common.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    pub(super) service: &'a Name,
    pub(super) source: Option<&'a Source>,
    pub(super) due: &'a Due,
    pub(super) idle: Option<Duration>,
    pub(super) until: Option<Instant>,
    /// How long others would wait for the head.
    pub(super) patience: Duration,
}

impl MeshClient {
    pub(super) async fn attempt(
        &self,
        candidate: &Candidate,
        parts: &mut request::Parts,
        terms: Terms<'_>,
        mut span: Option<Box<OpenSpan>>,
    ) -> Result<Attempted, CallError> {
        let outcome = self.made(candidate, parts, terms, &mut span).await;
        if let (Err(error), Some(span)) = (&outcome, &mut span) {
            let why = match error.fault {
                Fault::Caller => "caller",
                Fault::Service => "service",
                Fault::Connection => "connection",
                Fault::Mesh => "unreachable",
            };
            span.fail_because(why, error.to_string());
        }
        outcome
    }

    async fn made(
        &self,
        candidate: &Candidate,
        parts: &mut request::Parts,
        terms: Terms<'_>,
        span: &mut Option<Box<OpenSpan>>,
    ) -> Result<Attempted, CallError> {
        let Terms { service, source, due, idle, until, patience } = terms;
        let instance = &candidate.instance;
        let unreached = |why: String| {
            let detail = format!("node {} of {service} cannot be reached: {why}", instance.node_name);
            let (status, error) = (StatusCode::SERVICE_UNAVAILABLE, ProxyError::DestinationUnavailable);
            CallError::new(Fault::Mesh, Sent::No, status, error, detail)
        };
        let connection = tokio::select! {
            biased;
            connection = self.pool.connection(instance, Lane::of(parts)) => connection.map_err(|e| unreached(e.to_string()))?,
            late = due.passed() => return Err(too_late(late, due, Sent::No)),
        };
        let mut pending = candidate.begin();
        if source.is_some() {
            // A slow upload is nobody's latency but the caller's.
            pending.excuse();
        }
        let connection = connection.begin(parts.method == Method::CONNECT);
        let begun = Instant::now();
        if let Some(span) = span {
            span.tell_time("starling.queue_us", span.begun());
        }
        tell_deadline(parts, due, until);
        let outcome = exchange(&connection, instance, parts, terms).await;
        let since = source.filter(|source| source.has_ended()).map_or(begun, |source| source.moved().max(begun));
        let latency = since.elapsed();
        // Who has waited for less says only how long it took at least: he had no time, or an attempt before this one had it.
        let is_fault = latency >= patience / 2;
        let client::Answer { mut head, body, upload } = match outcome {
            Ok(answer) => answer,
            Err(_) if source.is_some_and(Source::is_broken) => {
                pending.excuse();
                let (status, error) = (StatusCode::BAD_REQUEST, ProxyError::HttpRequestError);
                let detail = "the request body broke off";
                return Err(CallError::new(Fault::Caller, Sent::Maybe, status, error, detail));
            }
            Err(error) => {
                // That a connection went, or is going, says nothing about the service behind it.
                match error.fault {
                    Fault::Service if error.status == StatusCode::GATEWAY_TIMEOUT && !is_fault => {}
                    Fault::Service => pending.answered(latency, true),
                    _ => pending.excuse(),
                }
                return Err(error);
            }
        };
        let failed = head.status.is_server_error() || head.status == StatusCode::TOO_MANY_REQUESTS;
        // The node's own word, which services cannot say.
        match (head.headers.get(&names::SENT), head.status) {
            // It has too much to do, and does that well.
            (Some(sent), StatusCode::SERVICE_UNAVAILABLE) if sent == "no" => pending.refused(),
            (Some(_), StatusCode::GATEWAY_TIMEOUT) if !is_fault => {}
            _ => pending.answered(latency, failed),
        }
        let length = normal::normalise_response(&mut head, &parts.method, Origin::Mesh).map_err(|m| {
            let error = ProxyError::HttpProtocolError;
            CallError::new(Fault::Service, Sent::Maybe, StatusCode::BAD_GATEWAY, error, m.reason)
        })?;
        if let Some(told) = number(&head.headers, headers::LOAD) {
            pending.told(told);
        }
        // Only a node sets this field, on answers of its own making: the service's word is never taken for it.
        let sent = head.headers.remove(&names::SENT).map(|v| if v == "no" { Sent::No } else { Sent::Maybe });
        // What is wrong with the request itself is wrong everywhere.
        let elsewhere = head.status.is_server_error() || head.status == StatusCode::NOT_FOUND;
        let unanswered = sent.filter(|_| elsewhere);
        head.headers.remove(&names::LOAD);
        if head.headers.remove(&names::NOT_SWITCHED).is_some() {
            head.extensions.insert(NotSwitched);
        }
        head.version = Version::HTTP_11;
        // gRPC's "Trailers-Only": the status stands in the head, and clients want the stream to end with it. Over h3 the end
        // may come in a later packet, so it is not waited for but known.
        let is_trailers_only =
            is_grpc(&head.headers) && length.unwrap_or(0) == 0 && head.headers.contains_key("grpc-status");
        let body = match is_trailers_only {
            true => Body::empty(),
            // Over HTTP/1.1 trailers get lost, and it would look whole.
            false if is_grpc(&head.headers) && parts.version >= Version::HTTP_2 => {
                body.with_length(length).with_pace(idle, until, source).ending_as_grpc()
            }
            false => body.with_length(length).with_pace(idle, until, source),
        };
        if let Some(span) = span {
            span.tell("http.response.status_code", Value::Number(head.status.as_u16().into()));
            span.tell_time("starling.head_us", begun);
            if head.status.is_client_error() || head.status.is_server_error() {
                span.fail(head.status.as_str().to_string());
            }
        }
        let span = span.take();
        let is_tunnel = tunnel::is_open(&parts.method, &head);
        if is_tunnel {
            pending.opened();
            if let Some(source) = source {
                source.keep_no_more();
            }
        }
        let rest = source.filter(|_| is_tunnel).map(|source| Rest { source: source.clone(), idle, until });
        let carried = Carried { _pending: pending, connection: Some(connection), upload, rest, span };
        Ok(Attempted {
            response: Response::from_parts(head, Guarded::new(body, carried)),
            unanswered,
            by_node: sent.is_some(),
        })
    }
}

/// What the body of an answer keeps: the count of its call, the connection, and the rest of the upload, which ends with it.
pub struct Carried {
    _pending: PendingCall,
    connection: Option<InUse>,
    upload: Option<AbortOnDropHandle<()>>,
    /// Of a tunnel.
    rest: Option<Rest>,
    /// Of the attempt: it ends with the answer.
    span: Option<Box<OpenSpan>>,
}

impl Guard for Carried {
    fn ended(&mut self) {
        self.span = None;
        // Who says no more through a tunnel may still listen; what goes there ends by itself.
        if let Some((upload, rest)) = self.upload.take_if(|_| self.rest.is_some()).zip(self.rest.take()) {
            let connection = self.connection.take();
            let due = Due::new(None, rest.until, Some(&rest.source)).or_idle(rest.idle);
            tokio::spawn(async move {
                tokio::select! {
                    _ = upload => {}
                    _ = due.passed() => {}
                }
                drop(connection);
            });
        }
    }
}

/// What still goes into a tunnel out of which nothing comes any more: the limits of both hold for it alone.
struct Rest {
    source: Source,
    idle: Option<Duration>,
    until: Option<Instant>,
}

impl Drop for Carried {
    fn drop(&mut self) {
        if let Some(span) = &mut self.span {
            span.fail("cut");
        }
    }
}

/// What an attempt brought: a response, and whether it was made by the service's node in place of the service.
pub(super) struct Attempted {
    pub(super) response: Response<Guarded<Carried>>,
    pub(super) unanswered: Option<Sent>,
    /// Whether a node made it, not the service.
    pub(super) by_node: bool,
}

impl Attempted {
    pub(super) fn into_response(self) -> Response<Guarded<Carried>> {
        let mut response = self.response;
        if self.by_node {
            response.extensions_mut().insert(MadeByNode);
        }
        response
    }
}

/// Marks a response, by an extension, that a node made in place of the service: what it says is for the mesh, not for the
/// public.
#[derive(Debug, Clone, Copy)]
pub struct MadeByNode;

/// Tells the node how long it is waited for, and the service, too, if it understands that.
///
/// To gRPC a deadline is that of the whole call, to a node that of the answer's head.
fn tell_deadline(parts: &mut request::Parts, due: &Due, until: Option<Instant>) {
    match due.left_for_answer() {
        Some(left) => drop(parts.headers.insert(names::DEADLINE.clone(), names::numeral(left.as_millis() as u64))),
        None => drop(parts.headers.remove(&names::DEADLINE)),
    }
    if let Some(until) = until
        && is_grpc(&parts.headers)
        && grpc_timeout(&parts.headers).is_some()
    {
        let left_ms = until.saturating_duration_since(Instant::now()).as_millis() as u64;
        // Eight digits at most, says the protocol.
        let value = if left_ms < 100_000_000 { format!("{left_ms}m") } else { format!("{}S", left_ms / 1000) };
        parts.headers.insert("grpc-timeout", HeaderValue::from_str(&value).expect("digits and a letter"));
    }
}

fn too_late(late: Late, due: &Due, sent: Sent) -> CallError {
    match late {
        Late::Answer => CallError::new(
            Fault::Service,
            sent,
            StatusCode::GATEWAY_TIMEOUT,
            ProxyError::HttpResponseTimeout,
            format!("no answer within {} ms", due.limit().as_millis()),
        ),
        Late::Upload => CallError::new(
            Fault::Caller,
            sent,
            StatusCode::REQUEST_TIMEOUT,
            ProxyError::HttpRequestError,
            "the rest of the request does not come",
        ),
    }
}

/// Sends a request and waits for the head of the answer, no longer than there is time, or than the peer shows that it lives.
async fn exchange(
    connection: &Connection,
    instance: &Instance,
    parts: &request::Parts,
    terms: Terms<'_>,
) -> Result<client::Answer, CallError> {
    let node = &instance.node_name;
    let protocol = parts.extensions.get::<Protocol>();
    let host = terms.service.service_host();
    // CONNECT by itself has a port (RFC 9114 §4.4), though a service has but one.
    let is_plain_tunnel = parts.method == Method::CONNECT && protocol.is_none();
    let authority = if is_plain_tunnel { format!("{host}:0") } else { host };
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let head = Head {
        method: &parts.method,
        authority: &authority,
        path,
        fields: &parts.headers,
        protocol,
        interim: Interim::of(parts),
    };
    tokio::select! {
        biased;
        answered = connection.client().send(head, terms.source.map(Source::attempt)) => {
            answered.map_err(|error| fault_of(&error, connection, node))
        }
        () = connection.silent() => Err(lost(Sent::Maybe, format!("node {node} does not answer any more"))),
        late = terms.due.passed() => Err(too_late(late, terms.due, Sent::Maybe)),
    }
}

/// The connection went. Whether the node is reached at all, the next dial finds out.
fn lost(sent: Sent, detail: String) -> CallError {
    CallError { fault: Fault::Connection, ..CallError::terminated(sent, detail) }
}

fn fault_of(error: &RequestError, connection: &Connection, node: &Name) -> CallError {
    match error {
        RequestError::Full => CallError::new(
            Fault::Connection,
            Sent::No,
            StatusCode::SERVICE_UNAVAILABLE,
            ProxyError::DestinationUnavailable,
            format!("node {node} has as many calls from here as it takes"),
        ),
        RequestError::Unsupported => CallError::new(
            Fault::Connection,
            Sent::No,
            StatusCode::NOT_IMPLEMENTED,
            ProxyError::HttpUpgradeFailed,
            format!("node {node} is of a version that does not change protocols"),
        ),
        RequestError::TooLarge => CallError::new(
            Fault::Caller,
            Sent::No,
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ProxyError::HttpRequestError,
            "the header fields are too large",
        ),
        RequestError::Broken(Broken::Reset(code)) if *code == Code::H3_REQUEST_REJECTED => {
            connection.retire();
            lost(Sent::No, format!("node {node} is going away"))
        }
        RequestError::Broken(Broken::Reset(code)) => {
            CallError::terminated(Sent::Maybe, format!("node {node} broke the call off ({code})"))
        }
        RequestError::Broken(Broken::Fault(fault)) => CallError::new(
            Fault::Service,
            Sent::Maybe,
            StatusCode::BAD_GATEWAY,
            ProxyError::HttpProtocolError,
            format!("node {node} answered against the protocol: {fault}"),
        ),
        RequestError::Broken(Broken::Lost(error)) => {
            connection.retire();
            lost(Sent::Maybe, format!("connection to node {node}: {error}"))
        }
        RequestError::NotSent(error) => {
            connection.retire();
            lost(Sent::No, format!("connection to node {node}: {error}"))
        }
        RequestError::Stalled => CallError::new(
            Fault::Service,
            Sent::Maybe,
            StatusCode::GATEWAY_TIMEOUT,
            ProxyError::HttpResponseTimeout,
            format!("node {node} does not take the request"),
        ),
        RequestError::Body => CallError::terminated(Sent::Maybe, "the request body broke off"),
    }
}
