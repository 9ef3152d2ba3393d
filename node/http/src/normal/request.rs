//! Requests in normal form.

use http::{
    HeaderMap, Method, StatusCode, Uri, Version, header, request,
    uri::{Authority, PathAndQuery},
};
use starling_protocol::headers;

use super::{
    Malformed, Origin, bad,
    fields::{Found, check_coding, collapse_content_length, content_length, remove_hop_by_hop, remove_own_fields},
};
use crate::tunnel::Protocol;

/// What a checked request says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The one authority: `host` or `host:port`, in lower case.
    pub authority: Authority,
    /// Length of the body, if the head promises one.
    pub length: Option<u64>,
    /// Which tunnel it asks for, if it asks for one.
    pub tunnel: Option<Tunnel>,
}

/// A tunnel that a request asks for (see [`crate::tunnel`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// Bytes to a service that speaks no HTTP.
    Bytes,
    /// UDP packets.
    Udp,
    /// Another protocol, which a service of HTTP changes to.
    Upgrade,
}

impl Checked {
    /// The authority's host, without its port.
    pub fn host(&self) -> &str {
        let authority = self.authority.as_str();
        match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
            // An IPv6 address, whose last part is no port.
            _ => authority,
        }
    }
}

/// Checks a request and brings it into normal form: path and query as the target, no Host, no hop-by-hop fields, at most
/// one Content-Length, none of our own fields from outside.
pub fn normalise_request(parts: &mut request::Parts, origin: Origin) -> Result<Checked, Malformed> {
    if parts.headers.len() > origin.max_fields() {
        return Err(Malformed {
            status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            reason: "too many header fields",
        });
    }
    let tunnel = tunnel(parts);
    // There is nothing but host and port (RFC 9110 §9.3.6).
    let is_authority_form = || parts.uri.port().is_some() && parts.uri.path_and_query().is_none();
    if tunnel == Some(Tunnel::Bytes) && !is_authority_form() {
        return Err(bad("CONNECT takes HOST:PORT"));
    }
    if parts.extensions.get::<Protocol>().is_some_and(Protocol::is_http) {
        let reason = "no tunnel is opened for HTTP within HTTP";
        return Err(Malformed { status: StatusCode::NOT_IMPLEMENTED, reason });
    }
    // `GET HOST` over HTTP/1.1, and no `:path` over HTTP/2, which would be read as `/`.
    if tunnel != Some(Tunnel::Bytes) && parts.uri.path().is_empty() {
        return Err(Malformed::bad_target());
    }
    let authority = take_authority(parts)?;
    let target = match (parts.uri.path_and_query(), &parts.method) {
        (Some(target), method) if target.path() == "*" && *method == Method::OPTIONS => target.clone(),
        (Some(target), _) if target.path().starts_with('/') => rooted(target)?,
        (None, _) => PathAndQuery::from_static("/"),
        _ => return Err(bad("the request target is not a path")),
    };
    let found = Found::among(&parts.headers);
    let length = content_length(&parts.headers)?;
    if tunnel.is_some() && (length.is_some() || parts.headers.contains_key(header::TRANSFER_ENCODING)) {
        return Err(bad("a tunnel is asked for with a body"));
    }
    if found.hop_by_hop {
        check_connection_fields(&parts.headers, parts.version)?;
        check_coding(&parts.headers).map_err(|reason| Malformed { status: StatusCode::NOT_IMPLEMENTED, reason })?;
        if length.is_some() && parts.headers.contains_key(header::TRANSFER_ENCODING) {
            return Err(bad("both Content-Length and Transfer-Encoding"));
        }
    }
    // Every hop answers `Expect: 100-continue` itself, so it ends here; another expectation nobody can meet.
    if let Some(expect) = parts.headers.remove(header::EXPECT)
        && !expect.as_bytes().eq_ignore_ascii_case(b"100-continue")
    {
        return Err(Malformed { status: StatusCode::EXPECTATION_FAILED, reason: "unknown expectation" });
    }
    if found.hop_by_hop {
        remove_hop_by_hop(&mut parts.headers);
    }
    collapse_content_length(&mut parts.headers);
    let believed: &[&str] = match origin {
        Origin::Outside => &[],
        Origin::Mesh => &[headers::DEADLINE, headers::ATTEMPT],
        Origin::Edge => &[headers::DEADLINE, headers::ATTEMPT, headers::CONSUMER, headers::HOST],
    };
    if found.own {
        remove_own_fields(&mut parts.headers, origin, believed);
        parts.headers.remove(headers::XFCC);
    }
    parts.uri = Uri::from(target);
    Ok(Checked { authority, length, tunnel })
}

/// Which tunnel a request asks for, if it asks for one.
pub fn tunnel(parts: &request::Parts) -> Option<Tunnel> {
    (parts.method == Method::CONNECT).then(|| match parts.extensions.get::<Protocol>() {
        None => Tunnel::Bytes,
        Some(Protocol(name)) if name == Protocol::UDP => Tunnel::Udp,
        Some(_) => Tunnel::Upgrade,
    })
}

/// `https://host?x` has the path `/`, which the parser tells but does not write.
fn rooted(target: &PathAndQuery) -> Result<PathAndQuery, Malformed> {
    match target.as_str() {
        "/" => Ok(PathAndQuery::from_static("/")),
        text if text.starts_with('/') => Ok(target.clone()),
        text => PathAndQuery::try_from(format!("/{text}")).map_err(|_| Malformed::bad_target()),
    }
}

fn take_authority(parts: &mut request::Parts) -> Result<Authority, Malformed> {
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
    // HTTP/1.0 knows no Host; what asks so is most likely a health check.
    let nobody = || (parts.version == Version::HTTP_10).then(|| Authority::from_static("localhost"));
    let authority = target.or(host).or_else(nobody).ok_or_else(|| bad("no authority"))?;
    if authority.as_str().contains('@') {
        return Err(bad("user information in the authority"));
    }
    if authority.host().is_empty() {
        return Err(bad("empty host"));
    }
    parts.headers.remove(header::HOST);
    if authority.as_str().bytes().any(|byte| byte.is_ascii_uppercase()) {
        return authority.as_str().to_ascii_lowercase().parse().map_err(|_| bad("Host is not a host name"));
    }
    Ok(authority)
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
