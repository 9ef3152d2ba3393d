//! The one normaliser: turns every request and response, whatever protocol it came by, into one checked form.
//!
//! Pure, so that it can be tested row by row. What it refuses is never forwarded; what it lets through means the same on
//! HTTP/1.1, 2 and 3 (RFC 9110 §7.6, RFC 9113 §8.2.2, RFC 9114 §4.2).

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
    header::{self, Entry},
    request, response,
    uri::{Authority, PathAndQuery},
};
use starling_protocol::headers;

/// Most fields in a head.
pub const MAX_FIELDS: usize = 100;

/// How often one call may pass through the same node before it is a loop.
pub const MAX_VISITS: usize = 4;

/// Where a message comes from, which decides which of our own fields are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A local application or the internet: nothing of ours is believed.
    Outside,
    /// Another node, authenticated: its deadline, attempt and load are.
    Mesh,
    /// An edge, by its certificate: who the consumer is, too.
    Edge,
}

/// Why a message is refused. `status` is what the sender gets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Malformed {
    /// 400, 405, 414, 417, 431 or 501.
    pub status: StatusCode,
    /// What is wrong.
    pub reason: &'static str,
}

impl Malformed {
    /// A target that is not a path.
    pub const fn bad_target() -> Self {
        bad("the request target is not a path")
    }
}

impl From<Malformed> for crate::Problem {
    fn from(malformed: Malformed) -> Self {
        Self::proxy(malformed.status, crate::ProxyError::HttpRequestError, malformed.reason)
    }
}

const fn bad(reason: &'static str) -> Malformed {
    Malformed { status: StatusCode::BAD_REQUEST, reason }
}

/// What a checked request says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The one authority: `host` or `host:port`, in lower case.
    pub authority: String,
    /// Length of the body, if the head promises one.
    pub length: Option<u64>,
}

/// Checks a request and brings it into normal form: path and query as the target, no Host, no hop-by-hop fields, at most
/// one Content-Length, none of our own fields from outside.
pub fn normalise_request(parts: &mut request::Parts, origin: Origin) -> Result<Checked, Malformed> {
    if parts.headers.len() > MAX_FIELDS {
        return Err(Malformed {
            status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            reason: "too many header fields",
        });
    }
    if parts.method == Method::CONNECT {
        let reason = "CONNECT is not supported by this version";
        return Err(Malformed { status: StatusCode::NOT_IMPLEMENTED, reason });
    }
    let authority = take_authority(parts)?;
    let target = match (parts.uri.path_and_query(), &parts.method) {
        (Some(target), method) if target.path() == "*" && *method == Method::OPTIONS => target.clone(),
        (Some(target), _) if target.path().starts_with('/') => target.clone(),
        (None, _) => PathAndQuery::from_static("/"),
        _ => return Err(bad("the request target is not a path")),
    };
    check_connection_fields(&parts.headers, parts.version)?;
    let length = content_length(&parts.headers)?;
    if length.is_some() && parts.headers.contains_key(header::TRANSFER_ENCODING) {
        return Err(bad("both Content-Length and Transfer-Encoding"));
    }
    // Every hop answers `Expect: 100-continue` itself, so it ends here; another expectation nobody can meet.
    if let Some(expect) = parts.headers.remove(header::EXPECT)
        && !expect.as_bytes().eq_ignore_ascii_case(b"100-continue")
    {
        return Err(Malformed { status: StatusCode::EXPECTATION_FAILED, reason: "unknown expectation" });
    }
    remove_hop_by_hop(&mut parts.headers);
    let believed: &[&str] = match origin {
        Origin::Outside => &[],
        Origin::Mesh => &[headers::DEADLINE, headers::ATTEMPT],
        Origin::Edge => &[headers::DEADLINE, headers::ATTEMPT, headers::CONSUMER],
    };
    remove_own_fields(&mut parts.headers, origin, believed);
    parts.headers.remove(headers::XFCC);
    parts.uri = Uri::from(target);
    Ok(Checked { authority, length })
}

