//! Client of a node's admin API, over TCP or its Unix socket.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use crate::Failure;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Asks once; `body` is JSON.
pub(crate) async fn ask<T: DeserializeOwned>(
    admin: &str,
    method: Method,
    path: &str,
    body: Option<serde_json::Value>,
) -> Result<T, Failure> {
    ask_for(TIMEOUT, admin, method, path, body).await
}

/// The same, of what may take longer.
pub(crate) async fn ask_for<T: DeserializeOwned>(
    limit: Duration,
    admin: &str,
    method: Method,
    path: &str,
    body: Option<serde_json::Value>,
) -> Result<T, Failure> {
    let bytes = body.map(|b| Bytes::from(b.to_string())).unwrap_or_default();
    let asked = async {
        // As `node --admin` takes it, it is no path.
        let bare = admin.parse::<SocketAddr>().is_ok().then_some(admin);
        match admin.strip_prefix("http://").or(bare) {
            Some(host) => {
                let host = host.trim_end_matches('/');
                let stream = TcpStream::connect(host).await.map_err(|e| unreachable(admin, &e))?;
                exchange(stream, host, admin, method, path, bytes).await
            }
            None if admin.starts_with("https://") => {
                Err(Failure::failed("the admin API speaks plain HTTP on loopback; use http:// or the admin.sock"))
            }
            None => {
                let stream = UnixStream::connect(admin).await.map_err(|e| unreachable(admin, &e))?;
                exchange(stream, "localhost", admin, method, path, bytes).await
            }
        }
    };
    let (status, bytes) = tokio::time::timeout(limit, asked)
        .await
        .map_err(|_| Failure::unreachable(format!("the node at {admin} does not answer")))??;
    if !status.is_success() {
        let text = serde_json::from_slice::<starling_protocol::admin::Error>(&bytes)
            .map_or_else(|_| String::from_utf8_lossy(&bytes).trim().to_string(), |e| e.error);
        return Err(Failure::failed(format!("{path}: {text} ({status})")));
    }
    serde_json::from_slice(&bytes).map_err(|e| Failure::failed(format!("{path}: unexpected answer: {e}")))
}

fn unreachable(admin: &str, error: &std::io::Error) -> Failure {
    Failure::unreachable(format!(
        "no node answers at {admin} ({error}); is it running? name another with --admin or STARLING_ADMIN"
    ))
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    host: &str,
    admin: &str,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Failure> {
    let lost = |e: hyper::Error| Failure::unreachable(format!("the node at {admin} broke off: {e}"));
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, host)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))?;
    let response = sender.send_request(request).await.map_err(lost)?;
    let status = response.status();
    let bytes = response.into_body().collect().await.map_err(lost)?.to_bytes();
    Ok((status, bytes))
}
