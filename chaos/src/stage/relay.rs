//! The relay: no privilege needed. In front of each node's mesh port stands a UDP socket, whose address the node tells others.
//!
//! Whose a packet is follows from its source: a node's mesh port is known, and for any other port the kernel's tables say
//! which process has it (proc(5)). What comes from a mesh port goes on from the socket that stands in front of the sender, so
//! that the receiver sees the address that it knows; any other source gets a socket of its own for each node it talks to.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, RwLock},
    time::Instant,
};

use anyhow::{Context, Result};
use tokio::net::UdpSocket;

use super::{
    MeshAddress, Slot,
    packet::corrupt_payload,
    table::{Packet, Passage, Table},
    waiting::Waiting,
};
use crate::free_port;

const LARGEST_BYTES: usize = 65_536;
/// Asked of the system for each socket: a burst must not get lost where nobody counts.
const BUFFER_BYTES: usize = 4 << 20;
/// IPv4 and UDP headers.
const HEADERS: usize = 28;

struct Parcel {
    via: Arc<UdpSocket>,
    to: SocketAddr,
    bytes: Vec<u8>,
}

/// The nodes' own addresses, by slot, and the other way round.
#[derive(Default)]
struct Ports {
    listen: Vec<SocketAddr>,
    slots: HashMap<SocketAddr, Slot>,
    /// The address behind each socket, which never changes.
    order: Vec<SocketAddr>,
    /// Processes of the nodes.
    pids: BTreeMap<Slot, u32>,
}

pub(super) struct Relay {
    advertise: Mutex<Vec<SocketAddr>>,
    /// Which socket stands in front of which node.
    ports: Arc<RwLock<Ports>>,
    waiting: Arc<Waiting<Parcel>>,
}

impl Relay {
    pub(super) fn start(nodes: usize, table: Arc<Mutex<Table>>) -> Result<Self> {
        let mut ports = Ports::default();
        let mut sockets = Vec::new();
        for slot in 0..nodes {
            let addr = free_port();
            ports.slots.insert(addr, slot);
            ports.listen.push(addr);
            ports.order.push(addr);
            let socket = std::net::UdpSocket::bind(free_port())?;
            socket.set_nonblocking(true)?;
            let raw = socket2::SockRef::from(&socket);
            let _ = raw.set_recv_buffer_size(BUFFER_BYTES);
            let _ = raw.set_send_buffer_size(BUFFER_BYTES);
            sockets.push(socket);
        }
        let advertise = sockets.iter().map(std::net::UdpSocket::local_addr).collect::<Result<_, _>>()?;
        let ports = Arc::new(RwLock::new(ports));
        let waiting = Arc::new(Waiting::new());
        let (known, parcels) = (ports.clone(), waiting.clone());
        std::thread::Builder::new().name("relay".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let carried = runtime.context("no runtime").and_then(|r| r.block_on(carry(sockets, table, known, parcels)));
            if let Err(error) = carried {
                eprintln!("chaos: the relay has ended: {error:#}");
            }
        })?;
        Ok(Self { advertise: Mutex::new(advertise), ports, waiting })
    }

    pub(super) fn mesh(&self, slot: Slot) -> MeshAddress {
        let listen = self.ports.read().unwrap_or_else(|e| e.into_inner()).listen[slot];
        let advertise = self.advertise.lock().unwrap_or_else(|e| e.into_inner())[slot];
        MeshAddress { listen, advertise }
    }

    pub(super) fn release(&self) {
        self.waiting.release();
    }

    /// Which process a node is.
    pub(super) fn runs(&self, slot: Slot, pid: u32) {
        self.ports.write().unwrap_or_else(|e| e.into_inner()).pids.insert(slot, pid);
    }

    /// Each of the two is behind the other's socket from now on, at the other's port.
    pub(super) fn swap(&self, a: Slot, b: Slot) {
        let mut ports = self.ports.write().unwrap_or_else(|e| e.into_inner());
        ports.listen.swap(a, b);
        let Ports { listen, slots, .. } = &mut *ports;
        *slots = listen.iter().enumerate().map(|(slot, addr)| (*addr, slot)).collect();
        self.advertise.lock().unwrap_or_else(|e| e.into_inner()).swap(a, b);
    }
}

/// All that a packet on its way needs.
struct Carrier {
    fronts: Vec<Arc<UdpSocket>>,
    table: Arc<Mutex<Table>>,
    ports: Arc<RwLock<Ports>>,
    waiting: Arc<Waiting<Parcel>>,
    ways: Mutex<HashMap<(SocketAddr, usize), Way>>,
}

/// How packets of a source that is no mesh port go on, and come back.
#[derive(Clone)]
struct Way {
    /// Whose it is; none of the nodes' if `None`, such as one of a node that is about to join and has no process yet.
    owner: Option<Slot>,
    socket: Arc<UdpSocket>,
    /// How often its port has changed: those of before lead nowhere any more.
    binding: u64,
}

/// More sources than that are nobody's.
const MOST_WAYS: usize = 16_384;

