use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
};

/// Below the range from which systems take ports for outgoing connections: such a connection must not take the port of a
/// node that is just being restarted.
const FIRST: u16 = 12_000;
const COUNT: u16 = 20_000;

/// Where this process starts to look, so that two of them hardly meet.
static NEXT: LazyLock<AtomicU16> =
    LazyLock::new(|| AtomicU16::new((std::process::id() * 101 % u32::from(COUNT)) as u16));

/// A loopback address whose port is free for TCP and UDP, and was not given before by this process.
///
/// # Panics
/// If not one port is free.
pub fn free_port() -> SocketAddr {
    (0..COUNT)
        .map(|_| SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST + NEXT.fetch_add(1, Relaxed) % COUNT)))
        .find(|addr| TcpListener::bind(addr).is_ok() && UdpSocket::bind(addr).is_ok())
        .expect("loopback has a free port")
}
