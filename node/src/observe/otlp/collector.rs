//! The collector: where batches are posted, again and again until it takes them or says that it never will.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header, uri::Authority};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use rand::RngExt;
use tokio_util::sync::CancellationToken;

use crate::web::{self, RootsError, Web, WebError};

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
    /// The URL as it was given.
    server: Uri,
    authority: Authority,
    /// Without a slash at its end.
    base: String,
}

impl std::str::FromStr for Address {
    type Err = &'static str;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "not a URL like \"http://127.0.0.1:4318\"";
        let uri: Uri = url.parse().map_err(|_| EXPECTED)?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(EXPECTED);
        }
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
        Ok(Self { server: uri, authority, base })
    }
}

impl Address {
    fn is_https(&self) -> bool {
        self.server.scheme_str() == Some("https")
    }
}

/// Why there can be no export.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CollectorError {
    /// The certificates to trust.
    #[error("telemetry.ca: {0}")]
    Ca(#[from] RootsError),
    /// The name in the URL.
    #[error("telemetry.otlp: {0}")]
    Name(#[from] WebError),
}

/// Takes one kind of thing.
pub(super) struct Collector {
    what: &'static str,
    address: Address,
    web: Web,
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
        let web = match address.is_https() {
            true => {
                web::server_name(&address.authority)?;
                Web::trusting(ca.as_deref())?
            }
            false => Web::plain(),
        };
        Ok(Self { what, address, web, headers, connection: None, failing: false, ending })
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
            None => self.web.connect(&self.address.server).await.map_err(|e| failed(e.to_string()))?,
        };
        if connection.ready().await.is_err() {
            connection = self.web.connect(&self.address.server).await.map_err(|e| failed(e.to_string()))?;
        }
        let mut request = Request::post(format!("{}/v1/{}", self.address.base, self.what))
            .header(header::HOST, self.address.authority.as_str())
            .header(header::CONTENT_TYPE, "application/x-protobuf")
            .header(header::USER_AGENT, web::USER_AGENT)
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
                let after = head.headers.get(header::RETRY_AFTER).and_then(web::retry_after);
                Err(Failure { why: head.status.to_string(), again: Some(after) })
            }
            status => Err(Failure { why: status.to_string(), again: None }),
        }
    }
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
        assert_eq!((address.is_https(), address.base.as_str()), (false, ""));
        let address: Address = "https://otlp.example.com/some/where/".parse().unwrap();
        assert_eq!((address.is_https(), address.base.as_str()), (true, "/some/where"));
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
}
