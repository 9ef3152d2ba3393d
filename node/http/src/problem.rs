//! Errors that a proxy makes itself: problem+json (RFC 9457) with Proxy-Status (RFC 9209), or a gRPC status.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, response};
use sfv::{BareItem, Item, List, ListEntry, Parameters};
use starling_protocol::Name;

use crate::Body;

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Proxy error types of RFC 9209 §2.3 that we use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyError {
    /// No such service or route.
    DestinationNotFound,
    /// Nobody can answer now.
    DestinationUnavailable,
    /// The service does not accept connections.
    ConnectionRefused,
    /// The service broke off.
    ConnectionTerminated,
    /// No answer in time.
    HttpResponseTimeout,
    /// Not allowed, or not well-formed.
    HttpRequestDenied,
    /// Not well-formed.
    HttpRequestError,
    /// The service's answer makes no sense.
    HttpProtocolError,
    /// The service's answer is larger than it may be.
    HttpResponseBodySize,
    /// The service does not change to the protocol that was asked for.
    HttpUpgradeFailed,
    /// The call goes round in circles.
    ProxyLoopDetected,
    /// Our own fault.
    ProxyInternalError,
}

impl ProxyError {
    /// The registered token.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DestinationNotFound => "destination_not_found",
            Self::DestinationUnavailable => "destination_unavailable",
            Self::ConnectionRefused => "connection_refused",
            Self::ConnectionTerminated => "connection_terminated",
            Self::HttpResponseTimeout => "http_response_timeout",
            Self::HttpRequestDenied => "http_request_denied",
            Self::HttpRequestError => "http_request_error",
            Self::HttpProtocolError => "http_protocol_error",
            Self::HttpResponseBodySize => "http_response_body_size",
            Self::HttpUpgradeFailed => "http_upgrade_failed",
            Self::ProxyLoopDetected => "proxy_loop_detected",
            Self::ProxyInternalError => "proxy_internal_error",
        }
    }
}

/// An answer that says what went wrong. Built by whoever finds the fault, rendered once, at the door.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Status of the answer.
    pub status: StatusCode,
    /// For Proxy-Status; `None` when the fault is the caller's relation to us, such as a missing key.
    pub error: Option<ProxyError>,
    /// For people: what is wrong, in a sentence, with nothing that an outsider must not know.
    pub detail: String,
    /// Last part of the problem type; `about:blank` if there is none.
    pub kind: Option<&'static str>,
    /// More fields of the answer.
    pub headers: HeaderMap,
    /// More members of the document (RFC 9457 §3.2).
    pub members: Option<Box<serde_json::Map<String, serde_json::Value>>>,
}

impl Problem {
    /// A fault on the way to the service.
    pub fn proxy(status: StatusCode, error: ProxyError, detail: impl Into<String>) -> Self {
        Self { status, error: Some(error), detail: detail.into(), kind: None, headers: HeaderMap::new(), members: None }
    }

    /// A refusal by policy.
    pub fn policy(status: StatusCode, kind: &'static str, detail: impl Into<String>) -> Self {
        Self { status, error: None, detail: detail.into(), kind: Some(kind), headers: HeaderMap::new(), members: None }
    }

    /// With one more member of its document.
    pub fn with_member(mut self, name: &'static str, value: impl Into<serde_json::Value>) -> Self {
        self.members.get_or_insert_default().insert(name.into(), value.into());
        self
    }

