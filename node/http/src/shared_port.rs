//! The ports of a process: several sockets on one port, one for each thread that serves it, and what becomes of them when
//! another process takes over.
//!
//! Of TCP the kernel deals out connections. Of QUIC it reads the connection id of each packet and picks the socket whose
//! thread, and whose process, made that id. So a connection stays with its thread when the client's address changes, which hashing the
//! address would break; it stays with its process when another one takes the port; and a client can aim its first packet.
//!
//! A process that takes over gets every descriptor of the one before. A TCP listener is then the same in both, with one backlog.
//! QUIC needs sockets of its own, which the one before makes for it, or has itself taken over from one that is gone. The kernel
//! knows the sockets of a port by their place in line, and closes up where one is missing: so each process holds all of them, to its
//! end, whoever reads from them.

mod steering;

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use self::steering::{Deal, Mark, all_to_the_first, steer};
pub use self::steering::{OwnedBy, aimed_at};

/// Socket buffers asked for, in bytes; the system may grant less.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// What a port carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Carries {
    Tcp,
    Udp,
    Quic,
}

/// A port, and every socket on it. They are kept beside those that are served, which they keep from being closed.
#[derive(Debug)]
struct Port {
    carries: Carries,
    /// As configured; the port may be 0.
    asked: SocketAddr,
    sockets: Vec<OwnedFd>,
    /// Of QUIC, if the kernel steers.
    deal: Option<Deal>,
    /// That of the process before, if it had the port.
    before: Option<Deal>,
}

/// A port as the next process is told of it, beside its sockets.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct PortLeft {
    carries: Carries,
    asked: SocketAddr,
    sockets: usize,
    deal: Option<Deal>,
}

/// What a process tells the next one of its ports, beside their descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Left {
    mark: Mark,
    ports: Vec<PortLeft>,
}

impl Left {
    /// How many descriptors belong to it.
    pub fn descriptors(&self) -> usize {
        self.ports.iter().map(|port| port.sockets).sum()
    }
}

/// The ports of this process.
#[derive(Debug)]
pub struct Ports {
    mark: Mark,
    held: Vec<Port>,
    before: Option<Before>,
}

/// What the process before had.
#[derive(Debug)]
struct Before {
    mark: Mark,
    /// Not taken over yet.
    ports: Vec<Port>,
}

/// UDP sockets on one address, for QUIC.
#[derive(Debug)]
pub struct UdpGroup {
    /// In the order of the steering index.
    pub sockets: Vec<UdpSocket>,
    /// Why there is only one of them, if there should be more.
    pub alone: Option<io::Error>,
}

impl Default for Ports {
    fn default() -> Self {
        Self { mark: Mark::other_than(None), held: Vec::new(), before: None }
    }
}

