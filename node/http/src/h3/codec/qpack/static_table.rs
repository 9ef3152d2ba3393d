//! The static table (RFC 9204 Appendix A).

use std::sync::LazyLock;

/// Names and values, by index.
pub(super) const ENTRIES: [(&str, &str); 99] = [
    (":authority", ""),
    (":path", "/"),
    ("age", "0"),
    ("content-disposition", ""),
    ("content-length", "0"),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("referer", ""),
    ("set-cookie", ""),
    (":method", "CONNECT"),
    (":method", "DELETE"),
    (":method", "GET"),
    (":method", "HEAD"),
    (":method", "OPTIONS"),
    (":method", "POST"),
    (":method", "PUT"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "103"),
    (":status", "200"),
    (":status", "304"),
    (":status", "404"),
    (":status", "503"),
    ("accept", "*/*"),
    ("accept", "application/dns-message"),
    ("accept-encoding", "gzip, deflate, br"),
    ("accept-ranges", "bytes"),
    ("access-control-allow-headers", "cache-control"),
    ("access-control-allow-headers", "content-type"),
    ("access-control-allow-origin", "*"),
    ("cache-control", "max-age=0"),
    ("cache-control", "max-age=2592000"),
    ("cache-control", "max-age=604800"),
    ("cache-control", "no-cache"),
    ("cache-control", "no-store"),
    ("cache-control", "public, max-age=31536000"),
    ("content-encoding", "br"),
    ("content-encoding", "gzip"),
    ("content-type", "application/dns-message"),
    ("content-type", "application/javascript"),
    ("content-type", "application/json"),
    ("content-type", "application/x-www-form-urlencoded"),
    ("content-type", "image/gif"),
    ("content-type", "image/jpeg"),
    ("content-type", "image/png"),
    ("content-type", "text/css"),
    ("content-type", "text/html; charset=utf-8"),
    ("content-type", "text/plain"),
    ("content-type", "text/plain;charset=utf-8"),
    ("range", "bytes=0-"),
    ("strict-transport-security", "max-age=31536000"),
    ("strict-transport-security", "max-age=31536000; includesubdomains"),
    ("strict-transport-security", "max-age=31536000; includesubdomains; preload"),
    ("vary", "accept-encoding"),
    ("vary", "origin"),
    ("x-content-type-options", "nosniff"),
    ("x-xss-protection", "1; mode=block"),
    (":status", "100"),
    (":status", "204"),
    (":status", "206"),
    (":status", "302"),
    (":status", "400"),
    (":status", "403"),
    (":status", "421"),
    (":status", "425"),
    (":status", "500"),
    ("accept-language", ""),
    ("access-control-allow-credentials", "FALSE"),
    ("access-control-allow-credentials", "TRUE"),
    ("access-control-allow-headers", "*"),
    ("access-control-allow-methods", "get"),
    ("access-control-allow-methods", "get, post, options"),
    ("access-control-allow-methods", "options"),
    ("access-control-expose-headers", "content-length"),
    ("access-control-request-headers", "content-type"),
    ("access-control-request-method", "get"),
    ("access-control-request-method", "post"),
    ("alt-svc", "clear"),
    ("authorization", ""),
    ("content-security-policy", "script-src 'none'; object-src 'none'; base-uri 'none'"),
    ("early-data", "1"),
    ("expect-ct", ""),
    ("forwarded", ""),
    ("if-range", ""),
    ("origin", ""),
    ("purpose", "prefetch"),
    ("server", ""),
    ("timing-allow-origin", "*"),
    ("upgrade-insecure-requests", "1"),
    ("user-agent", ""),
    ("x-forwarded-for", ""),
    ("x-frame-options", "deny"),
    ("x-frame-options", "sameorigin"),
];

/// Where an entry is found, and whether its value fits, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Name and value.
    Both(u8),
    /// The name only.
    Name(u8),
}

/// Slots of the hash table: a power of two with room to spare for some fifty names.
const SLOTS: usize = 256;

/// For each slot the index of the first entry of a name, plus one; linear probing.
static BY_NAME: LazyLock<[u8; SLOTS]> = LazyLock::new(|| {
    let mut slots = [0; SLOTS];
    let mut previous = "";
    for (index, (name, _)) in ENTRIES.iter().enumerate() {
        // A name that stands in two places of the table is known by the first.
        if *name == previous || ENTRIES[..index].iter().any(|(known, _)| known == name) {
            continue;
        }
        previous = name;
        let mut slot = hash(name.as_bytes());
        while slots[slot] != 0 {
            slot = (slot + 1) % SLOTS;
        }
        slots[slot] = index as u8 + 1;
    }
    slots
});

fn hash(name: &[u8]) -> usize {
    let at = |i: usize| name.get(i).copied().unwrap_or_default() as usize;
    let middle = at(name.len() / 2);
    (name.len() * 31 + at(0) * 7 + middle * 13 + at(name.len().wrapping_sub(1)) * 3) % SLOTS
}

/// Looks a field up, the name in lower case.
pub(super) fn find(name: &[u8], value: &[u8]) -> Option<Found> {
    let mut slot = hash(name);
    let first = loop {
        let index = BY_NAME[slot].checked_sub(1)?;
        if ENTRIES[index as usize].0.as_bytes() == name {
            break index;
        }
        slot = (slot + 1) % SLOTS;
    };
    // The entries of one name follow each other, but for two names that come again far behind.
    let again = match first {
        24 => 63, // :status
        33 => 75, // access-control-allow-headers
        _ => ENTRIES.len() as u8,
    };
    let same = |index: &u8| ENTRIES.get(*index as usize).is_some_and(|(known, _)| known.as_bytes() == name);
    let all = (first..).take_while(same).chain((again..).take_while(same));
    let exact = { all }.find(|index| ENTRIES[*index as usize].1.as_bytes() == value);
    Some(exact.map_or(Found::Name(first), Found::Both))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_found() {
        for (name, value) in ENTRIES {
            let Some(Found::Both(index)) = find(name.as_bytes(), value.as_bytes()) else {
                panic!("{name}: {value} is not found");
            };
            assert_eq!(ENTRIES[index as usize], (name, value));
        }
        assert_eq!(find(b":method", b"GET"), Some(Found::Both(17)));
        assert_eq!(find(b":method", b"PATCH"), Some(Found::Name(15)));
        assert_eq!(find(b":status", b"200"), Some(Found::Both(25)));
        assert_eq!(find(b"x-mine", b""), None);
        assert_eq!(find(b"", b""), None);
    }
}
