//! The admin API: JSON over HTTP/1.1, on loopback and on a Unix socket in the state directory.

mod caller;
mod view;

use std::{
    convert::Infallible, fs, future::Future, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path, pin::Pin,
    sync::Arc, time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Serialize, de::DeserializeOwned};
use starling_gossip::Snapshot;
use starling_http::Body;
use starling_protocol::{DocumentEdition, Name, admin};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tokio_util::sync::CancellationToken;

use self::caller::{Caller, UNKNOWN};
pub use self::view::rfc3339;
pub(crate) use self::view::{members, name_of, services, sights, status_of};
use crate::observe::readings::Levels;

/// Longest request body, in bytes.
const MAX_BODY_BYTES: usize = 512 << 10;

/// What the admin API asks of the node.
pub(crate) trait Subject: Send + Sync + 'static {
    fn snapshot(&self) -> Arc<Snapshot>;
    fn services(&self) -> Vec<admin::Service>;
    fn status(&self) -> impl Future<Output = admin::Status> + Send;
    fn is_ready(&self) -> bool;
    fn metrics(&self) -> impl Future<Output = String> + Send;
    fn members(&self, detailed: bool) -> impl Future<Output = Vec<admin::Member>> + Send;
    fn views(&self) -> impl Future<Output = Vec<admin::ObserverView>> + Send;
    fn documents(&self) -> impl Future<Output = Vec<admin::Document>> + Send;
    fn publish(&self, new: admin::NewDocument) -> impl Future<Output = Result<DocumentEdition, String>> + Send;
    fn ping(&self, node: &str) -> impl Future<Output = Result<admin::Pinged, String>> + Send;
    fn forget(&self, forget: admin::Forget) -> impl Future<Output = Result<(), String>> + Send;
    fn names(&self) -> Result<Vec<admin::OwnedName>, String>;
    fn free_name(&self, name: Name) -> impl Future<Output = Result<(), String>> + Send;
    fn upgrade(&self, upgrade: admin::Upgrade) -> impl Future<Output = Result<admin::Upgraded, String>> + Send;
    fn drain(&self);
    fn reload(&self) -> Result<(), String>;
    fn extra(&self) -> Option<Arc<dyn ExtraRoutes>>;
}

/// What an edge adds to the admin API.
pub trait ExtraRoutes: Send + Sync {
    /// Figures of its own.
    fn readings(&self) -> Vec<Levels>;

    /// Answers a request, or `None` if the path is not its own.
    fn answer<'a>(&'a self, method: &'a Method, path: &'a str, body: &'a Bytes) -> ExtraAnswer<'a>;
}

/// An answer that may take its time.
pub type ExtraAnswer<'a> = Pin<Box<dyn Future<Output = Option<(StatusCode, serde_json::Value)>> + Send + 'a>>;

