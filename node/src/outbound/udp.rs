//! A port that carries UDP to a service: a tunnel for each address that packets come from.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use starling_http::{
    Drain, Guarded,
    tunnel::{self, Capsules, PacketReceiver, PacketSender, Protocol},
};
use starling_protocol::Name;
use tokio::{net::UdpSocket, sync::mpsc, task::JoinSet};

use super::{Complaints, Door};
use crate::{
    Carried,
    observe::{observer::Answered, packets::PacketCounts},
};

/// Addresses at a time. Each is a call, and a peer takes some thousands of those from here.
const MAX_FLOWS: usize = 1024;
/// Packets of one address that wait, while others are sent or its tunnel opens. More are dropped: so nobody has more room than others
/// on the way.
const WAITING: usize = 128;
/// Silence that ends a flow, if nobody sets it: twice as long as most would be answered.
const IDLE: Duration = Duration::from_secs(60);
/// After a tunnel that did not open, packets are dropped for so long.
const PAUSE: Duration = Duration::from_millis(250);
/// Longest packet, in bytes.
const MAX_PACKET_BYTES: usize = 64 << 10;

/// One port for one service.
pub(crate) struct UdpDoor {
    door: Door,
    service: Name,
    counts: Arc<PacketCounts>,
    complaints: Complaints,
}

impl UdpDoor {
    /// The port that `door` has for `service`.
    pub(crate) fn new(door: Door, service: Name, counts: Arc<PacketCounts>) -> Self {
        Self { door, service, counts, complaints: Complaints::default() }
    }

    /// Serves until the drain is over.
    pub(crate) async fn serve(self, socket: UdpSocket, drain: Drain) {
        let (door, socket) = (Arc::new(self), Arc::new(socket));
        // Ended with this.
        let mut tasks = JoinSet::new();
        let mut flows: HashMap<SocketAddr, mpsc::Sender<Bytes>> = HashMap::new();
        let mut packet = vec![0; MAX_PACKET_BYTES];
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut packet) => received,
                Some(_) = tasks.join_next() => continue,
                () = drain.closing() => return,
            };
            // That an answer came to nobody is told with an error, and says nothing about the next packet.
            let Ok((length, from)) = received else { continue };
            let mut packet = Bytes::copy_from_slice(&packet[..length]);
            if let Some(flow) = flows.get(&from) {
                match flow.try_send(packet) {
                    Ok(()) => continue,
                    Err(mpsc::error::TrySendError::Full(_)) => {
                        door.counts.dropped(1);
                        continue;
                    }
                    // It has ended for its silence, which is over.
                    Err(mpsc::error::TrySendError::Closed(kept)) => packet = kept,
                }
            }
            flows.retain(|_, flow| !flow.is_closed());
            if flows.len() >= MAX_FLOWS {
                door.fail(1, "as many addresses as there may be send packets");
                continue;
            }
            let (send, waiting) = mpsc::channel(WAITING);
            let _ = send.try_send(packet);
            flows.insert(from, send);
            let flow = Flow { door: door.clone(), socket: socket.clone(), from, waiting };
            tasks.spawn(flow.run());
        }
    }

    /// Counts packets that came to nothing, and says why now and then.
    fn fail(&self, packets: u64, why: &str) {
        self.counts.dropped(packets);
        self.complaints.tell(&self.service, why);
    }

    /// Opens a tunnel to an instance.
    async fn open(&self) -> Result<Tunnel, String> {
        let (capsules, upload) = Capsules::new();
        let protocol = Protocol(Protocol::UDP.into());
        let (parts, answer) = self.door.open_tunnel(&self.service, Some(protocol), upload).await?.into_parts();
        tunnel::packets(&parts.extensions, capsules, answer).ok_or_else(|| "the tunnel carries no packets".into())
    }
}

type Tunnel = (PacketSender, PacketReceiver<Guarded<Answered<Carried>>>);

/// What one address sends, and is sent.
struct Flow {
    door: Arc<UdpDoor>,
    socket: Arc<UdpSocket>,
    from: SocketAddr,
    waiting: mpsc::Receiver<Bytes>,
}

/// How a tunnel ended.
enum End {
    /// Nothing was said for long.
    Silent,
    /// At its other end: another one may take its place.
    Gone,
}

impl Flow {
    /// Carries packets until there are none for a while. Each time a tunnel ends, the next packet opens another one.
    async fn run(mut self) {
        let idle = self.door.door.limits.idle_timeout.unwrap_or(IDLE);
        while let Ok(Some(first)) = tokio::time::timeout(idle, self.waiting.recv()).await {
            match self.door.open().await {
                Ok(tunnel) => {
                    if let End::Silent = self.carry(first, tunnel, idle).await {
                        return;
                    }
                }
                Err(why) => {
                    tokio::time::sleep(PAUSE).await;
                    let waiting = self.waiting.len() as u64;
                    while self.waiting.try_recv().is_ok() {}
                    self.door.fail(1 + waiting, &why);
                }
            }
        }
    }

    async fn carry(&mut self, first: Bytes, (sender, mut receiver): Tunnel, idle: Duration) -> End {
        let Self { door, socket, from, waiting } = self;
        let moved = Moved::default();
        let questions = async {
            let mut next = Some(first);
            while let Some(packet) = next {
                door.counts.sent(sender.send(&packet).await);
                moved.now();
                next = waiting.recv().await;
            }
        };
        let answers = async {
            while let Some(packet) = receiver.receive().await {
                door.counts.came_out(socket.send_to(&packet, *from).await.is_ok());
                moved.now();
            }
        };
        tokio::select! {
            () = questions => End::Silent,
            () = answers => End::Gone,
            () = sender.closed() => End::Gone,
            () = moved.silent_for(idle) => End::Silent,
        }
    }
}

/// When a packet last went either way.
struct Moved(Mutex<Instant>);

impl Default for Moved {
    fn default() -> Self {
        Self(Mutex::new(Instant::now()))
    }
}

impl Moved {
    fn now(&self) {
        *self.lock() = Instant::now();
    }

    async fn silent_for(&self, limit: Duration) {
        loop {
            let due = *self.lock() + limit;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due.into()).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Instant> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A socket for such a port.
pub(crate) fn bind(addr: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(addr)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
