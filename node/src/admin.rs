//! The admin API: JSON over HTTP/1.1, on loopback and on a Unix socket in the state directory.

use std::{convert::Infallible, future::Future, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use starling_gossip::{MemberView, Snapshot};
use starling_protocol::{MemberHealth, NodeKind, admin};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};

use crate::{Body, MeshClient};

/// Longest request body, in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;

/// What the admin API asks of the node.
pub(crate) trait Subject: Send + Sync + 'static {
    fn snapshot(&self) -> Arc<Snapshot>;
    fn client(&self) -> &MeshClient;
    fn status(&self) -> admin::Status;
    fn is_ready(&self) -> bool;
    fn metrics(&self) -> impl Future<Output = String> + Send;
    fn drain(&self);
    fn reload(&self) -> Result<(), String>;
    fn extra(&self) -> Option<Arc<dyn ExtraRoutes>>;
}

/// Routes that an edge adds.
pub trait ExtraRoutes: Send + Sync {
    /// Answers a request, or `None` if the path is not its own.
    fn answer(&self, method: &Method, path: &str, body: &Bytes) -> Option<(StatusCode, serde_json::Value)>;
}

/// Serves on a TCP listener for as long as the process lives: a draining node still answers its operator.
pub(crate) async fn serve_tcp<S: Subject>(listener: TcpListener, subject: Arc<S>) {
    let addr = listener.local_addr().ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve_connection(stream, subject.clone(), addr));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Serves on a Unix socket; the directory's mode says who may connect.
