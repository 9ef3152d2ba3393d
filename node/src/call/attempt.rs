//! One attempt of a call, at one instance.

use std::time::{Duration, Instant};

use http::{HeaderValue, Response, StatusCode, request};
use starling_gossip::Instance;
use starling_http::{
    Body, Guard, Guarded, ProxyError, Source,
    h3::{
        Broken, Code,
        client::{self, Head, RequestError},
    },
    late,
    normal::{self, Origin, number},
};
use starling_protocol::{Name, headers};
use tokio_util::task::AbortOnDropHandle;

use super::{
    CallError, Fault, MeshClient, Sent,
    choose::{Candidate, PendingCall},
    connect::Connection,
};

impl MeshClient {
    pub(super) async fn attempt(
        &self,
        candidate: &Candidate,
        service: &Name,
        parts: &mut request::Parts,
        source: Option<&Source>,
        timing: Timing,
    ) -> Result<Attempted, CallError> {
        let Candidate { instance, load } = candidate;
        let connection = self.0.pool.connection(instance).await.map_err(|e| {
            CallError::new(
                Fault::Mesh,
                Sent::No,
                StatusCode::SERVICE_UNAVAILABLE,
                ProxyError::DestinationUnavailable,
                format!("node {} of {service} cannot be reached: {e}", instance.node_name),
            )
        })?;
        let pending = load.begin();
        connection.wake_watch();
        let begun = Instant::now();
        parts.headers.insert(headers::DEADLINE, HeaderValue::from(timing.left().as_millis() as u64));
        let client::Answer { mut head, body, upload } =
            match exchange(&connection, instance, service, parts, source, timing).await {
                Ok(answer) => answer,
                Err(_) if source.is_some_and(Source::is_broken) => {
                    let (status, error) = (StatusCode::BAD_REQUEST, ProxyError::HttpRequestError);
                    let detail = "the request body broke off";
                    return Err(CallError::new(Fault::Caller, Sent::Maybe, status, error, detail));
                }
                Err(error) => {
                    match error.error {
                        ProxyError::HttpResponseTimeout => load.answered(timing.timeout, true),
                        _ => load.answered(begun.elapsed(), error.fault != Fault::Caller),
                    }
                    return Err(error);
                }
            };
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
        let is_trailers_only =
            starling_http::is_grpc(&head.headers) && length.is_none() && head.headers.contains_key("grpc-status");
        let body = if is_trailers_only { Body::empty() } else { body.with_length(length) };
        let carried = Carried { _pending: pending, _connection: connection, _upload: upload };
        Ok(Attempted { response: Response::from_parts(head, Guarded::new(body, carried)), unanswered })
    }
}

/// What the body of an answer keeps: the count of its call, the connection, and the rest of the upload, which ends with it.
pub struct Carried {
    _pending: PendingCall,
    _connection: Connection,
    _upload: Option<AbortOnDropHandle<()>>,
}

impl Guard for Carried {}

/// What an attempt brought: a response, and whether it was made by the service's node in place of the service.
pub(super) struct Attempted {
    pub(super) response: Response<Guarded<Carried>>,
    pub(super) unanswered: Option<Sent>,
}

#[derive(Clone, Copy)]
pub(super) struct Timing {
    pub(super) started: Instant,
    pub(super) timeout: Duration,
}

impl Timing {
    fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.started.elapsed())
    }
}

/// Sends a request and waits for the head of the answer, no longer than there is time, or than the peer shows that it lives.
async fn exchange(
    connection: &Connection,
    instance: &Instance,
    service: &Name,
    parts: &request::Parts,
    source: Option<&Source>,
    timing: Timing,
) -> Result<client::Answer, CallError> {
    let node = &instance.node_name;
    let authority = service.service_host();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let head = Head { method: &parts.method, authority: &authority, path, fields: &parts.headers };
    tokio::select! {
        biased;
        answered = connection.client().send(head, source.map(Source::attempt)) => {
            answered.map_err(|error| fault_of(&error, connection, node))
        }
        () = connection.silent() => {
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

fn fault_of(error: &RequestError, connection: &Connection, node: &Name) -> CallError {
    match error {
        RequestError::TooLarge => CallError::new(
            Fault::Caller,
            Sent::No,
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ProxyError::HttpRequestError,
            "the header fields are too large",
        ),
        RequestError::Broken(Broken::Reset(code)) if *code == Code::H3_REQUEST_REJECTED => {
            connection.retire();
            CallError::terminated(Sent::No, format!("node {node} is going away"))
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
            CallError::terminated(Sent::Maybe, format!("connection to node {node}: {error}"))
        }
        RequestError::NotSent(error) => {
            connection.retire();
            CallError::terminated(Sent::No, format!("connection to node {node}: {error}"))
        }
        RequestError::Body => CallError::terminated(Sent::Maybe, "the request body broke off"),
    }
}
