//! Where a node listens, and what it tells others.

use std::{io, net::SocketAddr};

use tokio::net::TcpListener;

use super::StartError;
use crate::config::Config;

pub(super) fn bind_tcp(what: &'static str, addr: SocketAddr) -> Result<std::net::TcpListener, StartError> {
    let listener = std::net::TcpListener::bind(addr).map_err(|e| StartError::bind(what, addr, e))?;
    listener.set_nonblocking(true).map_err(|e| StartError::bind(what, addr, e))?;
    Ok(listener)
}

pub(super) fn tokio_listener(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    TcpListener::from_std(listener)
}

/// The address that others are told: as configured, or as bound, or the one that this host uses towards its seeds.
pub(super) fn advertised(config: &Config, bound: SocketAddr) -> SocketAddr {
    if let Some(advertise) = config.node.advertise {
        return advertise;
    }
    if !bound.ip().is_unspecified() {
        return bound;
    }
    // Connecting a UDP socket sends nothing; it only asks for the route. The fallback is a documentation address.
    let towards = config.node.seeds.first().map_or("192.0.2.1:7400", String::as_str);
    let local = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|s| {
        s.connect(towards)?;
        s.local_addr()
    });
    let ip = local.map_or_else(|_| std::net::Ipv4Addr::LOCALHOST.into(), |addr| addr.ip());
    SocketAddr::new(ip, bound.port())
}
