//! What calls carry, and services take.

use std::fmt;

use starling_http::normal::Tunnel;
use starling_protocol::Protocol;

/// What a call carries, or a service takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    /// HTTP, and what it changes to.
    #[default]
    Http,
    /// The bytes of a TCP connection.
    Tcp,
    /// UDP packets.
    Udp,
}

impl Kind {
    /// What a request asks for.
    pub(crate) fn of_request(tunnel: Option<Tunnel>) -> Self {
        match tunnel {
            None | Some(Tunnel::Upgrade) => Self::Http,
            Some(Tunnel::Bytes) => Self::Tcp,
            Some(Tunnel::Udp) => Self::Udp,
        }
    }

    /// What a service takes that is spoken to so; `None` if that is not known here.
    pub(crate) fn of_service(protocol: &Protocol) -> Option<Self> {
        match protocol {
            Protocol::Http1 | Protocol::H2c => Some(Self::Http),
            Protocol::Tcp => Some(Self::Tcp),
            Protocol::Udp => Some(Self::Udp),
            Protocol::Unknown(_) => None,
        }
    }

    /// How it is to be called.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::Http => "call it by HTTP, over the outbound port or an upstream with protocol = \"http\"",
            Self::Tcp => "call it over an upstream with protocol = \"tcp\", or by CONNECT at the outbound port",
            Self::Udp => "call it over an upstream with protocol = \"udp\"",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "HTTP",
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}
