//! Several UDP sockets on one port, with the kernel choosing among them by connection id.
//!
//! The first byte of every connection id that this node makes is the index of the thread that owns the connection. A
//! classic BPF program reads that byte of each packet's destination connection id (RFC 9000 §17: at offset 1 after a short
//! header, 6 after a long one) and picks the socket. So a connection stays with its thread when the client's address
//! changes, which hashing the address would break; and a client can aim its first packet.
#![allow(unsafe_code)] // one setsockopt that no safe wrapper offers

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
};

use socket2::{Domain, Protocol, Socket, Type};

/// Socket buffers asked for, in bytes; the system may grant less.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// `count` sockets on one address, in the order of the steering index. Fails if any other socket has the port.
pub(crate) fn bind_group(addr: SocketAddr, count: usize) -> io::Result<Vec<UdpSocket>> {
    // The first one binds without sharing, so that a port in use is an error and not a silent split of its traffic;
    // sharing is turned on afterwards, for the rest of this group.
    let first = new_socket(addr)?;
    first.bind(&addr.into())?;
    let mut sockets = vec![UdpSocket::from(first)];
    if count > 1 {
        let bound = sockets[0].local_addr()?;
        socket2::SockRef::from(&sockets[0]).set_reuse_port(true)?;
        for _ in 1..count {
            let socket = new_socket(bound)?;
            socket.set_reuse_port(true)?;
            socket.bind(&bound.into())?;
            sockets.push(socket.into());
        }
        steer_by_connection_id(&sockets[0], count)?;
    }
    Ok(sockets)
}

/// A socket on a port of the system's choice, for dialling.
pub(crate) fn bind_ephemeral(like: SocketAddr) -> io::Result<UdpSocket> {
    let addr = SocketAddr::new(like.ip(), 0);
    let socket = new_socket(addr)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

fn new_socket(addr: SocketAddr) -> io::Result<Socket> {
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

fn steer_by_connection_id(socket: &UdpSocket, count: usize) -> io::Result<()> {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load_byte = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    let mut program = [
        op(load_byte, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 2, 0x80), // long header?
        op(load_byte, 0, 0, 6),
        op(libc::BPF_JMP | libc::BPF_JA, 0, 0, 1),
        op(load_byte, 0, 0, 1),
        op(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, 0, 0, count as u32),
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
    use std::time::Duration;

    use super::*;

    #[test]
    fn packets_go_to_the_socket_that_their_connection_id_names() {
        let sockets = bind_group(([127, 0, 0, 1], 0).into(), 3).unwrap();
        let to = sockets[0].local_addr().unwrap();
        for socket in &sockets {
            socket.set_nonblocking(false).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        for index in 0..3u8 {
            // A sender of its own for each packet: by address hash they would scatter.
            for short in [true, false] {
                let packet: &[u8] = if short { &[0x40, index, 9, 9] } else { &[0xc0, 0, 0, 0, 1, 8, index, 9, 9] };
                UdpSocket::bind("127.0.0.1:0").unwrap().send_to(packet, to).unwrap();
                let mut buffer = [0; 16];
                let (length, _) = sockets[index as usize].recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], packet);
            }
        }
    }

    #[test]
    fn a_port_in_use_is_an_error() {
        let group = bind_group(([127, 0, 0, 1], 0).into(), 2).unwrap();
        let error = bind_group(group[0].local_addr().unwrap(), 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