/// Checks a response and brings it into normal form. `method` is the request's: an answer to HEAD has no body whatever
/// length it tells. Returns the length to hold the body to.
pub fn normalise_response(
    parts: &mut response::Parts,
    method: &Method,
    origin: Origin,
) -> Result<Option<u64>, Malformed> {
    if parts.headers.len() > MAX_FIELDS {
        return Err(Malformed { status: StatusCode::BAD_GATEWAY, reason: "too many header fields in the response" });
    }
    let bad_gateway = |m: Malformed| Malformed { status: StatusCode::BAD_GATEWAY, ..m };
    let length = content_length(&parts.headers).map_err(bad_gateway)?;
    remove_hop_by_hop(&mut parts.headers);
    remove_own_fields(&mut parts.headers, origin, &[headers::LOAD, headers::SENT]);
    let bodiless = *method == Method::HEAD
        || parts.status == StatusCode::NO_CONTENT
        || parts.status == StatusCode::NOT_MODIFIED
        || parts.status.is_informational();
    Ok(if bodiless { None } else { length })
}

/// Trailers must not carry framing, routing or our own fields (RFC 9110 §6.5.1).
pub(crate) fn clean_trailers(trailers: &mut HeaderMap) {
    remove_hop_by_hop(trailers);
    remove_own_fields(trailers, Origin::Outside, &[]);
    for name in [header::CONTENT_LENGTH, header::HOST, header::TRANSFER_ENCODING, header::AUTHORIZATION] {
        trailers.remove(name);
    }
}

fn take_authority(parts: &mut request::Parts) -> Result<String, Malformed> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (_, Some(_)) => return Err(bad("more than one Host")),
        (Some(host), None) => {
            let text = host.to_str().map_err(|_| bad("Host is not text"))?;
            Some(text.parse::<Authority>().map_err(|_| bad("Host is not a host name"))?)
        }
        (None, None) if parts.version <= Version::HTTP_11 && parts.version != Version::HTTP_10 => {
            return Err(bad("no Host"));
        }
        (None, None) => None,
    };
    let target = parts.uri.authority().cloned();
    if let (Some(target), Some(host)) = (&target, &host)
        && !same_authority(target, host, parts.uri.scheme_str())
    {
        return Err(bad("Host and the request target name different authorities"));
    }
    let authority = target.or(host).ok_or_else(|| bad("no authority"))?;
    if authority.as_str().contains('@') {
        return Err(bad("user information in the authority"));
    }
    if authority.host().is_empty() {
        return Err(bad("empty host"));
    }
    parts.headers.remove(header::HOST);
    Ok(authority.as_str().to_ascii_lowercase())
}

fn same_authority(a: &Authority, b: &Authority, scheme: Option<&str>) -> bool {
    let default = if scheme == Some("https") { 443 } else { 80 };
    a.host().eq_ignore_ascii_case(b.host()) && a.port_u16().unwrap_or(default) == b.port_u16().unwrap_or(default)
}

/// HTTP/2 and 3 have no connection fields, and `TE` may only say `trailers`.
fn check_connection_fields(fields: &HeaderMap, version: Version) -> Result<(), Malformed> {
    if version < Version::HTTP_2 {
        return Ok(());
    }
    let forbidden = ["connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"];
    if forbidden.iter().any(|name| fields.contains_key(*name)) {
        return Err(bad("a connection-specific field"));
    }
    if fields.get_all(header::TE).iter().any(|te| !te.as_bytes().eq_ignore_ascii_case(b"trailers")) {
        return Err(bad("TE other than trailers"));
    }
    Ok(())
}

/// One length, or several that agree (RFC 9110 §8.6); digits only.
fn content_length(fields: &HeaderMap) -> Result<Option<u64>, Malformed> {
    let mut length = None;
    for value in fields.get_all(header::CONTENT_LENGTH) {
        let text = value.to_str().map_err(|_| bad("Content-Length is not a number"))?;
        for part in text.split(',').map(str::trim) {
            if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
                return Err(bad("Content-Length is not a number"));
            }
            let value: u64 = part.parse().map_err(|_| bad("Content-Length is too large"))?;
            if length.is_some_and(|known| known != value) {
                return Err(bad("Content-Lengths that differ"));
            }
            length = Some(value);
        }
    }
    Ok(length)
}

