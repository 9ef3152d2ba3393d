//! Several sockets on one port, one for each thread that serves it.
//!
//! Of TCP the kernel deals out connections. Of QUIC the first byte of every connection id that is made here is the index of the
//! socket whose thread owns the connection. A classic BPF program reads that byte of each packet's destination connection id
//! (RFC 9000 §17: at offset 1 after a short header, 6 after a long one) and picks the socket. So a connection stays with its
//! thread when the client's address changes, which hashing the address would break; and a client can aim its first packet.
#![allow(unsafe_code)] // one setsockopt that no safe wrapper offers

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};

use quinn::{ConnectionId, ConnectionIdGenerator};
use rand::RngExt;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// Socket buffers asked for, in bytes; the system may grant less.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
const CONNECTION_ID_BYTES: usize = 8;

/// UDP sockets on one address.
#[derive(Debug)]
pub struct UdpGroup {
    /// In the order of the steering index.
    pub sockets: Vec<UdpSocket>,
    /// Why there is only one of them, if there should be more.
    pub alone: Option<io::Error>,
}

/// `fixed` sockets (none or one), which get what is aimed at index 0, and `shared` ones, which share all the rest evenly. Where
/// the kernel cannot be told how to steer, there is one.
///
/// # Errors
/// If any other socket has the port.
pub fn udp(addr: SocketAddr, fixed: usize, shared: usize) -> io::Result<UdpGroup> {
    // The first one binds without sharing, so that a port in use is an error and not a silent split of its traffic;
    // sharing is turned on afterwards, for the rest of this group.
    let first = new_udp(addr)?;
    first.bind(&addr.into())?;
    let mut sockets = vec![UdpSocket::from(first)];
    if fixed + shared > 1
        && let Err(error) = complete(&mut sockets, fixed, shared)
    {
        sockets.truncate(1);
        return Ok(UdpGroup { sockets, alone: Some(error) });
    }
    Ok(UdpGroup { sockets, alone: None })
}

fn complete(sockets: &mut Vec<UdpSocket>, fixed: usize, shared: usize) -> io::Result<()> {
    let bound = sockets[0].local_addr()?;
    SockRef::from(&sockets[0]).set_reuse_port(true)?;
    for _ in 1..fixed + shared {
        let socket = new_udp(bound)?;
        socket.set_reuse_port(true)?;
        socket.bind(&bound.into())?;
        sockets.push(socket.into());
    }
    steer_by_connection_id(&sockets[0], fixed, shared)
}

/// TCP listeners on one address; the kernel deals out connections among them.
///
/// # Errors
/// If any other socket has the port.
pub fn tcp(addr: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
    let first = new_tcp(addr)?;
    first.bind(&addr.into())?;
    first.set_reuse_port(count > 1)?;
    first.listen(BACKLOG)?;
    let mut listeners = vec![TcpListener::from(first)];
    let bound = listeners[0].local_addr()?;
    for _ in 1..count {
        let socket = new_tcp(bound)?;
        socket.set_reuse_port(true)?;
        socket.bind(&bound.into())?;
        socket.listen(BACKLOG)?;
        listeners.push(socket.into());
    }
    Ok(listeners)
}

/// A UDP socket on a port of the system's choice, for dialling.
///
/// # Errors
/// Of the system.
pub fn ephemeral(like: SocketAddr) -> io::Result<UdpSocket> {
    let addr = SocketAddr::new(like.ip(), 0);
    let socket = new_udp(addr)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Makes connection ids whose packets go to the socket of that index.
#[derive(Debug, Clone, Copy)]
pub struct OwnedBy(pub u8);

impl ConnectionIdGenerator for OwnedBy {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; CONNECTION_ID_BYTES];
        rand::rng().fill(&mut bytes[1..]);
        bytes[0] = self.0;
        ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn new_tcp(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // As the standard library does: connections of a former process may be waiting for their last packets.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn new_udp(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    for set in [Socket::set_recv_buffer_size, Socket::set_send_buffer_size] {
        if let Err(error) = set(&socket, SOCKET_BUFFER_BYTES) {
            tracing::debug!(%error, "socket buffer size");
        }
    }
    Ok(socket)
}

fn steer_by_connection_id(socket: &UdpSocket, fixed: usize, shared: usize) -> io::Result<()> {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load_byte = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    let (fixed, shared) = (fixed as u32, shared as u32);
    let mut program = [
        op(load_byte, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 2, 0x80), // long header?
        op(load_byte, 0, 0, 6),
        op(libc::BPF_JMP | libc::BPF_JA, 0, 0, 1),
        op(load_byte, 0, 0, 1),
        op(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, 0, fixed),
        op(libc::BPF_RET | libc::BPF_A, 0, 0, 0),
        op(libc::BPF_ALU | libc::BPF_SUB | libc::BPF_K, 0, 0, fixed),
        op(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, 0, 0, shared),
        op(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, 0, 0, fixed),
        op(libc::BPF_RET | libc::BPF_A, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the descriptor is open for the length of the call, and the kernel copies `filter` and the `len` instructions
    // that it points to before the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            std::ptr::from_ref(&filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a packet arrives whose destination connection id begins with that byte, with a long header and a short one.
    fn arrives(group: &UdpGroup, first: u8) -> [usize; 2] {
        let to = group.sockets[0].local_addr().unwrap();
        [true, false].map(|is_long| {
            let packet: &[u8] = if is_long { &[0xc0, 0, 0, 0, 1, 8, first, 9, 9] } else { &[0x40, first, 9, 9] };
            // A sender of its own for each packet: by address hash they would scatter.
            UdpSocket::bind("127.0.0.1:0").unwrap().send_to(packet, to).unwrap();
            loop {
                let got = group.sockets.iter().position(|socket| socket.recv_from(&mut [0; 16]).is_ok());
                match got {
                    Some(index) => return index,
                    None => std::thread::yield_now(),
                }
            }
        })
    }

    #[test]
    fn packets_go_to_the_socket_that_their_connection_id_names() {
        let group = udp(([127, 0, 0, 1], 0).into(), 1, 2).unwrap();
        assert_eq!(group.sockets.len(), 3);
        for (first, index) in [(0, 0), (1, 1), (2, 2), (3, 1), (200, 2), (255, 1)] {
            assert_eq!(arrives(&group, first), [index; 2], "{first}");
        }
        let public = udp(([127, 0, 0, 1], 0).into(), 0, 3).unwrap();
        for (first, index) in [(0, 0), (1, 1), (2, 2), (3, 0), (255, 0)] {
            assert_eq!(arrives(&public, first), [index; 2], "{first}");
        }
    }

    #[test]
    fn a_port_in_use_is_an_error() {
        let group = udp(([127, 0, 0, 1], 0).into(), 1, 1).unwrap();
        let error = udp(group.sockets[0].local_addr().unwrap(), 1, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let listeners = tcp(([127, 0, 0, 1], 0).into(), 3).unwrap();
        for count in [1, 3] {
            let error = tcp(listeners[0].local_addr().unwrap(), count).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }

    #[test]
    fn every_listener_of_a_port_gets_connections() {
        let listeners = tcp(([127, 0, 0, 1], 0).into(), 2).unwrap();
        let to = listeners[0].local_addr().unwrap();
        let _clients: Vec<_> = (0..64).map(|_| std::net::TcpStream::connect(to).unwrap()).collect();
        for listener in &listeners {
            assert!(listener.accept().is_ok());
        }
    }
}
