//! The collector: where batches are posted, again and again until it takes them or says that it never will.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header, uri::Authority};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rand::RngExt;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::identity::crypto_provider;

/// How long one try may take, from the dial to the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Tries for one batch; later ones wait meanwhile.
const MAX_TRIES: u32 = 5;
/// Pause after the first try that failed; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause between tries.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Longest pause that a collector may ask for.
const MAX_ASKED: Duration = Duration::from_secs(300);
/// An answer says little.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Where a collector is, and how to reach it.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) address: Address,
    /// Sent along with everything.
    pub(crate) headers: HeaderMap,
    /// Certificates in PEM to trust in place of the system's.
    pub(crate) ca: Option<PathBuf>,
}

/// The base URL of a collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    tls: bool,
    authority: Authority,
    /// Without a slash at its end.
    base: String,
}

impl std::str::FromStr for Address {
    type Err = &'static str;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "not a URL like \"http://127.0.0.1:4318\"";
        let uri: Uri = url.parse().map_err(|_| EXPECTED)?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(EXPECTED),
        };
        let authority = uri.authority().filter(|authority| !authority.host().is_empty()).ok_or(EXPECTED)?.clone();
        if authority.as_str().contains('@') {
            return Err("a URL with credentials in it; set them in telemetry.headers");
        }
        if uri.query().is_some() {
            return Err("a URL with a query, which a collector does not have");
        }
        let base = uri.path().trim_end_matches('/').to_string();
        if base.ends_with("/v1/traces") || base.ends_with("/v1/metrics") {
            return Err("leave out /v1/traces and /v1/metrics, which are added to it");
        }
        Ok(Self { tls, authority, base })
    }
}

/// Why there can be no export.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CollectorError {
    /// The file of certificates to trust.
    #[error("telemetry.ca: {}: {why}", .path.display())]
    Ca { path: PathBuf, why: String },
    /// The system's.
    #[error("this system has no certificates to trust ({0}); name some in telemetry.ca")]
    NoRoots(String),
    /// The name in the URL.
    #[error("telemetry.otlp: {0} is not a name that a certificate can have")]
    Name(String),
}

/// Takes one kind of thing.
pub(super) struct Collector {
    what: &'static str,
    address: Address,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    headers: HeaderMap,
    connection: Option<SendRequest<Full<Bytes>>>,
    /// Whether the last try failed: said once in the log, not for each.
    failing: bool,
    ending: CancellationToken,
}

/// A try that came to nothing.
struct Failure {
    why: String,
    /// Whether another may do better, and when, if the collector said so.
    again: Option<Option<Duration>>,
}

impl Collector {
    pub(super) fn new(
        settings: &Settings,
        what: &'static str,
        ending: CancellationToken,
    ) -> Result<Self, CollectorError> {
        let Settings { address, headers, ca } = settings.clone();
        let tls = match address.tls {
            true => Some((connector(ca)?, server_name(&address.authority)?)),
            false => None,
        };
        Ok(Self { what, address, tls, headers, connection: None, failing: false, ending })
    }

    /// Sends a message until it is taken, and gives the answer; `None` if it never was. Meant to end, it tries once.
    pub(super) async fn send(&mut self, message: Bytes) -> Option<Bytes> {
        let mut pause = FIRST_PAUSE;
        for tried in 1.. {
            let failure = match tokio::time::timeout(TIMEOUT, self.post(message.clone())).await {
                Ok(Ok(answer)) => {
                    if std::mem::take(&mut self.failing) {
                        tracing::info!(what = self.what, "the collector takes telemetry again");
                    }
                    return Some(answer);
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure { why: format!("no answer within {TIMEOUT:?}"), again: Some(None) },
            };
            self.connection = None;
            if !std::mem::replace(&mut self.failing, true) {
                let (why, at) = (&failure.why, &self.address.authority);
                tracing::warn!(what = self.what, %at, why, "the collector does not take telemetry");
            }
            let asked = failure.again?;
            if tried >= MAX_TRIES || self.ending.is_cancelled() {
                return None;
            }
            let asked = asked.unwrap_or(pause).min(MAX_ASKED);
            let wait = asked.mul_f64(rand::rng().random_range(1.0..1.3));
            pause = (pause * 2).min(MAX_PAUSE);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.ending.cancelled() => {}
            }
        }
        None
    }