impl Ports {
    /// Those of another process, to be taken over one by one.
    ///
    /// # Errors
    /// If there are not as many descriptors as it tells.
    pub fn of_another(left: Left, descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        if left.descriptors() != descriptors.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors are missing, or there are too many"));
        }
        let mut descriptors = descriptors.into_iter();
        let port = |&PortLeft { carries, asked, sockets, deal }: &PortLeft| {
            let sockets = descriptors.by_ref().take(sockets).collect();
            Port { carries, asked, sockets, deal, before: None }
        };
        let ports = left.ports.iter().map(port).collect();
        let before = Before { mark: left.mark, ports };
        Ok(Self { mark: Mark::other_than(Some(left.mark)), held: Vec::new(), before: Some(before) })
    }

    /// Makes sockets for another process that has as many threads as this one.
    ///
    /// # Errors
    /// Of the system.
    pub fn make_room(&mut self) -> io::Result<()> {
        for port in &mut self.held {
            let Some(deal) = port.deal else { continue };
            let used = deal.range();
            if used.len() > used.start {
                add_to(&mut port.sockets, used.end + used.len())?;
            }
        }
        Ok(())
    }

    /// What the next process is given.
    pub fn left(&self) -> (Left, Vec<BorrowedFd<'_>>) {
        let left = |&Port { carries, asked, ref sockets, deal, .. }: &Port| PortLeft {
            carries,
            asked,
            sockets: sockets.len(),
            deal,
        };
        let ports = self.held.iter().map(left).collect();
        let descriptors = self.held.iter().flat_map(|port| &port.sockets).map(AsFd::as_fd).collect();
        (Left { mark: self.mark, ports }, descriptors)
    }

    /// Whether another process can have them: not where the kernel does not tell the packets of the two apart.
    pub fn can_be_left(&self) -> bool {
        self.held.iter().all(|port| port.carries != Carries::Quic || port.deal.is_some())
    }

    /// The generator of connection ids for the thread of that index.
    pub fn owned_by(&self, index: u8) -> OwnedBy {
        OwnedBy { index, mark: self.mark }
    }

    /// TCP listeners on one address, at least `count`, among which the kernel deals out connections.
    ///
    /// # Errors
    /// If any other socket has the port.
    pub fn tcp(&mut self, asked: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
        let sockets = match self.inherit(Carries::Tcp, asked) {
            // All of them: what waits at one that is closed would be lost.
            Some(port) => port.sockets,
            None => bind_tcp(asked, count)?,
        };
        // Two threads may share a listener.
        let listeners = (0..count.max(sockets.len())).map(|nth| sockets[nth % sockets.len()].try_clone());
        let listeners = listeners.map(|socket| socket.map(TcpListener::from)).collect::<io::Result<_>>()?;
        self.held.push(Port { carries: Carries::Tcp, asked, sockets, deal: None, before: None });
        Ok(listeners)
    }

    /// A socket for packets that are not QUIC's.
    ///
    /// # Errors
    /// If any other socket has the port.
    pub fn udp(&mut self, asked: SocketAddr) -> io::Result<UdpSocket> {
        let inherited = self.inherit(Carries::Udp, asked).and_then(|port| port.sockets.into_iter().next());
        let socket = match inherited {
            Some(socket) => UdpSocket::from(socket),
            None => UdpSocket::bind(asked)?,
        };
        socket.set_nonblocking(true)?;
        let sockets = vec![socket.try_clone()?.into()];
        self.held.push(Port { carries: Carries::Udp, asked, sockets, deal: None, before: None });
        Ok(socket)
    }

    /// Sockets for QUIC: `fixed` ones (none or one), which get what is aimed at index 0, and `shared` ones, which share all the rest
    /// evenly. Where the kernel cannot be told how to steer, there is one. On a port of the process before, they get nothing until
    /// [`Ports::take_fixed`] or [`Ports::take_all`].
    ///
    /// # Errors
    /// If any other socket has the port, or if the process before left one that cannot be shared.
    pub fn quic(&mut self, asked: SocketAddr, fixed: usize, shared: usize) -> io::Result<UdpGroup> {
        let wanted = fixed + shared;
        let own = |sockets: &[OwnedFd], at: usize| -> io::Result<Vec<UdpSocket>> {
            sockets[at..at + wanted].iter().map(|socket| Ok(UdpSocket::from(socket.try_clone()?))).collect()
        };
        let carries = Carries::Quic;
        if let Some(Port { deal: theirs, mut sockets, .. }) = self.inherit(carries, asked) {
            let theirs = theirs.ok_or(io::ErrorKind::Unsupported)?;
            let used = theirs.range();
            let at = if wanted <= used.start { 0 } else { used.end };
            add_to(&mut sockets, at + wanted)?;
            let deal = Deal::from(at, fixed, shared);
            let group = UdpGroup { sockets: own(&sockets, at)?, alone: None };
            self.held.push(Port { carries, asked, sockets, deal: Some(deal), before: Some(theirs) });
            return Ok(group);
        }
        // The first one binds without sharing, so that a port in use is an error and not a silent split of its traffic;
        // sharing is turned on afterwards, for the rest of this group.
        let first = new_udp(asked)?;
        first.bind(&asked.into())?;
        let mut sockets = vec![OwnedFd::from(first)];
        let deal = Deal::from(0, fixed, shared);
        // Two at least, also where one thread needs but one: there can be no other later that gets nothing meanwhile.
        let steered = add_to(&mut sockets, wanted.max(2)).and_then(|()| steer(&own(&sockets, 0)?[0], deal, None));
        let group = match steered {
            Ok(()) => {
                let group = UdpGroup { sockets: own(&sockets, 0)?, alone: None };
                self.held.push(Port { carries, asked, sockets, deal: Some(deal), before: None });
                group
            }
            Err(error) => {
                sockets.truncate(1);
                let one = UdpSocket::from(sockets[0].try_clone()?);
                self.held.push(Port { carries, asked, sockets, deal: None, before: None });
                UdpGroup { sockets: vec![one], alone: (wanted > 1).then_some(error) }
            }
        };
        Ok(group)
    }

    /// From now on, what is aimed at index 0 comes here; all else still goes to the process before.
    ///
    /// # Errors
    /// Of the system.
    pub fn take_fixed(&self) -> io::Result<()> {
        self.steer(|own, theirs| match theirs {
            Some(theirs) => Deal { shared: theirs.shared, shared_at: theirs.shared_at, ..own },
            None => own,
        })
    }

    /// From now on, everything comes here but what belongs to connections of the process before.
    ///
    /// # Errors
    /// Of the system.
    pub fn take_all(&self) -> io::Result<()> {
        self.steer(|own, _| own)
    }

    /// The process before is gone: what is still sent to its connections comes here, where it can be told so.
    ///
    /// # Errors
    /// Of the system.
    pub fn forget_the_one_before(&mut self) -> io::Result<()> {
        self.before = None;
        self.take_all()
    }

    /// Lets go of what the process before had and this one has not taken over.
    pub fn leave_the_rest(&mut self) {
        if let Some(before) = &mut self.before {
            before.ports.clear();
        }
    }

    /// Lets go of all but QUIC's, so that each is closed with the last that is served.
    pub fn close_listeners(&mut self) {
        self.held.retain(|port| port.carries == Carries::Quic);
        self.before = None;
    }

    fn steer(&self, deal: impl Fn(Deal, Option<Deal>) -> Deal) -> io::Result<()> {
        for port in &self.held {
            let Some(own) = port.deal else { continue };
            let before = self.before.as_ref().and_then(|before| Some((before.mark, port.before?)));
            let socket = UdpSocket::from(port.sockets[0].try_clone()?);
            steer(&socket, deal(own, before.map(|(_, theirs)| theirs)), before)?;
        }
        Ok(())
    }

    fn inherit(&mut self, carries: Carries, asked: SocketAddr) -> Option<Port> {
        let ports = &mut self.before.as_mut()?.ports;
        let at = ports.iter().position(|port| port.carries == carries && port.asked == asked)?;
        Some(ports.remove(at))
    }
}

