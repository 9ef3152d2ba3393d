//! Responses in normal form.

use http::{HeaderMap, Method, StatusCode, header, response};
use starling_protocol::headers;

use super::{
    Malformed, Origin,
    fields::{Found, check_coding, collapse_content_length, content_length, remove_hop_by_hop, remove_own_fields},
};
use crate::tunnel::is_open;

/// Leaves of an interim response's fields what may go on.
pub(crate) fn clean_interim(fields: &mut HeaderMap, origin: Origin) {
    remove_hop_by_hop(fields);
    remove_own_fields(fields, origin, &[]);
    for name in [header::TE, header::CONTENT_LENGTH, header::ALT_SVC] {
        fields.remove(name);
    }
}

/// Checks a response and brings it into normal form. `method` is the request's: an answer to HEAD has no body whatever
/// length it tells. Returns the length to hold the body to.
pub fn normalise_response(
    parts: &mut response::Parts,
    method: &Method,
    origin: Origin,
) -> Result<Option<u64>, Malformed> {
    if parts.headers.len() > origin.max_fields() {
        return Err(Malformed { status: StatusCode::BAD_GATEWAY, reason: "too many header fields in the response" });
    }
    let bad = |reason| Malformed { status: StatusCode::BAD_GATEWAY, reason };
    let found = Found::among(&parts.headers);
    if found.hop_by_hop {
        check_coding(&parts.headers).map_err(bad)?;
    }
    if parts.status.is_informational() {
        return Err(bad("an interim answer in place of the final one"));
    }
    let bad_gateway = |m: Malformed| Malformed { status: StatusCode::BAD_GATEWAY, ..m };
    let length = content_length(&parts.headers).map_err(bad_gateway)?;
    if found.hop_by_hop {
        remove_hop_by_hop(&mut parts.headers);
        parts.headers.remove(header::TE);
    }
    collapse_content_length(&mut parts.headers);
    if found.own {
        remove_own_fields(&mut parts.headers, origin, &[headers::LOAD, headers::SENT, headers::NOT_SWITCHED]);
    }
    if is_open(method, parts) {
        // What comes out of a tunnel has no length, whatever is told (RFC 9110 §9.3.6).
        parts.headers.remove(header::CONTENT_LENGTH);
        return Ok(None);
    }
    let bodiless =
        *method == Method::HEAD || parts.status == StatusCode::NO_CONTENT || parts.status == StatusCode::NOT_MODIFIED;
    if parts.status == StatusCode::NO_CONTENT {
        // It must not have one (RFC 9110 §8.6), and clients of HTTP/2 insist.
        parts.headers.remove(header::CONTENT_LENGTH);
    }
    Ok(if bodiless { None } else { length })
}
