//! One attempt of a call, at one instance.

use std::time::{Duration, Instant};

use bytes::Bytes;
use h3::error::{Code, StreamError};
use http::{HeaderValue, Request, Response, StatusCode, Uri, request, uri};
use http_body_util::BodyExt;
use starling_gossip::Instance;
use starling_http::{
    Body, ProxyError, Source, guard, late,
    normal::{self, Origin, number},
};
use starling_protocol::{Name, headers};
use tokio_util::task::AbortOnDropHandle;

use super::{CallError, Fault, MeshClient, Sent};
use crate::{call::choose::Candidate, call::connect::Connection};

impl MeshClient {
    pub(super) async fn attempt(
        &self,
        candidate: &Candidate,
        service: &Name,
        parts: &request::Parts,
        source: Option<&Source>,
        timing: Timing,
    ) -> Result<Answer, CallError> {
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
        let counted = load.begin();
        connection.wake_watch();
        let begun = Instant::now();
        let exchanged = exchange(&connection, instance, head(service, parts, timing.left()), source, timing).await;
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
        let body = body.with_length(length).keep((counted, connection, upload));
        Ok(Answer { response: Response::from_parts(head, body), unanswered })
    }
}

/// A response, and whether it was made by the service's node in place of the service.
pub(super) struct Answer {
    pub(super) response: Response<Body>,
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

type ReceiveStream = h3::client::RequestStream<guard::Recv, Bytes>;
type SendStream = h3::client::RequestStream<guard::Send, Bytes>;

/// Sends a request and waits for the head of the answer. The upload goes on after it; dropping its handle resets it.
async fn exchange(
    connection: &Connection,
    instance: &Instance,
    head: Request<()>,
    source: Option<&Source>,
    timing: Timing,
) -> Result<(Response<()>, ReceiveStream, Option<AbortOnDropHandle<()>>), CallError> {
    let node = &instance.node_name;
    let opened = async {
        let stream =
            connection.send.clone().send_request(head).await.map_err(|e| fault_of(&e, connection, node, Sent::No))?;
        let (mut send, mut receive) = stream.split();
        let upload = match source {
            None => {
                send.finish().await.map_err(|e| fault_of(&e, connection, node, Sent::Maybe))?;
                None
            }
            Some(source) => Some(AbortOnDropHandle::new(tokio::spawn(upload(send, source.attempt())))),
        };
        let response = receive.recv_response().await.map_err(|e| fault_of(&e, connection, node, Sent::Maybe))?;
        Ok((response, receive, upload))
    };
    tokio::select! {
        exchanged = opened => exchanged,
        () = connection.silent.cancelled() => {
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

fn fault_of(error: &StreamError, connection: &Connection, node: &Name, sent: Sent) -> CallError {
    match error {
        StreamError::HeaderTooBig { .. } => CallError::new(
            Fault::Caller,
            Sent::No,
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ProxyError::HttpRequestError,
            "the header fields are too large",
        ),
        StreamError::RemoteTerminate { code, .. } if *code == Code::H3_REQUEST_REJECTED => {
            connection.retire();
            CallError::terminated(Sent::No, format!("node {node} is going away"))
        }
        StreamError::RemoteTerminate { code, .. } => {
            CallError::terminated(Sent::Maybe, format!("node {node} broke the call off ({code})"))
        }
        other => {
            connection.retire();
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