/// Adds sockets to a port until there are so many.
fn add_to(sockets: &mut Vec<OwnedFd>, count: usize) -> io::Result<()> {
    let first = SockRef::from(&sockets[0]);
    let bound = first.local_addr()?;
    let addr = bound.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    first.set_reuse_port(true)?;
    let more = count.saturating_sub(sockets.len());
    for _ in 0..more {
        let socket = new_udp(addr)?;
        socket.set_reuse_port(true)?;
        socket.bind(&bound)?;
        sockets.push(socket.into());
    }
    Ok(())
}

fn bind_tcp(addr: SocketAddr, count: usize) -> io::Result<Vec<OwnedFd>> {
    let first = new_tcp(addr)?;
    first.bind(&addr.into())?;
    first.set_reuse_port(count > 1)?;
    first.listen(BACKLOG)?;
    let bound = first.local_addr()?;
    let mut listeners = vec![OwnedFd::from(first)];
    for _ in 1..count {
        let socket = new_tcp(addr)?;
        socket.set_reuse_port(true)?;
        socket.bind(&bound)?;
        socket.listen(BACKLOG)?;
        listeners.push(socket.into());
    }
    Ok(listeners)
}

/// A socket for each of those addresses, on the port of `shared`, that gets what they send; all else goes on to `shared`, and so
/// to whichever process has it. Addresses for which there is none are left out.
///
/// # Errors
/// If there cannot be any.
pub fn connected(
    shared: &UdpSocket,
    to: impl Iterator<Item = SocketAddr>,
) -> io::Result<impl Iterator<Item = (SocketAddr, UdpSocket)>> {
    let port = shared.local_addr()?;
    SockRef::from(shared).set_reuse_port(true)?;
    let beside = move || -> io::Result<Socket> {
        let socket = new_udp(port)?;
        socket.set_reuse_port(true)?;
        socket.bind(&port.into())?;
        Ok(socket)
    };
    // The kernel steers among two sockets at least. Whoever is not connected yet gets nothing.
    let second = beside()?;
    all_to_the_first(shared)?;
    let connect = move |addr: SocketAddr| {
        let _keep = &second;
        let socket = beside().and_then(|socket| socket.connect(&addr.into()).map(|()| socket));
        match socket {
            Ok(socket) => Some((addr, socket.into())),
            Err(error) => {
                tracing::debug!(%addr, %error, "no socket for a flow of its own");
                None
            }
        }
    };
    Ok(to.filter_map(connect))
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

#[cfg(test)]
mod tests {
    use quinn::ConnectionIdGenerator;

    use super::*;

    fn localhost() -> SocketAddr {
        ([127, 0, 0, 1], 0).into()
    }

    /// A packet for a connection id, with a long header or a short one.
    fn packet(id: &[u8], is_long: bool) -> Vec<u8> {
        let header: &[u8] = if is_long { &[0xc0, 0, 0, 0, 1, 8] } else { &[0x40] };
        [header, id, &[9, 9]].concat()
    }

    /// Which of the sockets it comes to that is sent to their port with that connection id.
    fn arrives(sockets: &[&UdpSocket], id: &[u8]) -> [usize; 2] {
        let to = sockets[0].local_addr().unwrap();
        [true, false].map(|is_long| {
            // A sender of its own for each packet: by address hash they would scatter.
            UdpSocket::bind("127.0.0.1:0").unwrap().send_to(&packet(id, is_long), to).unwrap();
            loop {
                let got = sockets.iter().position(|socket| socket.recv_from(&mut [0; 32]).is_ok());
                match got {
                    Some(index) => return index,
                    None => std::thread::yield_now(),
                }
            }
        })
    }

    fn of(groups: &[&UdpGroup]) -> Vec<UdpSocket> {
        groups.iter().flat_map(|group| &group.sockets).map(|socket| socket.try_clone().unwrap()).collect()
    }

    /// What the next process has, as it would come over a socket.
    fn next(ports: &Ports) -> Ports {
        let (left, descriptors) = ports.left();
        let told = serde_json::from_slice(&serde_json::to_vec(&left).unwrap()).unwrap();
        let descriptors = descriptors.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        Ports::of_another(told, descriptors).unwrap()
    }

    #[test]
    fn packets_go_to_the_socket_that_their_connection_id_names() {
        let mut ports = Ports::default();
        let group = ports.quic(localhost(), 1, 2).unwrap();
        assert_eq!(group.sockets.len(), 3);
        let sockets: Vec<_> = group.sockets.iter().collect();
        for (first, index) in [(0, 0), (1, 1), (2, 2), (3, 1), (200, 2), (255, 1)] {
            assert_eq!(arrives(&sockets, &aimed_at(first)), [index; 2], "{first}");
            assert_eq!(arrives(&sockets, &ports.owned_by(first).generate_cid()), [index; 2], "{first}");
        }
        let public = ports.quic(([127, 0, 0, 2], 0).into(), 0, 3).unwrap();
        let sockets: Vec<_> = public.sockets.iter().collect();
        for (first, index) in [(0, 0), (1, 1), (2, 2), (3, 0), (255, 0)] {
            assert_eq!(arrives(&sockets, &aimed_at(first)), [index; 2], "{first}");
        }
    }

    #[test]
    fn connections_stay_with_the_process_that_has_them_and_new_ones_go_to_the_next() {
        let mut first = Ports::default();
        let one = first.quic(localhost(), 1, 1).unwrap();
        first.make_room().unwrap();
        // One that comes to nothing leaves no trace.
        let failed = next(&first).quic(localhost(), 1, 1).unwrap();
        let mut second = next(&first);
        let two = second.quic(localhost(), 1, 2).unwrap();
        drop(failed);
        let sockets = of(&[&one, &two]);
        let sockets: Vec<_> = sockets.iter().collect();
        let to = |id: quinn::ConnectionId| arrives(&sockets, &id);
        assert_eq!((to(aimed_at(0)), to(aimed_at(1))), ([0; 2], [1; 2]), "nothing is taken yet");
        second.take_fixed().unwrap();
        assert_eq!((to(aimed_at(0)), to(aimed_at(2))), ([2; 2], [1; 2]));
        assert_eq!((to(first.owned_by(0).generate_cid()), to(second.owned_by(0).generate_cid())), ([0; 2], [2; 2]));
        first.take_all().unwrap();
        assert_eq!((to(aimed_at(0)), to(aimed_at(2))), ([0; 2], [1; 2]), "it can be taken back");
        second.take_all().unwrap();
        for index in 0..3 {
            let place = usize::from(index);
            assert_eq!(to(aimed_at(index)), [2 + place; 2]);
            assert_eq!(to(second.owned_by(index).generate_cid()), [2 + place; 2]);
            assert_eq!(to(first.owned_by(index).generate_cid()), [place.min(1); 2]);
        }
        // The third has the sockets of the first, as far as they do, and the fourth those of the second.
        let old = first.owned_by(0).generate_cid();
        drop((first, one));
        second.forget_the_one_before().unwrap();
        let sockets = of(&[&two]);
        let sockets: Vec<_> = sockets.iter().collect();
        assert_eq!(arrives(&sockets, &old), [0; 2], "who is gone cannot say so");
        let mut third = next(&second);
        let three = third.quic(localhost(), 1, 1).unwrap();
        third.take_all().unwrap();
        let sockets = of(&[&two, &three]);
        let sockets: Vec<_> = sockets.iter().collect();
        assert_eq!(arrives(&sockets, &second.owned_by(2).generate_cid()), [2; 2]);
        assert_eq!(arrives(&sockets, &aimed_at(1)), [4; 2]);
        assert_eq!(third.held[0].sockets.len(), 5, "no socket was added");
    }

    #[test]
    fn a_flow_that_has_a_socket_gets_its_packets_there_and_others_go_to_the_shared_one() {
        let mut ports = Ports::default();
        let shared = ports.udp(localhost()).unwrap();
        let to = shared.local_addr().unwrap();
        let clients: Vec<_> = (0..20).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let known = clients[..10].iter().map(|client| client.local_addr().unwrap());
        let own: Vec<_> = connected(&shared, known).unwrap().collect();
        for _ in 0..5 {
            for client in &clients {
                client.send_to(b"packet", to).unwrap();
            }
        }
        let packets = |socket: &UdpSocket| {
            std::iter::from_fn(|| socket.recv_from(&mut [0; 8]).ok().map(|(_, from)| from)).collect::<Vec<_>>()
        };
        for (addr, socket) in own {
            assert_eq!(packets(&socket), [addr; 5]);
        }
        assert_eq!(packets(&shared).len(), 50);
    }

    #[test]
    fn a_port_in_use_is_an_error() {
        let mut ports = Ports::default();
        let group = ports.quic(localhost(), 1, 1).unwrap();
        let error = ports.quic(group.sockets[0].local_addr().unwrap(), 1, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let listeners = ports.tcp(localhost(), 3).unwrap();
        for count in [1, 3] {
            let error = ports.tcp(listeners[0].local_addr().unwrap(), count).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }

    #[test]
    fn every_listener_of_a_port_gets_connections_and_none_is_lost_with_its_process() {
        let mut first = Ports::default();
        let listeners = first.tcp(localhost(), 2).unwrap();
        let to = listeners[0].local_addr().unwrap();
        let _clients: Vec<_> = (0..64).map(|_| std::net::TcpStream::connect(to).unwrap()).collect();
        for listener in &listeners {
            assert!(listener.accept().is_ok());
        }
        let mut second = next(&first);
        let taken = second.tcp(localhost(), 3).unwrap();
        assert_eq!(taken.len(), 3, "one for each thread");
        drop((first, listeners));
        let waiting = taken.iter().map(|listener| std::iter::from_fn(|| listener.accept().ok()).count()).sum::<usize>();
        assert_eq!(waiting, 62);
    }
}
