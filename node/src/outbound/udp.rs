//! A port that carries UDP to a service: a tunnel for each address that packets come from.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use starling_http::{
    Drain, Guarded, shared_port,
    tunnel::{self, Capsules, PacketReceiver, PacketSender, Protocol},
};
use starling_protocol::Name;
use tokio::{net::UdpSocket, sync::mpsc, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};

use super::{Complaints, Door};
use crate::{
    Carried,
    observe::{observer::Answered, packets::PacketCounts},
};

/// Addresses at a time. Where there are more, the one that has been silent longest makes room.
const MAX_FLOWS: usize = 2048;
/// Packets of one address that wait, while others are sent or its tunnel opens, and their bytes. More are dropped: so nobody has more
/// room than others on the way.
const WAITING: usize = 128;
const WAITING_BYTES: usize = 256 << 10;
/// Silence that ends a flow, if nobody sets it: longer than most would wait for an answer.
const IDLE: Duration = Duration::from_secs(60);
/// The same of one that has sent a single packet: resolvers take a new port for each question.
const ASKED_ONCE: Duration = Duration::from_secs(10);
/// How long the end of a tunnel may take that is not needed any more.
const FAREWELL: Duration = Duration::from_secs(1);
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
    /// Whether another process has the port.
    is_settled: AtomicBool,
}

impl UdpDoor {
    /// The port that `door` has for `service`.
    pub(crate) fn new(door: Door, service: Name, counts: Arc<PacketCounts>) -> Self {
        Self { door, service, counts, complaints: Complaints::default(), is_settled: AtomicBool::new(false) }
    }

