//! What requests, responses and trailers have in common: lengths, hop-by-hop fields, and our own.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{self, Entry},
};
use starling_protocol::headers;

use super::{Malformed, Origin, bad};

/// One length, or several that agree (RFC 9110 §8.6); digits only.
pub(crate) fn content_length(fields: &HeaderMap) -> Result<Option<u64>, Malformed> {
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

/// A message that comes by HTTP/1.1 may be chunked; any other transfer coding would be lost on the way (RFC 9112 §6.1).
pub(super) fn check_coding(fields: &HeaderMap) -> Result<(), &'static str> {
    let mut codings = fields.get_all(header::TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(only), None) if only.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err("a transfer coding other than chunked"),
    }
}

/// Whether a message has any of the fields that need work, found in one look at each: most have none.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    /// Fields between neighbours.
    pub(super) hop_by_hop: bool,
    /// Our own, or those of other proxies that are as good.
    pub(super) own: bool,
}

impl Found {
    pub(super) fn among(fields: &HeaderMap) -> Self {
        let mut found = Self::default();
        for name in fields.keys() {
            let name = name.as_str();
            found.hop_by_hop |= HOP_BY_HOP.contains(&name);
            found.own |= is_own(name) || name == headers::XFCC;
        }
        found
    }
}

const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "proxy-connection",
    "keep-alive",
    "te",
    "transfer-encoding",
    "upgrade",
    "proxy-authenticate",
    "proxy-authorization",
    "http2-settings",
];

/// Whether a field is about connections, frames or routes a message, or is one of ours: not for anybody to change who only carries it.
pub fn is_of_hops(name: &HeaderName) -> bool {
    let text = name.as_str();
    let named = [header::HOST, header::CONTENT_LENGTH, header::TRAILER, header::VIA, header::EXPECT];
    HOP_BY_HOP.contains(&text) || is_own(text) || text == headers::XFCC || named.contains(name)
}

/// Some servers read `_` as `-`, so an alias is as good as the name.
fn is_own(name: &str) -> bool {
    let prefix = headers::PREFIX.as_bytes();
    let alike = |(byte, own): (&u8, &u8)| byte == own || (*byte == b'_' && *own == b'-');
    name.len() >= prefix.len() && name.as_bytes().iter().zip(prefix).all(alike)
}

pub(super) fn remove_hop_by_hop(fields: &mut HeaderMap) {
    // `TE: trailers` is a hop's own word; each hop of ours carries trailers, and gRPC servers insist on reading it. `Connection` has to
    // name it (RFC 9110 §10.1.4), and other codings may stand beside it.
    let codings = fields.get_all(header::TE).into_iter().filter_map(|te| te.to_str().ok()).flat_map(|te| te.split(','));
    let trailers = codings.into_iter().any(|coding| coding.trim().eq_ignore_ascii_case("trailers"));
    let named: Vec<HeaderName> = fields
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        // Gone in a moment anyhow, or the name of none.
        .filter(|name| !name.eq_ignore_ascii_case("keep-alive") && !name.eq_ignore_ascii_case("close"))
        .filter_map(|name| name.parse().ok())
        // What frames or routes the message is never the sender's to remove.
        .filter(|name: &HeaderName| *name != header::HOST && *name != header::CONTENT_LENGTH)
        .collect();
    for name in named {
        fields.remove(name);
    }
    for name in HOP_BY_HOP {
        fields.remove(name);
    }
    if trailers {
        fields.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

/// Several lengths that agree become one.
pub(super) fn collapse_content_length(fields: &mut HeaderMap) {
    let mut lengths = fields.get_all(header::CONTENT_LENGTH).iter();
    let is_one = lengths.next().is_none_or(|first| !first.as_bytes().contains(&b',')) && lengths.next().is_none();
    if is_one {
        return;
    }
    if let Entry::Occupied(mut entry) = fields.entry(header::CONTENT_LENGTH) {
        let first = entry.get().to_str().ok().and_then(|v| v.split(',').next()).map(str::trim);
        if let Some(value) = first.and_then(|v| HeaderValue::from_str(v).ok()) {
            entry.insert(value);
        }
    }
}

/// Removes our own fields, but for those that another node may set.
pub(super) fn remove_own_fields(fields: &mut HeaderMap, origin: Origin, from_mesh: &[&str]) {
    let own: Vec<HeaderName> = fields
        .keys()
        .filter(|name| is_own(name.as_str()))
        .filter(|name| origin == Origin::Outside || !from_mesh.contains(&name.as_str()))
        .cloned()
        .collect();
    for name in own {
        fields.remove(name);
    }
}

/// The value of a field that is a number, if it is there and is one.
pub fn number<T: std::str::FromStr>(fields: &HeaderMap, name: &str) -> Option<T> {
    fields.get(name)?.to_str().ok()?.parse().ok()
}
