//! Where a node listens, and what it tells others.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket},
};

use starling_http::shared_port::{Ports, UdpGroup};
use starling_protocol::{MESH_PORT as MESH_PORT_NUMBER, Name};
use tokio::net::TcpListener;

use super::StartError;
use crate::{
    LimitSettings, RepeatSettings,
    config::{Config, UpstreamProtocol},
};

/// What the mesh port is called where it cannot be had.
pub(super) const MESH_PORT: &str = "the mesh port (UDP)";

/// Everything that a node listens on. Once it is there, a token may be spent.
pub(super) struct Bound {
    /// Address of the mesh port.
    pub(super) listen: SocketAddr,
    /// What others are told.
    pub(super) advertise: SocketAddr,
    pub(super) control_socket: UdpSocket,
    /// One a worker. Where the system cannot steer there is one worker, without a socket: the main thread takes all
    /// connections.
    pub(super) worker_sockets: Vec<Option<UdpSocket>>,
    pub(super) admin_listener: std::net::TcpListener,
    pub(super) doors: Vec<DoorFrame>,
}

/// A door for the application, not open yet.
pub(super) struct DoorFrame {
    pub(super) leads: Leads,
    pub(super) limits: LimitSettings,
    pub(super) repeats: RepeatSettings,
}

/// Where a door leads, and what it listens on: a listener a worker at least, or one socket in all.
pub(super) enum Leads {
    /// By HTTP, to a service, or by host name if `None`.
    Http(Option<Name>, Vec<std::net::TcpListener>),
    /// By TCP, to a service.
    Tcp(Name, Vec<std::net::TcpListener>),
    /// By UDP, to a service.
    Udp(Name, UdpSocket),
}

impl DoorFrame {
    /// Where the outbound door listens, if this is it.
    pub(super) fn outbound_addr(&self) -> Option<SocketAddr> {
        match &self.leads {
            Leads::Http(None, listeners) => listeners.first()?.local_addr().ok(),
            _ => None,
        }
    }
}

impl Bound {
    /// Binds every address of the configuration, or says which one cannot be had.
    pub(super) fn all(config: &Config, ports: &mut Ports) -> Result<Self, StartError> {
        let wanted = config.node.listen;
        let failed = |e| StartError::bind(MESH_PORT, wanted, e);
        let UdpGroup { sockets, alone } = ports.quic(wanted, 1, config.node.workers).map_err(failed)?;
        let mut sockets = sockets.into_iter();
        let control_socket = sockets.next().ok_or_else(|| failed(io::ErrorKind::Other.into()))?;
        let mut worker_sockets: Vec<_> = sockets.map(Some).collect();
        if let Some(error) = alone {
            tracing::warn!(%error, "the system cannot share the mesh port among threads: one thread carries everything");
        }
        if worker_sockets.is_empty() {
            worker_sockets.push(None);
        }
        let workers = worker_sockets.len();
        let listen = control_socket.local_addr().map_err(failed)?;
        let (what, addr) = ("the admin API", config.admin.listen);
        let admin_listener = ports.tcp(addr, 1).and_then(|mut one| one.pop().ok_or(io::ErrorKind::Other.into()));
        let admin_listener = admin_listener.map_err(|e| StartError::bind(what, addr, e))?;
        let mut doors = Vec::new();
        if let Some(addr) = config.outbound.listen {
            let what = "the outbound port";
            let listeners = ports.tcp(addr, workers).map_err(|e| StartError::bind(what, addr, e))?;
            let (leads, outbound) = (Leads::Http(None, listeners), &config.outbound);
            doors.push(DoorFrame { leads, limits: outbound.limits(), repeats: outbound.repeats() });
        }
        for upstream in &config.upstream {
            let (addr, service) = (upstream.listen, upstream.service.clone());
            let failed = |e| StartError::bind("an upstream port", addr, e);
            let leads = match upstream.protocol {
                UpstreamProtocol::Http => Leads::Http(Some(service), ports.tcp(addr, workers).map_err(failed)?),
                UpstreamProtocol::Tcp => Leads::Tcp(service, ports.tcp(addr, workers).map_err(failed)?),
                UpstreamProtocol::Udp => Leads::Udp(service, ports.udp(addr).map_err(failed)?),
            };
            doors.push(DoorFrame { leads, limits: upstream.limits(), repeats: upstream.repeats() });
        }
        let advertise = advertised(config, listen)?;
        Ok(Self { listen, advertise, control_socket, worker_sockets, admin_listener, doors })
    }
}

pub(super) fn tokio_listener(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    TcpListener::from_std(listener)
}

/// The address that others are told: as configured, or as bound, or the one that this host uses towards its seeds, or the
/// world. An error if that could only be one that leads others to themselves.
fn advertised(config: &Config, bound: SocketAddr) -> Result<SocketAddr, StartError> {
    if let Some(advertise) = config.node.advertise {
        return Ok(advertise);
    }
    if !bound.ip().is_unspecified() {
        return Ok(bound);
    }
    let seeds = config.node.seeds.iter().filter_map(|seed| seed.to_socket_addrs().ok()).flatten();
    // Documentation addresses, of both families: nothing is sent there.
    let world =
        [([192, 0, 2, 1], MESH_PORT_NUMBER).into(), ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], MESH_PORT_NUMBER).into()];
    let local = seeds.chain(world).find_map(|towards| own_address(towards, bound));
    local.map(|ip| SocketAddr::new(ip, bound.port())).ok_or_else(|| StartError::Config {
        key: "node.advertise".into(),
        problem: format!(
            "it listens on {bound}, and there is no route by which to tell which address others can reach; give one with \
             --advertise IP:PORT, or listen on one"
        ),
    })
}

/// The address that this host uses towards another one, if the socket hears on it. Connecting a UDP socket sends nothing; it
/// only asks for the route.
fn own_address(towards: SocketAddr, bound: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = if towards.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    // What is bound to IPv6's any hears IPv4 as well; not the other way round.
    if bound.is_ipv4() && towards.is_ipv6() {
        return None;
    }
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(towards).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    // Loopback is for those alone whose seeds are there, too.
    (!ip.is_unspecified() && (!ip.is_loopback() || towards.ip().is_loopback())).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_to_nobody_but_loopback() {
        let bound = ([0, 0, 0, 0], 7400).into();
        assert_eq!(own_address(([127, 0, 0, 1], 7400).into(), bound), Some([127, 0, 0, 1].into()));
        assert_eq!(own_address(([0, 0, 0, 0, 0, 0, 0, 1], 7400).into(), bound), None, "not heard on");
        let towards_world = own_address(([192, 0, 2, 1], 7400).into(), bound);
        assert!(towards_world.is_none_or(|ip| !ip.is_loopback()), "{towards_world:?}");
    }

    #[test]
    fn what_is_given_is_told() {
        let mut config = Config::default();
        config.node.advertise = Some(([10, 0, 0, 5], 7400).into());
        let told = advertised(&config, ([0, 0, 0, 0], 7400).into()).unwrap();
        assert_eq!(told, ([10, 0, 0, 5], 7400).into());
    }
}
