//! Trailers in normal form.

use http::{HeaderMap, header};

use super::{
    Origin,
    fields::{remove_hop_by_hop, remove_own_fields},
};

/// Trailers must not carry framing, routing or our own fields (RFC 9110 §6.5.1).
pub(crate) fn clean_trailers(trailers: &mut HeaderMap) {
    remove_hop_by_hop(trailers);
    remove_own_fields(trailers, Origin::Outside, &[]);
    for name in [header::TE, header::CONTENT_LENGTH, header::HOST, header::TRANSFER_ENCODING, header::AUTHORIZATION] {
        trailers.remove(name);
    }
    // Of whom a request is, only its head says.
    let about_client = |name: &str| name.starts_with("x-forwarded-") || ABOUT_CLIENT.contains(&name);
    let found: Vec<_> = trailers.keys().filter(|name| about_client(name.as_str())).cloned().collect();
    found.iter().for_each(|name| drop(trailers.remove(name)));
}

const ABOUT_CLIENT: [&str; 4] = ["forwarded", "x-real-ip", "client-cert", "client-cert-chain"];