/// Serves on a TCP listener for as long as the process lives: a draining node still answers its operator. When it is `ended`,
/// because another process answers, connections end with the next answer.
pub(crate) async fn serve_tcp<S: Subject>(listener: TcpListener, subject: Arc<S>, ended: CancellationToken) {
    let addr = listener.local_addr().ok();
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let from = addr.map(|own| Caller::Tcp { own, from });
                let caller = from.unwrap_or(Caller::Unknown);
                tokio::spawn(serve_connection(stream, subject.clone(), caller, ended.clone()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Serves on a Unix socket, which only this user and root can open.
pub(crate) async fn serve_unix<S: Subject>(path: &Path, subject: Arc<S>, ended: CancellationToken) {
    // A former life leaves its socket behind; whoever is in charge has the directory.
    let _ = std::fs::remove_file(path);
    let own = || fs::set_permissions(path, fs::Permissions::from_mode(0o600));
    let listener = match UnixListener::bind(path).and_then(|listener| own().map(|()| listener)) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "no admin socket");
            return;
        }
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let user = stream.peer_cred().map(|peer| peer.uid());
                let caller = user.map_or(Caller::Unknown, |user| Caller::Unix { user });
                tokio::spawn(serve_connection(stream, subject.clone(), caller, ended.clone()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn serve_connection<S: Subject>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    subject: Arc<S>,
    caller: Caller,
    ended: CancellationToken,
) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let subject = subject.clone();
        async move { Ok::<_, Infallible>(answer(request, &*subject, caller).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(10))
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = ended.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn answer<S: Subject>(request: Request<hyper::body::Incoming>, subject: &S, caller: Caller) -> Response<Body> {
    let (parts, body) = request.into_parts();
    if let Caller::Tcp { own, .. } = caller
        && let Err(why) = check_browser(&parts.headers, own)
    {
        return refuse(StatusCode::FORBIDDEN, why);
    }
    let changes = !parts.method.is_safe();
    if changes && let Err(why) = tokio::task::spawn_blocking(move || caller.may_change()).await.unwrap_or(Err(UNKNOWN))
    {
        return refuse(StatusCode::FORBIDDEN, why);
    }
    let body = match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return refuse(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or broke off"),
    };
    let path = parts.uri.path();
    let extra = subject.extra();
    if let Some(extra) = extra
        && let Some((status, value)) = extra.answer(&parts.method, path, &body).await
    {
        return json(status, &value);
    }
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
        ("GET", "/v1/members") if has_query(&parts.uri, "from=all") => json(StatusCode::OK, &subject.views().await),
        ("GET", "/v1/members") => json(StatusCode::OK, &subject.members(has_query(&parts.uri, "detail=true")).await),
        ("GET", "/v1/documents") => json(StatusCode::OK, &subject.documents().await),
        ("POST", "/v1/documents") => match read(&body) {
            Ok(new) => answer_to(subject.publish(new).await),
            Err(why) => refuse(StatusCode::BAD_REQUEST, &why),
        },
        ("POST", "/v1/ping") => match read::<admin::Ping>(&body) {
            Ok(ping) => answer_to(subject.ping(&ping.node).await),
            Err(why) => refuse(StatusCode::BAD_REQUEST, &why),
        },
        ("POST", "/v1/forget") => match read::<admin::Forget>(&body) {
            Ok(forget) => answer_to(subject.forget(forget).await),
            Err(why) => refuse(StatusCode::BAD_REQUEST, &why),
        },
        ("GET", "/v1/names") => answer_to(subject.names()),
        ("POST", "/v1/names/free") => match read::<admin::FreeName>(&body) {
            Ok(free) => answer_to(subject.free_name(free.name).await),
            Err(why) => refuse(StatusCode::BAD_REQUEST, &why),
        },
        ("GET", "/v1/services") => json(StatusCode::OK, &subject.services()),
        ("GET", "/v1/status") => json(StatusCode::OK, &subject.status().await),
        ("POST", "/v1/upgrade") => match read::<admin::Upgrade>(if body.is_empty() { b"{}" } else { &body }) {
            // Whoever can make a program send requests to loopback must not be able to have another one run by that.
            Ok(upgrade) if upgrade.binary.is_some() && !matches!(caller, Caller::Unix { .. }) => refuse(
                StatusCode::FORBIDDEN,
                "a program can be named over admin.sock in the state directory only (--admin DIR/admin.sock)",
            ),
            Ok(upgrade) => answer_to(subject.upgrade(upgrade).await),
            Err(why) => refuse(StatusCode::BAD_REQUEST, &why),
        },
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
            "/livez" | "/readyz" | "/metrics" | "/v1/members" | "/v1/services" | "/v1/status" | "/v1/documents"
            | "/v1/ping" | "/v1/forget" | "/v1/names" | "/v1/names/free" | "/v1/upgrade" | "/v1/drain" | "/v1/leave"
            | "/v1/reload",
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

fn has_query(uri: &http::Uri, pair: &str) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|given| given == pair))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|e| format!("the body is not as it should be: {e}"))
}

fn answer_to(outcome: Result<impl Serialize, String>) -> Response<Body> {
    match outcome {
        Ok(value) => json(StatusCode::OK, &value),
        Err(why) => refuse(StatusCode::UNPROCESSABLE_ENTITY, &why),
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