pub(crate) async fn serve_unix<S: Subject>(path: &Path, subject: Arc<S>) {
    // A former life, killed, leaves its socket behind; the lock on the state directory says that nobody uses it.
    let _ = std::fs::remove_file(path);
    let listener = match UnixListener::bind(path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "no admin socket");
            return;
        }
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve_connection(stream, subject.clone(), None));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn serve_connection<S: Subject>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    subject: Arc<S>,
    tcp: Option<SocketAddr>,
) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let subject = subject.clone();
        async move { Ok::<_, Infallible>(answer(request, &*subject, tcp).await) }
    });
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(10))
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer<S: Subject>(
    request: Request<hyper::body::Incoming>,
    subject: &S,
    tcp: Option<SocketAddr>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    if let Some(addr) = tcp
        && let Err(why) = check_browser(&parts.headers, addr)
    {
        return refuse(StatusCode::FORBIDDEN, why);
    }
    let body = match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return refuse(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or broke off"),
    };
    let path = parts.uri.path();
    let extra = subject.extra();
    if let Some((status, value)) = extra.and_then(|extra| extra.answer(&parts.method, path, &body)) {
        return json(status, &value);
    }
    let snapshot = subject.snapshot();
    match (parts.method.as_str(), path) {
        ("GET", "/livez") => text(StatusCode::OK, "ok\n".into()),
        ("GET", "/readyz") if subject.is_ready() => text(StatusCode::OK, "ok\n".into()),
        ("GET", "/readyz") => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n".into()),
        ("GET", "/metrics") => {
            let mut response = text(StatusCode::OK, subject.metrics().await);
            let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        ("GET", "/v1/members") => json(StatusCode::OK, &members(&snapshot)),
        ("GET", "/v1/services") => json(StatusCode::OK, &services(&snapshot, subject.client())),
        ("GET", "/v1/status") => json(StatusCode::OK, &subject.status()),
        ("POST", "/v1/drain" | "/v1/leave") => {
            subject.drain();
            json(StatusCode::ACCEPTED, &serde_json::json!({"phase": "draining"}))
        }
        ("POST", "/v1/reload") => match subject.reload() {
            Ok(()) => json(StatusCode::OK, &serde_json::json!({"reloaded": true})),
            Err(why) => refuse(StatusCode::UNPROCESSABLE_ENTITY, &why),
        },
        (
            _,
            "/livez" | "/readyz" | "/metrics" | "/v1/members" | "/v1/services" | "/v1/status" | "/v1/drain"
            | "/v1/leave" | "/v1/reload",
        ) => refuse(StatusCode::METHOD_NOT_ALLOWED, "wrong method for this path"),
        _ => refuse(StatusCode::NOT_FOUND, "no such path; see docs/operations.md"),
    }
}

/// A web page must not reach the API through its reader's browser: neither by a name that resolves here (DNS rebinding)
/// nor by a cross-site request.
fn check_browser(headers: &HeaderMap, addr: SocketAddr) -> Result<(), &'static str> {
    let port = addr.port();
    let own = |host: &str| {
        [format!("127.0.0.1:{port}"), format!("localhost:{port}"), format!("[::1]:{port}"), addr.to_string()]
            .iter()
            .any(|own| own.eq_ignore_ascii_case(host))
    };
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok());
    if !host.is_some_and(own) {
        return Err("the Host of this request is not this admin API; use 127.0.0.1 or localhost with the port");
    }
    match headers.get(header::ORIGIN).map(|o| o.to_str().ok().and_then(|o| o.strip_prefix("http://"))) {
        None => Ok(()),
        Some(Some(origin)) if own(origin) => Ok(()),
        Some(_) => Err("requests from other origins are refused"),
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    let mut response = Response::new(Body::full(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn refuse(status: StatusCode, why: &str) -> Response<Body> {
    json(status, &admin::Error { error: why.to_string() })
}

fn text(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Body::full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Unix seconds as RFC 3339.
pub(crate) fn rfc3339(unix: u64) -> String {
    let at = i64::try_from(unix).ok().and_then(|t| OffsetDateTime::from_unix_timestamp(t).ok());
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default()
}

pub(crate) fn status_of(member: &MemberView) -> admin::MemberStatus {
    match member.health {
        _ if member.left => admin::MemberStatus::Left,
        MemberHealth::Alive => admin::MemberStatus::Alive,
        MemberHealth::Suspect => admin::MemberStatus::Suspect,
        MemberHealth::Down => admin::MemberStatus::Down,
    }
}

fn members(snapshot: &Snapshot) -> Vec<admin::Member> {
    snapshot
        .members
        .iter()
        .map(|m| {
            let record = m.record.as_deref();
            let services = record.map_or(&[][..], |r| &r.services);
            admin::Member {
                name: record.map_or_else(|| format!("{:?}", m.id), |r| r.name.to_string()),
                id: m.id.to_string(),
                addr: m.addr,
                kind: record.map_or(NodeKind::Node, |r| r.kind),
                status: status_of(m),
                generation: m.generation,
                incarnation: m.incarnation,
                zone: record.map_or_else(String::new, |r| r.zone.clone()),
                services: services
                    .iter()
                    .map(|s| admin::MemberService {
                        name: s.name.clone(),
                        version: s.version.clone(),
                        protocol: s.protocol,
                        state: s.state,
                    })
                    .collect(),
                since: rfc3339(m.since),
                cert_expires: record.map(|r| rfc3339(r.cert_expires)),
                is_self: m.is_self,
            }
        })
        .collect()
}

fn services(snapshot: &Snapshot, client: &MeshClient) -> Vec<admin::Service> {
    let mut services: Vec<admin::Service> = Vec::new();
    for member in snapshot.members.iter().filter(|m| !m.left) {
        let Some(record) = &member.record else { continue };
        for service in &record.services {
            let instance = admin::ServiceInstance {
                node: record.name.to_string(),
                addr: member.addr,
                zone: record.zone.clone(),
                status: status_of(member),
                state: service.state,
                ejected: client.is_ejected(&member.id),
            };
            match services.iter_mut().find(|s| s.name == service.name && s.version == service.version) {
                Some(known) => known.instances.push(instance),
                None => services.push(admin::Service {
                    name: service.name.clone(),
                    version: service.version.clone(),
                    instances: vec![instance],
                }),
            }
        }
    }
    services.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    services
}