    /// With one more field.
    pub fn with_header(mut self, name: header::HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// With Retry-After, rounded up to whole seconds (RFC 9110 §10.2.3).
    pub fn retry_after(self, after: Duration) -> Self {
        self.with_header(header::RETRY_AFTER, HeaderValue::from(after.as_secs_f64().ceil().max(1.0) as u64))
    }

    /// The answer. `proxy` names us in Proxy-Status; `grpc` renders for a gRPC caller: status 200, headers only.
    pub fn into_response(self, proxy: &str, grpc: bool) -> Response<Body> {
        let mut response = if grpc { self.grpc() } else { self.json() };
        if let Some(status) = self.error.and_then(|error| proxy_status(proxy, error, &self.detail)) {
            response.headers_mut().insert(PROXY_STATUS, status);
        }
        response.headers_mut().extend(self.headers);
        response
    }

    fn json(&self) -> Response<Body> {
        let reason = self.status.canonical_reason().unwrap_or("Error");
        let kind = self.kind.map_or("about:blank".into(), |kind| format!("urn:starling:problem:{kind}"));
        let mut document = serde_json::json!({
            "type": kind,
            "title": reason,
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        for (name, value) in self.members.iter().flat_map(|members| members.iter()) {
            document[name] = value.clone();
        }
        let body = document.to_string();
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        *response.body_mut() = Body::full(body);
        response
    }

    /// What another proxy has answered in place of a service: its status, and what it says in Proxy-Status.
    pub fn told_by_proxy(answer: &response::Parts) -> Self {
        let told = answer.headers.get(PROXY_STATUS);
        let detail = told.and_then(detail_of).or_else(|| Some(answer.status.canonical_reason()?.to_lowercase()));
        let mut headers = HeaderMap::new();
        for name in [header::RETRY_AFTER, PROXY_STATUS] {
            headers.extend(answer.headers.get(&name).map(|value| (name, value.clone())));
        }
        Self {
            status: answer.status,
            error: None,
            detail: detail.unwrap_or_default(),
            kind: None,
            headers,
            members: None,
        }
    }

    /// Trailers-only answer of the gRPC protocol: the status in the head, and no body.
    fn grpc(&self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(grpc_status(self.status)));
        let message: String = self.detail.chars().filter(|c| matches!(c, ' '..='~') && *c != '%').collect();
        if let Ok(message) = HeaderValue::from_str(&message) {
            headers.insert("grpc-message", message);
        }
        response
    }
}

/// Whether a message is of gRPC, by its content type. One of gRPC-Web is not: it has no trailers.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.and_then(|kind| kind.strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest, [] | [b'+' | b';' | b' ', ..]))
}

/// How long a gRPC caller waits for the end of its call; `None` if it does not say, or not as its protocol has it.
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// How a proxy calls itself in Via and Proxy-Status.
pub fn pseudonym(node: &Name) -> String {
    format!("starling-{node}")
}

/// gRPC's own mapping from HTTP statuses, with the finer codes where we know more.
fn grpc_status(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 | 431 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        413 | 429 => 8,
        408 | 504 => 4,
        502 | 503 => 14,
        _ => 2,
    }
}

fn proxy_status(proxy: &str, error: ProxyError, detail: &str) -> Option<HeaderValue> {
    let mut params = Parameters::new();
    params.insert(sfv::key_ref("error").to_owned(), BareItem::Token(sfv::token_ref(error.as_str()).to_owned()));
    let ascii: String = detail.chars().filter(|c| matches!(c, ' '..='~')).collect();
    params.insert(sfv::key_ref("details").to_owned(), BareItem::String(sfv::String::from_string(ascii).ok()?));
    let name = sfv::Token::from_string(proxy.to_string()).ok()?;
    let list: List = vec![ListEntry::Item(Item { bare_item: BareItem::Token(name), params })];
    use sfv::FieldType;
    HeaderValue::from_str(&list.serialize()?).ok()
}

/// The details of the proxy that is nearest to the service, the first of the list (RFC 9209 §2).
fn detail_of(told: &HeaderValue) -> Option<String> {
    let list: List = sfv::Parser::new(told.as_bytes()).parse().ok()?;
    let ListEntry::Item(first) = list.into_iter().next()? else { return None };
    match first.params.get("details")? {
        BareItem::String(detail) => Some(detail.as_str().to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_says_where_and_why() {
        let problem = Problem::proxy(StatusCode::NOT_FOUND, ProxyError::DestinationNotFound, "no service \"x\"");
        let response = problem.clone().into_response("starling-a", false);
        assert_eq!(response.status(), 404);
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        assert_eq!(
            response.headers()["proxy-status"],
            r#"starling-a;error=destination_not_found;details="no service \"x\"""#
        );
        let (parts, _) = problem.clone().into_response("starling-a", false).into_parts();
        let told = Problem::told_by_proxy(&parts).into_response("starling-b", true);
        assert_eq!(told.headers()["grpc-status"], HeaderValue::from(12));
        assert_eq!(told.headers()["grpc-message"], "no service \"x\"");
        assert_eq!(told.headers()["proxy-status"], parts.headers["proxy-status"], "who it was is not lost");
        let grpc = problem.into_response("starling-a", true);
        assert_eq!((grpc.status().as_u16(), &grpc.headers()["grpc-status"]), (200, &HeaderValue::from(12)));
    }
}