fn remove_hop_by_hop(fields: &mut HeaderMap) {
    let named: Vec<HeaderName> = fields
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // What frames or routes the message is never the sender's to remove.
        .filter(|name: &HeaderName| *name != header::HOST && *name != header::CONTENT_LENGTH)
        .collect();
    for name in named {
        fields.remove(name);
    }
    // `TE: trailers` is a hop's own word; each hop of ours carries trailers, and gRPC servers insist on reading it.
    let trailers = fields.get(header::TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in [
        "connection",
        "proxy-connection",
        "keep-alive",
        "te",
        "transfer-encoding",
        "upgrade",
        "proxy-authenticate",
        "proxy-authorization",
        "http2-settings",
    ] {
        fields.remove(name);
    }
    if trailers {
        fields.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    collapse_content_length(fields);
}

fn collapse_content_length(fields: &mut HeaderMap) {
    if let Entry::Occupied(mut entry) = fields.entry(header::CONTENT_LENGTH) {
        let first = entry.get().to_str().ok().and_then(|v| v.split(',').next()).map(str::trim);
        if let Some(value) = first.and_then(|v| HeaderValue::from_str(v).ok()) {
            entry.insert(value);
        }
    }
}

/// Removes our own fields, but for those that another node may set.
fn remove_own_fields(fields: &mut HeaderMap, origin: Origin, from_mesh: &[&str]) {
    let own: Vec<HeaderName> = fields
        .keys()
        // Some servers read `_` as `-`, so an alias is as good as the name.
        .filter(|name| name.as_str().replace('_', "-").starts_with(headers::PREFIX))
        .filter(|name| origin == Origin::Outside || !from_mesh.contains(&name.as_str()))
        .cloned()
        .collect();
    for name in own {
        fields.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use proptest::prelude::*;

    use super::*;

    fn request(version: Version, uri: &str, fields: &[(&str, &str)]) -> request::Parts {
        let mut builder = Request::builder().version(version).uri(uri);
        for (name, value) in fields {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    fn check(version: Version, uri: &str, fields: &[(&str, &str)]) -> Result<Checked, Malformed> {
        normalise_request(&mut request(version, uri, fields), Origin::Outside)
    }

    #[test]
    fn one_authority() {
        let h1 = |uri, fields: &[(&str, &str)]| check(Version::HTTP_11, uri, fields).map(|c| c.authority);
        assert_eq!(h1("/a", &[("host", "Orders.mesh")]).unwrap(), "orders.mesh");
        assert_eq!(h1("http://orders/a", &[("host", "orders")]).unwrap(), "orders");
        assert_eq!(h1("http://orders:80/a", &[("host", "orders")]).unwrap(), "orders:80");
        assert_eq!(h1("/a", &[]).unwrap_err().reason, "no Host");
        assert_eq!(h1("/a", &[("host", "a"), ("host", "a")]).unwrap_err().reason, "more than one Host");
        assert!(h1("http://a/", &[("host", "b")]).is_err());
        assert!(h1("/", &[("host", "user@a")]).is_err());
        assert!(h1("/", &[("host", "a b")]).is_err());
        for version in [Version::HTTP_2, Version::HTTP_3] {
            assert_eq!(check(version, "https://a:8443/", &[]).unwrap().authority, "a:8443");
            assert!(check(version, "https://a/", &[("host", "b")]).is_err());
            assert!(check(version, "/", &[]).is_err());
        }
    }

    #[test]
    fn connection_fields_go_or_are_refused() {
        let fields = [("host", "a"), ("connection", "x-hop, close"), ("x-hop", "1"), ("x-end", "2"), ("te", "gzip")];
        let mut parts = request(Version::HTTP_11, "/", &fields);
        normalise_request(&mut parts, Origin::Outside).unwrap();
        assert_eq!(parts.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
        for version in [Version::HTTP_2, Version::HTTP_3] {
            for (name, value) in [("connection", "close"), ("transfer-encoding", "chunked"), ("te", "gzip")] {
                assert!(check(version, "https://a/", &[(name, value)]).is_err(), "{name} on {version:?}");
            }
            assert!(check(version, "https://a/", &[("te", "trailers")]).is_ok());
        }
    }

    #[test]
    fn lengths_agree_or_are_refused() {
        let length = |fields: &[(&str, &str)]| {
            let fields = [&[("host", "a")], fields].concat();
            check(Version::HTTP_11, "/", &fields).map(|c| c.length)
        };
        assert_eq!(length(&[("content-length", "5")]).unwrap(), Some(5));
        assert_eq!(length(&[("content-length", "5, 5")]).unwrap(), Some(5));
        for bad in ["", "-1", "+5", "5,6", "0x5", "99999999999999999999999"] {
            assert!(length(&[("content-length", bad)]).is_err(), "{bad}");
        }
        assert!(length(&[("content-length", "5"), ("content-length", "6")]).is_err());
        assert!(length(&[("content-length", "5"), ("transfer-encoding", "chunked")]).is_err());
    }

    #[test]
    fn our_own_fields_are_not_believed_from_outside() {
        let own =
            ["starling-caller", "starling-deadline", "starling-consumer", "x-forwarded-client-cert", "starling_caller"];
        let mut fields = vec![("host", "a"), ("x-mine", "1")];
        fields.extend(own.iter().map(|name| (*name, "spoofed")));
        let mut parts = request(Version::HTTP_11, "/", &fields);
        normalise_request(&mut parts, Origin::Outside).unwrap();
        assert_eq!(parts.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-mine"]);

        let mut parts = request(Version::HTTP_11, "/", &fields);
        normalise_request(&mut parts, Origin::Mesh).unwrap();
        let mut kept: Vec<_> = parts.headers.keys().map(HeaderName::as_str).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["starling-deadline", "x-mine"]);
    }

    #[test]
    fn what_cannot_be_forwarded_is_refused() {
        let status = |method: Method, uri: &str, fields: &[(&str, &str)]| {
            let mut parts = request(Version::HTTP_11, uri, &[&[("host", "a")], fields].concat());
            parts.method = method;
            normalise_request(&mut parts, Origin::Outside).map_err(|m| m.status.as_u16())
        };
        assert_eq!(status(Method::CONNECT, "a:443", &[]), Err(501));
        assert_eq!(status(Method::GET, "/", &[("expect", "the-unexpected")]), Err(417));
        assert!(status(Method::OPTIONS, "*", &[]).is_ok());
        assert_eq!(status(Method::GET, "*", &[]), Err(400));
    }

    #[test]
    fn an_answer_to_head_promises_nothing() {
        let (mut parts, ()) = http::Response::builder().header("content-length", "9").body(()).unwrap().into_parts();
        assert_eq!(normalise_response(&mut parts, &Method::HEAD, Origin::Outside), Ok(None));
        assert_eq!(normalise_response(&mut parts, &Method::GET, Origin::Outside), Ok(Some(9)));
    }

    proptest! {
        /// Whatever comes in, what goes out has no hop-by-hop field, no Host, one length at most, and a path.
        #[test]
        fn the_normal_form_holds(
            version in proptest::sample::select(vec![Version::HTTP_11, Version::HTTP_2, Version::HTTP_3]),
            fields in proptest::collection::vec((
                proptest::sample::select(vec!["host", "connection", "te", "content-length", "transfer-encoding",
                    "starling-caller", "x-a", "upgrade", "keep-alive", "expect"]),
                "[ -~]{0,12}",
            ), 0..8),
            path in "(/[a-z*]{0,5}|\\*)",
        ) {
            let uri = if version == Version::HTTP_11 { path } else { format!("https://a{path}") };
            let mut builder = Request::builder().version(version).uri(uri);
            for (name, value) in &fields {
                builder = builder.header(*name, value);
            }
            let Ok(request) = builder.body(()) else { return Ok(()) };
            let mut parts = request.into_parts().0;
            if normalise_request(&mut parts, Origin::Outside).is_ok() {
                for gone in ["host", "connection", "transfer-encoding", "upgrade", "keep-alive", "starling-caller", "expect"] {
                    prop_assert!(!parts.headers.contains_key(gone), "{}", gone);
                }
                prop_assert!(parts.headers.get_all("content-length").iter().count() <= 1);
                prop_assert!(parts.uri.authority().is_none() && parts.uri.path_and_query().is_some());
            }
        }
    }
}
