//! Who asks, and whether that user may change anything. Everybody on this machine may look.

use std::{fs, net::SocketAddr};

/// Said to who may not.
pub(super) const UNKNOWN: &str = "changes are for the user that the node runs as, and root; use admin.sock in the state \
                                  directory as that user";

/// As the kernel's table has it.
const ESTABLISHED: &str = "01";

/// The other end of a connection to the admin API.
#[derive(Debug, Clone, Copy)]
pub(super) enum Caller {
    /// Over loopback. The system knows whose socket it is.
    Tcp { own: SocketAddr, from: SocketAddr },
    /// Over the socket in the state directory.
    Unix { user: u32 },
    /// Nobody can say.
    Unknown,
}

impl Caller {
    /// Whether that user may drain the node, make keys, and so on: the node's own, or root. A service beside the node that is
    /// talked into sending a request runs as another one.
    pub(super) fn may_change(self) -> Result<(), &'static str> {
        let user = match self {
            Self::Tcp { own, from } => owner(own, from),
            Self::Unix { user } => Some(user),
            Self::Unknown => None,
        };
        let own = rustix::process::geteuid().as_raw();
        if user.is_some_and(|user| user == own || user == 0) { Ok(()) } else { Err(UNKNOWN) }
    }
}

/// The user whose socket is connected from `from` to `own`, by the kernel's table (proc(5)).
fn owner(own: SocketAddr, from: SocketAddr) -> Option<u32> {
    let file = if from.is_ipv4() { "/proc/self/net/tcp" } else { "/proc/self/net/tcp6" };
    let table = fs::read_to_string(file).ok()?;
    let (local, remote) = (hex(from), hex(own));
    table.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let ends = (fields.nth(1)?, fields.next()?);
        if ends != (&local, &remote) {
            return None;
        }
        // A socket whose process has closed it is shown as root's: only one that is in use says whose it is. Behind the two
        // addresses: state, queues, timer, retransmits, user, timeouts, inode.
        let state = fields.next()?;
        let user = fields.nth(3)?.parse().ok()?;
        let inode = fields.nth(1)?;
        (state == ESTABLISHED && inode != "0").then_some(user)
    })
}

/// An address as the table has it: 32-bit words in the machine's order, and the port.
fn hex(addr: SocketAddr) -> String {
    let words = match addr {
        SocketAddr::V4(v4) => format!("{:08X}", u32::from_ne_bytes(v4.ip().octets())),
        SocketAddr::V6(v6) => v6
            .ip()
            .octets()
            .chunks(4)
            .map(|word| format!("{:08X}", u32::from_ne_bytes(word.try_into().expect("four bytes"))))
            .collect(),
    };
    format!("{words}:{:04X}", addr.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_system_knows_whose_a_connection_is() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(local) else { continue };
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_accepted, from) = listener.accept().unwrap();
            let caller = Caller::Tcp { own: stream.peer_addr().unwrap(), from };
            assert_eq!(owner(stream.peer_addr().unwrap(), from), Some(rustix::process::geteuid().as_raw()));
            assert_eq!(caller.may_change(), Ok(()));
            let stranger = Caller::Tcp { own: stream.peer_addr().unwrap(), from: ([127, 0, 0, 1], 1).into() };
            assert!(stranger.may_change().is_err());
        }
        assert!(Caller::Unknown.may_change().is_err());
    }
}
