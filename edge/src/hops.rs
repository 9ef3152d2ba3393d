//! Who the client is, where proxies stand in front of the edge: what these say counts if they are trusted, and nobody else's word.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, header};

use crate::config::{HopsField, Network};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id of a request that is taken from a proxy, in bytes.
const MAX_ID_BYTES: usize = 128;
/// Most proxies one behind the other.
const MAX_HOPS: usize = 32;

/// What trusted proxies say of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Hops {
    /// The client: the last address that is not a trusted proxy's.
    pub(crate) client: IpAddr,
    /// The id that the request has already.
    pub(crate) request_id: Option<String>,
}

impl Hops {
    /// Of a request that came over a connection from `peer`.
    pub(crate) fn of(peer: IpAddr, headers: &HeaderMap, trusted: &[Network], field: HopsField) -> Self {
        let peer = peer.to_canonical();
        let is_trusted = |address: &IpAddr| trusted.iter().any(|network| network.contains(*address));
        if !is_trusted(&peer) {
            return Self { client: peer, request_id: None };
        }
        // The nearest hop comes last. Where one is not an address, the one before it in time said something that nobody can check.
        let mut client = peer;
        for address in told(headers, field).into_iter().rev().take(MAX_HOPS) {
            let Some(address) = address else { break };
            client = address.to_canonical();
            if !is_trusted(&client) {
                break;
            }
        }
        let id = headers.get(X_REQUEST_ID).and_then(|id| id.to_str().ok());
        let is_id = |id: &&str| {
            (1..=MAX_ID_BYTES).contains(&id.len())
                && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~+/=:".contains(&b))
        };
        Self { client, request_id: id.filter(is_id).map(str::to_owned) }
    }
}

/// The addresses that requests have come from, the first hop first. One field alone counts: of the other one, a proxy may have passed
/// on what the client wrote.
fn told(headers: &HeaderMap, field: HopsField) -> Vec<Option<IpAddr>> {
    match field {
        HopsField::XForwardedFor => {
            let values = headers.get_all(X_FORWARDED_FOR).iter().map(|value| value.to_str().unwrap_or("?"));
            values.flat_map(|value| value.split(',')).map(|item| address(item.trim())).collect()
        }
        HopsField::Forwarded => {
            let values = headers.get_all(header::FORWARDED).iter().map(|value| value.to_str().unwrap_or("?"));
            values.flat_map(|value| split(value, ',')).map(|element| node(&element)).collect()
        }
    }
}

/// The node that an element of Forwarded names (RFC 7239 §4).
fn node(element: &str) -> Option<IpAddr> {
    let pairs = split(element, ';');
    let mut pairs = pairs.iter().filter_map(|pair| pair.trim().split_once('='));
    let (_, node) = pairs.find(|(name, _)| name.trim().eq_ignore_ascii_case("for"))?;
    address(node.trim().trim_matches('"'))
}

/// Splits a list, but not within quoted strings.
fn split(text: &str, separator: char) -> Vec<String> {
    let (mut parts, mut quoted, mut escaped) = (vec![String::new()], false, false);
    for character in text.chars() {
        if character == separator && !quoted {
            parts.push(String::new());
            continue;
        }
        quoted ^= character == '"' && !escaped;
        escaped = quoted && character == '\\' && !escaped;
        if let Some(last) = parts.last_mut() {
            last.push(character);
        }
    }
    parts
}

/// An address, with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse::<IpAddr>().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

/// An address as Forwarded has it (RFC 7239 §6).
pub(crate) fn forwarded(client: IpAddr, host: &str) -> String {
    let node = match client.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("\"[{address}]\""),
    };
    format!("for={node};host=\"{host}\";proto=https")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_is_the_last_that_is_not_trusted() {
        let trusted: Vec<Network> =
            ["10.0.0.0/8", "2001:db8::/32"].map(|n| Network::try_from(n.to_owned()).unwrap()).into();
        for (peer, fields, client, id) in [
            ("10.0.0.1", &[("x-forwarded-for", "203.0.113.7")][..], "203.0.113.7", None),
            ("::ffff:10.0.0.1", &[("x-forwarded-for", "203.0.113.7, 10.0.0.9")], "203.0.113.7", None),
            // What the client itself wrote stands before what the proxy did.
            ("10.0.0.1", &[("x-forwarded-for", "198.51.100.1, 203.0.113.7")], "203.0.113.7", None),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "198.51.100.1"), ("x-forwarded-for", "203.0.113.7:4000")],
                "203.0.113.7",
                None,
            ),
            ("10.0.0.1", &[("x-forwarded-for", "203.0.113.7, unknown, 10.0.0.2")], "10.0.0.2", None),
            ("10.0.0.1", &[("x-forwarded-for", "")], "10.0.0.1", None),
            ("10.0.0.1", &[("forwarded", "for=_hidden")], "10.0.0.1", None),
            ("10.0.0.1", &[("x-request-id", "abc-1")], "10.0.0.1", Some("abc-1")),
            ("10.0.0.1", &[("x-request-id", "a b")], "10.0.0.1", None),
            ("203.0.113.9", &[("x-forwarded-for", "198.51.100.1"), ("x-request-id", "x")], "203.0.113.9", None),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                headers.append(HeaderName::from_static(name), value.parse().unwrap());
            }
            let want = Hops { client: client.parse().unwrap(), request_id: id.map(str::to_owned) };
            assert_eq!(
                Hops::of(peer.parse().unwrap(), &headers, &trusted, HopsField::XForwardedFor),
                want,
                "{peer} {fields:?}"
            );
        }
        assert_eq!(forwarded("::ffff:192.0.2.1".parse().unwrap(), "a"), "for=192.0.2.1;host=\"a\";proto=https");
        assert_eq!(forwarded("2001:db8::1".parse().unwrap(), "a"), "for=\"[2001:db8::1]\";host=\"a\";proto=https");
    }

    #[test]
    fn of_forwarded_what_stands_in_quotes_is_no_hop() {
        let trusted = [Network::try_from("10.0.0.0/8".to_owned()).unwrap()];
        for (fields, client) in [
            (&[("forwarded", "for=\"[2001:db9::1]:47\";proto=http, for=10.1.1.1;by=x")][..], "2001:db9::1"),
            (&[("forwarded", "for=_hidden")], "10.0.0.1"),
            (&[("forwarded", "host=\"a,for=6.6.6.6\";for=203.0.113.7")], "203.0.113.7"),
            (&[("forwarded", "host=\"a;for=6.6.6.6\";FOR=203.0.113.7")], "203.0.113.7"),
            (&[("forwarded", "host=\"a\\\",for=6.6.6.6\";for=203.0.113.7")], "203.0.113.7"),
            // The other field may be the client's own.
            (&[("forwarded", "for=203.0.113.7"), ("x-forwarded-for", "6.6.6.6")], "203.0.113.7"),
            (&[("x-forwarded-for", "6.6.6.6")], "10.0.0.1"),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                headers.append(HeaderName::from_static(name), value.parse().unwrap());
            }
            let hops = Hops::of("10.0.0.1".parse().unwrap(), &headers, &trusted, HopsField::Forwarded);
            assert_eq!(hops.client, client.parse::<IpAddr>().unwrap(), "{fields:?}");
        }
    }
}
