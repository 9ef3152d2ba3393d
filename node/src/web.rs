//! Servers outside the mesh that a node asks of its own: a collector of telemetry, an authority for certificates, an issuer of
//! tokens. HTTP/1.1, over TLS where the URL says so.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri, header, uri::Authority};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::identity::crypto_provider;

/// What a node calls itself there.
pub const USER_AGENT: &str = concat!("starling/", env!("CARGO_PKG_VERSION"));

/// How long one address may take to answer.
const DIAL: Duration = Duration::from_secs(4);

/// Bytes both ways.
pub trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for S {}

/// Reaches servers outside the mesh. Cheap to clone.
#[derive(Clone)]
pub struct Web {
    /// `None` speaks `http` alone.
    tls: Option<TlsConnector>,
}

/// Why nobody is there who vouches for servers.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file of certificates to trust.
    #[error("{}: {why}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The system's.
    #[error("this system has no certificates to trust ({0}); install them, as ca-certificates does, or name a file")]
    System(String),
}

/// Why a server outside did not answer.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// The address.
    #[error("{0} is no URL of a server that can be asked")]
    Url(Uri),
    /// The name in it.
    #[error("{0} is not a name that a certificate can have")]
    Name(String),
    /// There is no way there.
    #[error("cannot connect to {0}: {1}")]
    Connect(Authority, #[source] io::Error),
    /// It is not who it should be, or does not speak TLS.
    #[error("no TLS with {0}: {1}")]
    Tls(Authority, #[source] io::Error),
    /// It broke off.
    #[error("{0} does not answer as HTTP says: {1}")]
    Http(Authority, #[source] hyper::Error),
    /// Its answer has no end.
    #[error("the answer of {0} breaks off, or is longer than {1} bytes")]
    Answer(Authority, usize),
    /// It takes too long.
    #[error("{0} did not answer within {1:?}")]
    Late(Authority, Duration),
}

impl Web {
    /// For `http` alone.
    pub fn plain() -> Self {
        Self { tls: None }
    }

    /// For `https`, too. `ca` is a file of certificates in PEM to trust in place of the system's.
    pub fn trusting(ca: Option<&Path>) -> Result<Self, RootsError> {
        let config = ClientConfig::builder_with_provider(crypto_provider())
            .with_safe_default_protocol_versions()
            .expect("the provider has TLS 1.2 and 1.3")
            .with_root_certificates(roots(ca)?)
            .with_no_client_auth();
        Ok(Self { tls: Some(TlsConnector::from(Arc::new(config))) })
    }

    /// A connection to a server of whatever protocol, over TLS if told; at port `usual` where it names none. Cancel safe.
    pub async fn stream(&self, to: &Authority, usual: u16, tls: bool) -> Result<Box<dyn Stream>, WebError> {
        let port = to.port_u16().unwrap_or(usual);
        let stream = dial(bare(to), port).await.map_err(|e| WebError::Connect(to.clone(), e))?;
        let _ = stream.set_nodelay(true);
        if !tls {
            return Ok(Box::new(stream));
        }
        let none = || io::Error::other("nobody is trusted");
        let connector = self.tls.as_ref().ok_or_else(|| WebError::Tls(to.clone(), none()))?;
        let stream = connector.connect(server_name(to)?, stream).await.map_err(|e| WebError::Tls(to.clone(), e))?;
        Ok(Box::new(stream))
    }

    /// A connection to the server of a URL. Cancel safe.
    pub async fn connect(&self, url: &Uri) -> Result<SendRequest<Full<Bytes>>, WebError> {
        let no_url = || WebError::Url(url.clone());
        let authority = url.authority().ok_or_else(no_url)?;
        let stream = match url.scheme_str() {
            Some("http") => self.stream(authority, 80, false).await?,
            Some("https") if self.tls.is_some() => self.stream(authority, 443, true).await?,
            _ => return Err(no_url()),
        };
        converse(authority, stream).await
    }

    /// Sends a request, whose URL is absolute, on a connection of its own, and reads the whole answer: so many bytes at most,
    /// in so long. Follows no redirect. Cancel safe, but that the server may have got the request.
    pub async fn fetch(
        &self,
        request: Request<Bytes>,
        max_bytes: usize,
        patience: Duration,
    ) -> Result<Response<Bytes>, WebError> {
        let url = request.uri().clone();
        let authority = url.authority().ok_or_else(|| WebError::Url(url.clone()))?.clone();
        let fetched = async {
            let mut connection = self.connect(&url).await?;
            let mut request = request.map(Full::new);
            *request.uri_mut() = url.path_and_query().map_or(Uri::from_static("/"), |path| path.clone().into());
            let host = HeaderValue::from_str(authority.as_str()).map_err(|_| WebError::Url(url.clone()))?;
            request.headers_mut().insert(header::HOST, host);
            request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
            let answer = connection.send_request(request).await.map_err(|e| WebError::Http(authority.clone(), e))?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, max_bytes).collect().await;
            let body = body.map_err(|_| WebError::Answer(authority.clone(), max_bytes))?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        tokio::time::timeout(patience, fetched).await.map_err(|_| WebError::Late(authority.clone(), patience))?
    }
}

impl std::fmt::Debug for Web {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Web").finish_non_exhaustive()
    }
}

/// Tries one address after the other, and none for long: a way may swallow packets where another one works.
async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    for addr in tokio::net::lookup_host((host, port)).await? {
        match tokio::time::timeout(DIAL, TcpStream::connect(addr)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failed = error,
            Err(_) => failed = io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {addr}")),
        }
    }
    Err(failed)
}

async fn converse<S>(authority: &Authority, stream: S) -> Result<SendRequest<Full<Bytes>>, WebError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) =
        handshake(TokioIo::new(stream)).await.map_err(|e| WebError::Http(authority.clone(), e))?;
    tokio::spawn(connection);
    Ok(sender)
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore, RootsError> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let failed = |why: String| RootsError::File { path: path.to_path_buf(), why };
            let pem = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
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
                return Err(RootsError::System(why));
            }
        }
    }
    Ok(roots)
}

/// The name that a server's certificate has to have.
pub(crate) fn server_name(authority: &Authority) -> Result<ServerName<'static>, WebError> {
    ServerName::try_from(bare(authority).to_string()).map_err(|_| WebError::Name(bare(authority).into()))
}

/// Its host, without the brackets of IPv6.
fn bare(authority: &Authority) -> &str {
    authority.host().trim_start_matches('[').trim_end_matches(']')
}

/// How long a server asks to be left alone: seconds, or a date (RFC 9110 §10.2.3).
pub fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_that_servers_ask_for() {
        let of = |text: &'static str| retry_after(&HeaderValue::from_static(text));
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert!(of("Fri, 31 Dec 2100 23:59:59 GMT").is_some_and(|wait| wait > Duration::from_secs(1)));
        assert_eq!(of("Fri, 31 Dec 1999 23:59:59 GMT"), None);
        assert_eq!(of("soon"), None);
    }

    #[tokio::test]
    async fn what_cannot_be_asked_is_said() {
        let ask = async |url: &str| {
            let request = Request::get(url).body(Bytes::new()).unwrap();
            Web::plain().fetch(request, 10, Duration::from_secs(30)).await.unwrap_err().to_string()
        };
        assert!(ask("https://a.example/").await.contains("no URL"));
        assert!(ask("/path").await.contains("no URL"));
        assert!(ask("http://127.0.0.1:1/").await.contains("cannot connect to 127.0.0.1:1"));
    }
}