async fn carry(
    sockets: Vec<std::net::UdpSocket>,
    table: Arc<Mutex<Table>>,
    ports: Arc<RwLock<Ports>>,
    waiting: Arc<Waiting<Parcel>>,
) -> Result<()> {
    let fronts = sockets.into_iter().map(|s| UdpSocket::from_std(s).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    let carrier = Arc::new(Carrier { fronts, table, ports, waiting, ways: Mutex::default() });
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..carrier.fronts.len() {
        tasks.spawn(carrier.clone().front(at));
    }
    loop {
        let parcel = carrier.waiting.next().await;
        let _ = parcel.via.send_to(&parcel.bytes, parcel.to).await;
    }
}

impl Carrier {
    fn ports(&self) -> std::sync::RwLockReadGuard<'_, Ports> {
        self.ports.read().unwrap_or_else(|e| e.into_inner())
    }

    fn binding(&self, owner: Option<Slot>) -> u64 {
        let table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        owner.map_or(0, |owner| table.binding(owner, Instant::now()))
    }

    /// Carries what comes to the front socket of that number.
    async fn front(self: Arc<Self>, at: usize) {
        let mut buffer = vec![0; LARGEST_BYTES];
        loop {
            // A port that nobody listens on is told as an error here, and is nobody's end.
            let Ok((length, source)) = self.fronts[at].recv_from(&mut buffer).await else { continue };
            let (node, to, known) = {
                let ports = self.ports();
                let to = ports.slots.get(&ports.order[at]).copied();
                (ports.order[at], to, ports.slots.get(&source).and_then(|from| Some((*from, ports.front(*from)?))))
            };
            let Some(to) = to else { continue };
            let (from, via) = match known {
                Some((from, front)) => (Some(from), self.fronts[front].clone()),
                None => match self.way(source, at).await {
                    Some(way) => (way.owner, way.socket),
                    None => continue,
                },
            };
            self.pass(from, Some(to), &via, node, &buffer[..length]).await;
        }
    }

    /// The way of a source to a node, made if it is a new one.
    async fn way(self: &Arc<Self>, source: SocketAddr, at: usize) -> Option<Way> {
        let ways = || self.ways.lock().unwrap_or_else(|e| e.into_inner());
        let known = ways().get(&(source, at)).cloned();
        if let Some(way) = &known
            && self.binding(way.owner) == way.binding
        {
            return known;
        }
        let socket = Arc::new(UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.ok()?);
        let raw = socket2::SockRef::from(&*socket);
        let _ = raw.set_recv_buffer_size(BUFFER_BYTES);
        let owner = known.map_or_else(|| owner(source, &self.ports().pids), |way| way.owner);
        let way = Way { owner, socket, binding: self.binding(owner) };
        if ways().len() >= MOST_WAYS {
            return None;
        }
        ways().insert((source, at), way.clone());
        tokio::spawn(self.clone().back(way.clone(), source, at));
        Some(way)
    }

    /// Carries a node's answers back to the source, through the node's front.
    async fn back(self: Arc<Self>, way: Way, source: SocketAddr, at: usize) {
        let mut buffer = vec![0; LARGEST_BYTES];
        loop {
            let Ok((length, _)) = way.socket.recv_from(&mut buffer).await else { continue };
            if self.binding(way.owner) != way.binding {
                continue;
            }
            let from = {
                let ports = self.ports();
                ports.slots.get(&ports.order[at]).copied()
            };
            self.pass(from, way.owner, &self.fronts[at], source, &buffer[..length]).await;
        }
    }

    /// Does to a packet what the table says, and sends what is left of it. No fault touches those who are no nodes.
    async fn pass(&self, from: Option<Slot>, to: Option<Slot>, via: &Arc<UdpSocket>, addr: SocketAddr, bytes: &[u8]) {
        let now = Instant::now();
        let passages = match (from, to) {
            (Some(from), Some(to)) => {
                let packet = Packet { from, to, bytes: bytes.len() + HEADERS, udp: Some(bytes.len()) };
                self.table.lock().unwrap_or_else(|e| e.into_inner()).pass(packet, now)
            }
            _ => vec![Passage::default()],
        };
        for passage in passages {
            if passage == Passage::default() {
                let _ = via.send_to(bytes, addr).await;
                continue;
            }
            let mut bytes = bytes.to_vec();
            if passage.corrupt {
                corrupt_payload(&mut bytes);
            }
            let parcel = Parcel { via: via.clone(), to: addr, bytes };
            match passage.held {
                true => self.waiting.hold(parcel),
                false => self.waiting.push(now + passage.after, parcel),
            }
        }
    }
}

/// Whose process has that UDP port.
fn owner(source: SocketAddr, pids: &BTreeMap<Slot, u32>) -> Option<Slot> {
    let table = std::fs::read_to_string("/proc/net/udp").ok()?;
    let port = format!(":{:04X}", source.port());
    let inode = table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().filter(|local| local.ends_with(&port))?;
        fields.nth(7).map(|inode| format!("socket:[{inode}]"))
    })?;
    let has = |pid: &u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok().into_iter().flatten().flatten();
        files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|link| link.to_str() == Some(&inode))
    };
    pids.iter().find(|(_, pid)| has(pid)).map(|(slot, _)| *slot)
}

impl Ports {
    /// The socket in front of a slot.
    fn front(&self, slot: Slot) -> Option<usize> {
        self.order.iter().position(|addr| *addr == self.listen[slot])
    }
}