    async fn post(&mut self, message: Bytes) -> Result<Bytes, Failure> {
        let failed = |why: String| Failure { why, again: Some(None) };
        let kept = self.connection.take().filter(|connection| !connection.is_closed());
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.dial().await.map_err(failed)?,
        };
        if connection.ready().await.is_err() {
            connection = self.dial().await.map_err(failed)?;
        }
        let mut request = Request::post(format!("{}/v1/{}", self.address.base, self.what))
            .header(header::HOST, self.address.authority.as_str())
            .header(header::CONTENT_TYPE, "application/x-protobuf")
            .header(header::USER_AGENT, concat!("starling/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(message))
            .map_err(|e| failed(e.to_string()))?;
        request.headers_mut().extend(self.headers.clone());
        let response = connection.send_request(request).await.map_err(|e| failed(e.to_string()))?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
        match head.status {
            status if status.is_success() => {
                self.connection = Some(connection);
                Ok(body.map(|body| body.to_bytes()).unwrap_or_default())
            }
            // Those that OTLP says to try again (OTLP 1.x, "Failures").
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                let after = head.headers.get(header::RETRY_AFTER).and_then(retry_after);
                Err(Failure { why: head.status.to_string(), again: Some(after) })
            }
            status => Err(Failure { why: status.to_string(), again: None }),
        }
    }

    async fn dial(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let authority = &self.address.authority;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = authority.port_u16().unwrap_or(if self.address.tls { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await.map_err(|e| e.to_string())?;
        let _ = stream.set_nodelay(true);
        match &self.tls {
            None => converse(stream).await,
            Some((connector, name)) => {
                converse(connector.connect(name.clone(), stream).await.map_err(|e| e.to_string())?).await
            }
        }
    }
}

async fn converse<S>(stream: S) -> Result<SendRequest<Full<Bytes>>, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Seconds, or a date (RFC 9110 §10.2.3).
fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).ok(),
    }
}

fn connector(ca: Option<PathBuf>) -> Result<TlsConnector, CollectorError> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let failed = |why: String| CollectorError::Ca { path: path.clone(), why };
            let pem = std::fs::read(&path).map_err(|e| failed(e.to_string()))?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|e| failed(format!("not PEM: {e}")))?;
                roots.add(certificate).map_err(|e| failed(e.to_string()))?;
            }
            if roots.is_empty() {
                return Err(failed("there is no certificate in it".into()));
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                let why = found.errors.first().map_or("none found".into(), ToString::to_string);
                return Err(CollectorError::NoRoots(why));
            }
        }
    }
    let config = ClientConfig::builder_with_provider(crypto_provider())
        .with_safe_default_protocol_versions()
        .expect("the provider has TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn server_name(authority: &Authority) -> Result<ServerName<'static>, CollectorError> {
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_string()).map_err(|_| CollectorError::Name(host.into()))
}

/// A field to be sent along with everything, as the file has it.
pub(crate) fn field(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), &'static str> {
    let name = name.parse().map_err(|_| "not the name of a field")?;
    let mut value = HeaderValue::from_str(value).map_err(|_| "not what a field can carry")?;
    value.set_sensitive(true);
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls() {
        let address: Address = "http://127.0.0.1:4318".parse().unwrap();
        assert_eq!((address.tls, address.base.as_str()), (false, ""));
        let address: Address = "https://otlp.example.com/some/where/".parse().unwrap();
        assert_eq!((address.tls, address.base.as_str()), (true, "/some/where"));
        for bad in [
            "",
            "127.0.0.1:4318",
            "grpc://127.0.0.1:4317",
            "http://",
            "http://a/v1/traces",
            "http://me:secret@a",
            "http://a/?b=c",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pauses_that_collectors_ask_for() {
        let of = |text: &'static str| retry_after(&HeaderValue::from_static(text));
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert!(of("Fri, 31 Dec 2100 23:59:59 GMT").is_some_and(|wait| wait > Duration::from_secs(1)));
        assert_eq!(of("Fri, 31 Dec 1999 23:59:59 GMT"), None);
        assert_eq!(of("soon"), None);
    }
}