    /// Serves from `opening` on until the drain is over. Where another process goes on, it gets every packet of an address that has no
    /// flow here, from the moment that `unsettled` is dropped.
    pub(crate) async fn serve(
        self,
        socket: UdpSocket,
        drain: Drain,
        opening: CancellationToken,
        unsettled: TaskTrackerToken,
    ) {
        opening.cancelled().await;
        let (door, socket) = (Arc::new(self), Arc::new(socket));
        // Ended with this.
        let mut tasks = JoinSet::new();
        let mut flows: HashMap<SocketAddr, Entry> = HashMap::new();
        let mut packet = vec![0; MAX_PACKET_BYTES];
        loop {
            // Where the node itself goes away, flows go on to the last moment.
            let goes_away = drain.has_begun();
            if goes_away && !drain.has_begun_as_a_whole() {
                break;
            }
            let received = tokio::select! {
                received = socket.recv_from(&mut packet) => received,
                Some(_) = tasks.join_next() => continue,
                () = drain.draining(), if !goes_away => continue,
                () = drain.closing() => return,
            };
            let (length, from) = match received {
                Ok(received) => received,
                // That an answer came to nobody says nothing about the next packet.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(_) => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let packet = Bytes::copy_from_slice(&packet[..length]);
            // One that has ended for its silence begins anew.
            if let Some(flow) = flows.get(&from).filter(|flow| !flow.send.is_closed()) {
                if !flow.put(packet) {
                    door.counts.dropped(1);
                }
                continue;
            }
            flows.retain(|_, flow| !flow.send.is_closed());
            if flows.len() >= MAX_FLOWS
                && let Some(silent) = flows.iter().min_by_key(|(_, flow)| flow.moved.last()).map(|(from, _)| *from)
            {
                // Without its sender it ends.
                flows.remove(&silent);
            }
            let (send, waiting) = mpsc::channel(WAITING);
            let (moved, waiting_bytes) = (Arc::<Moved>::default(), Arc::<AtomicUsize>::default());
            let entry = Entry { send, waiting_bytes: waiting_bytes.clone(), moved: moved.clone() };
            entry.put(packet);
            flows.insert(from, entry);
            let flow = Flow { door: door.clone(), socket: socket.clone(), from, waiting, waiting_bytes, moved };
            tasks.spawn(flow.run());
        }
        settle(&socket, flows, &door.counts, &mut tasks);
        door.is_settled.store(true, Relaxed);
        let of = drain.clone();
        let finishing = drain.spawn(async move {
            tokio::select! {
                () = async { while tasks.join_next().await.is_some() {} } => {}
                () = of.closing() => {}
            }
        });
        drop(unsettled);
        let _ = finishing.await;
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

/// Gives each flow a socket of its own, so that another process can have the one that they share.
fn settle(
    shared: &UdpSocket,
    mut flows: HashMap<SocketAddr, Entry>,
    counts: &Arc<PacketCounts>,
    tasks: &mut JoinSet<()>,
) {
    flows.retain(|_, flow| !flow.send.is_closed());
    let addrs: Vec<_> = flows.keys().copied().collect();
    let own = socket2::SockRef::from(shared).try_clone().map(std::net::UdpSocket::from);
    let sockets = match own.and_then(|own| shared_port::connected(&own, addrs.into_iter()).map(Iterator::collect)) {
        Ok(sockets) => sockets,
        Err(error) => {
            tracing::warn!(%error, "flows of UDP go over to the new process, which opens tunnels of its own for them");
            Vec::new()
        }
    };
    for (from, socket) in sockets {
        if let (Some(flow), Ok(socket)) = (flows.remove(&from), UdpSocket::from_std(socket)) {
            tasks.spawn(flow.listen(socket, counts.clone()));
        }
    }
}

type Tunnel = (PacketSender, PacketReceiver<Guarded<Answered<Carried>>>);

/// A flow, as the port has it.
struct Entry {
    send: mpsc::Sender<Bytes>,
    /// Of the packets that wait.
    waiting_bytes: Arc<AtomicUsize>,
    moved: Arc<Moved>,
}

impl Entry {
    /// Takes what comes to a socket of its own, as long as the flow goes on.
    async fn listen(self, socket: UdpSocket, counts: Arc<PacketCounts>) {
        loop {
            let received = tokio::select! {
                received = tunnel::next_packet(&socket) => received,
                () = self.send.closed() => return,
            };
            match received {
                Ok(packet) => {
                    if !self.put(packet) {
                        counts.dropped(1);
                    }
                }
                // That an answer came to nobody says nothing about the next packet.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// Whether there was room for a packet.
    fn put(&self, packet: Bytes) -> bool {
        let length = packet.len();
        // Counted first: the flow may take it before this goes on, and counts it off then.
        let fits = self.waiting_bytes.fetch_add(length, Relaxed) + length <= WAITING_BYTES;
        let has_room = fits && self.send.try_send(packet).is_ok();
        if !has_room {
            self.waiting_bytes.fetch_sub(length, Relaxed);
        }
        has_room
    }
}

/// What one address sends, and is sent.
struct Flow {
    door: Arc<UdpDoor>,
    socket: Arc<UdpSocket>,
    from: SocketAddr,
    waiting: mpsc::Receiver<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
    moved: Arc<Moved>,
}

/// Why a flow's tunnel is over.
enum Over {
    /// Nothing was said for long, or the flow made room for another one.
    Silent,
    /// It has ended at its other end: another one may take its place.
    Gone,
}

impl Flow {
    /// Carries packets until there are none for a while. Each time a tunnel ends, the next packet opens another one, in the process
    /// that has the port then.
    async fn run(mut self) {
        let idle = self.door.door.limits.idle_timeout.unwrap_or(IDLE);
        while let Ok(Some(first)) = tokio::time::timeout(idle, self.next()).await {
            match self.door.open().await {
                Ok(tunnel) => {
                    if let Over::Silent = self.carry(first, tunnel, idle).await {
                        return;
                    }
                }
                Err(why) => {
                    tokio::time::sleep(PAUSE).await;
                    let mut dropped = 1;
                    while let Ok(packet) = self.waiting.try_recv() {
                        self.waiting_bytes.fetch_sub(packet.len(), Relaxed);
                        dropped += 1;
                    }
                    self.door.fail(dropped, &why);
                }
            }
            if self.door.is_settled.load(Relaxed) {
                return;
            }
        }
    }

    /// The next packet that waits. Cancel safe.
    async fn next(&mut self) -> Option<Bytes> {
        let packet = self.waiting.recv().await?;
        self.waiting_bytes.fetch_sub(packet.len(), Relaxed);
        Some(packet)
    }

    async fn carry(&mut self, first: Bytes, (sender, mut receiver): Tunnel, idle: Duration) -> Over {
        let (door, socket, moved, from) = (self.door.clone(), self.socket.clone(), self.moved.clone(), self.from);
        let over = {
            let questions = async {
                let mut next = Some(first);
                while let Some(packet) = next {
                    door.counts.sent(sender.send(&packet).await);
                    moved.asked();
                    next = self.next().await;
                }
            };
            let answers = async {
                while let Some(packet) = receiver.receive().await {
                    door.counts.came_out(socket.send_to(&packet, from).await.is_ok());
                    moved.now();
                }
            };
            tokio::select! {
                () = questions => Over::Silent,
                () = answers => Over::Gone,
                () = sender.closed() => Over::Gone,
                () = moved.silent_for(idle) => Over::Silent,
            }
        };
        if let Over::Silent = over {
            // Ended, and not broken off, of which the connection would have to remember each.
            drop(sender);
            let _ = tokio::time::timeout(FAREWELL, async { while receiver.receive().await.is_some() {} }).await;
        }
        over
    }
}

/// When a packet last went either way.
struct Moved(Mutex<State>);

struct State {
    last: Instant,
    /// Packets of the application, so far.
    asked: u64,
}

impl Default for Moved {
    fn default() -> Self {
        Self(Mutex::new(State { last: Instant::now(), asked: 0 }))
    }
}

impl Moved {
    fn now(&self) {
        self.lock().last = Instant::now();
    }

    fn asked(&self) {
        let mut state = self.lock();
        *state = State { last: Instant::now(), asked: state.asked + 1 };
    }

    fn last(&self) -> Instant {
        self.lock().last
    }

    async fn silent_for(&self, limit: Duration) {
        loop {
            let due = {
                let state = self.lock();
                state.last + if state.asked > 1 { limit } else { limit.min(ASKED_ONCE) }
            };
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due.into()).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}
