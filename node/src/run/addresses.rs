//! Where a node listens, and what it tells others.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
};

use starling_protocol::Name;
use tokio::net::TcpListener;

use super::StartError;
use crate::{LimitSettings, config::Config, port::reuseport};

/// What the mesh port is called where it cannot be had.
pub(super) const MESH_PORT: &str = "the mesh port (UDP)";

/// Everything that a node listens on. Once it is there, a token may be spent.
pub(super) struct Bound {
    /// Address of the mesh port.
    pub(super) listen: SocketAddr,
    /// What others are told.
    pub(super) advertise: SocketAddr,
    pub(super) control_socket: UdpSocket,
    pub(super) worker_socket: UdpSocket,
    pub(super) admin_listener: std::net::TcpListener,
    pub(super) doors: Vec<DoorFrame>,
}

/// A door for the application, not open yet.
pub(super) struct DoorFrame {
    /// The service that it leads to; by host name if `None`.
    pub(super) service: Option<Name>,
    pub(super) limits: LimitSettings,
    pub(super) listener: std::net::TcpListener,
}

impl Bound {
    /// Binds every address of the configuration, or says which one cannot be had.
    pub(super) fn all(config: &Config) -> Result<Self, StartError> {
        let wanted = config.node.listen;
        let failed = |e| StartError::bind(MESH_PORT, wanted, e);
        let mut sockets = reuseport::bind_group(wanted, 2).map_err(failed)?.into_iter();
        let (Some(control_socket), Some(worker_socket)) = (sockets.next(), sockets.next()) else {
            return Err(failed(io::ErrorKind::Other.into()));
        };
        let listen = control_socket.local_addr().map_err(failed)?;
        let admin_listener = bind_tcp("the admin API", config.admin.listen)?;
        let mut doors = Vec::new();
        if let Some(addr) = config.outbound.listen {
            let listener = bind_tcp("the outbound port", addr)?;
            doors.push(DoorFrame { service: None, limits: config.outbound.limits(), listener });
        }
        for upstream in &config.upstream {
            let listener = bind_tcp("an upstream port", upstream.listen)?;
            doors.push(DoorFrame { service: Some(upstream.service.clone()), limits: upstream.limits(), listener });
        }
        let advertise = advertised(config, listen);
        Ok(Self { listen, advertise, control_socket, worker_socket, admin_listener, doors })
    }
}

fn bind_tcp(what: &'static str, addr: SocketAddr) -> Result<std::net::TcpListener, StartError> {
    let listener = std::net::TcpListener::bind(addr).map_err(|e| StartError::bind(what, addr, e))?;
    listener.set_nonblocking(true).map_err(|e| StartError::bind(what, addr, e))?;
    Ok(listener)
}

pub(super) fn tokio_listener(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    TcpListener::from_std(listener)
}

/// The address that others are told: as configured, or as bound, or the one that this host uses towards its seeds.
fn advertised(config: &Config, bound: SocketAddr) -> SocketAddr {
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
