use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::wire::{Unknown, Value, WireError, once, put_field};

/// Why a text is not a name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a valid {what}: use 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'")]
pub struct InvalidName {
    text: String,
    what: &'static str,
}

macro_rules! checked_name {
    ($(#[$doc:meta])* $type:ident, $what:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(Arc<str>);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let check: fn(&str) -> bool = $check;
                if check(text) {
                    Ok(Self(text.into()))
                } else {
                    // The text may be hostile and is repeated in the error: bound it.
                    Err(InvalidName { text: text.chars().take(80).collect(), what: $what })
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        impl Value for $type {
            fn put(&self, tag: u64, out: &mut Vec<u8>) {
                put_field(tag, self.0.as_bytes(), out);
            }
            fn take(slot: &mut Option<Self>, value: &[u8], _: Unknown) -> Result<(), WireError> {
                let text = String::from_utf8_lossy(value);
                once(slot, text.parse().map_err(|e: InvalidName| WireError::Malformed(e.to_string()))?)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

checked_name! {
    /// Name of a node or a service: one DNS label (RFC 1123 §2.1) in lower case, so that it can stand in a host name and in
    /// a certificate as it is.
    Name, "name", is_label
}

checked_name! {
    /// Name of a mesh: the trust domain of its SPIFFE ids, DNS labels joined by dots.
    MeshName, "mesh name", |text| text.len() <= 253 && text.split('.').all(is_label)
}

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

impl Name {
    /// The DNS name under which a service is called, and which its certificate carries: `<name>.mesh.internal`.
    pub fn service_host(&self) -> String {
        format!("{self}{SERVICE_SUFFIX}")
    }
}

impl MeshName {
    /// The SPIFFE id of a node: `spiffe://<mesh>/node/<name>`.
    pub fn spiffe_id(&self, node: &Name) -> String {
        format!("spiffe://{self}/node/{node}")
    }
}

const SERVICE_SUFFIX: &str = ".mesh.internal";

/// The service that a host name means: `orders.mesh.internal`, `orders.mesh` or `orders`; letter case and a final dot do
/// not matter (RFC 3986 §3.2.2). `None` when no service can have that name.
pub fn service_of_host(host: &str) -> Option<Name> {
    let host = host.strip_suffix('.').unwrap_or(host);
    if host.len() > 80 {
        return None;
    }
    let host = host.to_ascii_lowercase();
    let label = host.strip_suffix(SERVICE_SUFFIX).or_else(|| host.strip_suffix(".mesh")).unwrap_or(&host);
    label.parse().ok()
}

/// Who a node is, whatever its name or address: the first 16 bytes of the SHA-256 of its public key
/// (SubjectPublicKeyInfo). Stays the same over renewals and restarts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(pub [u8; 16]);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// From 32 hex digits.
impl FromStr for NodeId {
    type Err = WireError;
    fn from_str(hex: &str) -> Result<Self, WireError> {
        let wrong = || WireError::Malformed("an id has 32 hex digits".into());
        let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        let digits = digits.filter(|digits| digits.len() == 32).ok_or_else(wrong)?;
        let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        bytes.try_into().map(Self).map_err(|_| wrong())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["orders", "a", "orders-1", "0x", &"a".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "Orders", "a.b", "a_b", "a/b", "ä", &"a".repeat(64), "a\0"] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_service_has_three_host_names() {
        for host in ["orders.mesh.internal", "orders.mesh", "orders", "ORDERS.Mesh.Internal", "orders.mesh.internal."] {
            assert_eq!(service_of_host(host).unwrap().as_str(), "orders", "{host}");
        }
        for host in ["", ".mesh.internal", "a.b.mesh.internal", "orders.example.com", "127.0.0.1", "[::1]"] {
            assert_eq!(service_of_host(host), None, "{host}");
        }
    }
}
