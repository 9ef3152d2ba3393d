//! The lab: a network namespace for each node with one TUN device, and a switch that holds all of them.
//!
//! Packets of all protocols pass through the switch, which looks up what becomes of them in the table. Without it there is no
//! way between two namespaces.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, RwLock},
    time::Instant,
};

use anyhow::{Context, Result};
use tun_rs::{AsyncDevice, DeviceBuilder, SyncDevice};

use super::{
    Slot,
    namespace::{Namespace, Place, ip},
    packet,
    table::{Packet, Passage, Table},
    waiting::Waiting,
};

const MTU: u16 = 1500;
/// Packets that a device holds for the switch: a burst must not get lost where nobody counts.
const DEVICE_QUEUE: u32 = 10_000;
const DEVICE: &str = "mesh0";

type Parcel = (Slot, Vec<u8>);

pub(crate) struct Lab {
    places: Vec<Place>,
    /// The number in the address of each slot; they can change hands.
    numbers: Arc<RwLock<Vec<usize>>>,
    waiting: Arc<Waiting<Parcel>>,
}

/// The address with that number.
fn numbered(number: usize) -> Ipv4Addr {
    let [high, low] = u16::try_from(number + 1).unwrap_or(u16::MAX).to_be_bytes();
    Ipv4Addr::new(10, 77, high, low)
}

impl Lab {
    /// Whether this system has what a lab needs; if not, why, and what to do.
    pub(crate) fn check() -> Result<(), String> {
        std::thread::scope(|scope| {
            let tried = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                    .map_err(|e| format!("no network namespace can be made ({e})"))?;
                ip(&["link", "set", "lo", "up"]).map_err(|e| format!("{e:#}"))?;
                device(numbered(0)).map(drop).map_err(|e| format!("no TUN device can be made ({e:#})"))
            });
            tried.join().unwrap_or_else(|_| Err("the check ended early".into()))
        })
    }

    pub(super) fn start(slots: usize, table: Arc<Mutex<Table>>) -> Result<Self> {
        let mut places = Vec::new();
        let mut devices = Vec::new();
        for slot in 0..slots {
            let namespace = Place::Namespace(Arc::new(Namespace::new(&format!("net-{slot}"))?));
            devices.push(namespace.within(move || device(numbered(slot)))?);
            places.push(namespace);
        }
        let numbers = Arc::new(RwLock::new((0..slots).collect::<Vec<_>>()));
        let waiting = Arc::new(Waiting::new());
        let (numbered, parcels) = (numbers.clone(), waiting.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("switch".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match runtime.context("no runtime for the switch") {
                Ok(runtime) => runtime.block_on(switch(devices, table, numbered, parcels, ready)),
                Err(error) => drop(ready.send(Err(error))),
            }
        })?;
        is_ready.recv().context("the switch has ended")??;
        Ok(Self { places, numbers, waiting })
    }

    pub(super) fn place(&self, slot: Slot) -> Place {
        self.places[slot].clone()
    }

    pub(super) fn address(&self, slot: Slot) -> Ipv4Addr {
        numbered(self.numbers.read().unwrap_or_else(|e| e.into_inner())[slot])
    }

    pub(super) fn release(&self) {
        self.waiting.release();
    }

    pub(super) fn swap(&self, a: Slot, b: Slot) -> Result<()> {
        let (of_a, of_b) = (self.address(a), self.address(b));
        for (slot, old, new) in [(a, of_a, of_b), (b, of_b, of_a)] {
            let (old, new) = (format!("{old}/16"), format!("{new}/16"));
            self.places[slot].within(move || {
                ip(&["addr", "del", &old, "dev", DEVICE])?;
                ip(&["addr", "add", &new, "dev", DEVICE])
            })?;
        }
        self.numbers.write().unwrap_or_else(|e| e.into_inner()).swap(a, b);
        Ok(())
    }
}

/// A TUN device in the namespace of the calling thread, up, with that address and a way to all the others.
fn device(address: Ipv4Addr) -> Result<SyncDevice> {
    let device = DeviceBuilder::new().name(DEVICE).mtu(MTU).tx_queue_len(DEVICE_QUEUE).build_sync()?;
    ip(&["addr", "add", &format!("{address}/16"), "dev", DEVICE])?;
    ip(&["link", "set", DEVICE, "up"])?;
    Ok(device)
}

async fn switch(
    devices: Vec<SyncDevice>,
    table: Arc<Mutex<Table>>,
    numbers: Arc<RwLock<Vec<usize>>>,
    waiting: Arc<Waiting<Parcel>>,
    ready: std::sync::mpsc::Sender<Result<()>>,
) {
    // A device serves as long as its switch reads it: there is no other end.
    let devices: Result<Vec<Arc<AsyncDevice>>, _> =
        devices.into_iter().map(|device| AsyncDevice::new(device).map(Arc::new)).collect();
    let devices = match devices {
        Ok(devices) => devices,
        Err(error) => return drop(ready.send(Err(error.into()))),
    };
    let _ = ready.send(Ok(()));
    let bindings = Arc::new(Bindings::default());
    let mut tasks = tokio::task::JoinSet::new();
    for (from, device) in devices.iter().cloned().enumerate() {
        let (devices, table, numbers, waiting) = (devices.clone(), table.clone(), numbers.clone(), waiting.clone());
        let bindings = bindings.clone();
        tasks.spawn(async move {
            let mut buffer = vec![0; usize::from(MTU) + 64];
            while let Ok(length) = device.recv(&mut buffer).await {
                let bytes = &mut buffer[..length];
                let Some((_, to)) = packet::addresses(bytes) else { continue };
                let Some(to) = slot_of(to, &numbers) else { continue };
                let now = Instant::now();
                if !bindings.translate(bytes, from, to, &table, now) {
                    continue;
                }
                let bytes = &buffer[..length];
                let packet = Packet { from, to, bytes: length, udp: packet::udp_payload(bytes) };
                let passages = table.lock().unwrap_or_else(|e| e.into_inner()).pass(packet, now);
                for passage in passages {
                    if passage == Passage::default() {
                        let _ = devices[to].send(bytes).await;
                        continue;
                    }
                    let mut copy = bytes.to_vec();
                    if passage.corrupt {
                        packet::corrupt(&mut copy);
                    }
                    match passage.held {
                        true => waiting.hold((to, copy)),
                        false => waiting.push(now + passage.after, (to, copy)),
                    }
                }
            }
        });
    }
    tasks.spawn(async move {
        loop {
            let (to, bytes) = waiting.next().await;
            let _ = devices[to].send(&bytes).await;
        }
    });
    while tasks.join_next().await.is_some() {}
}

/// Source ports that a NAT gives to what its nodes have dialled. It keeps no other ports: those that are listened on are
/// forwarded.
#[derive(Default)]
struct Bindings(Mutex<BindingTable>);

#[derive(Default)]
struct BindingTable {
    next: u16,
    /// By slot, own port, and how often it changed.
    given: HashMap<(Slot, u16, u64), u16>,
    /// By slot and given port.
    own: HashMap<(Slot, u16), (u16, u64)>,
}

/// Where systems take ports for what is dialled (ip_local_port_range).
const FIRST_EPHEMERAL: u16 = 32_768;
/// What the NAT gives, from here on down to the former.
const GIVEN: u16 = 20_000;

impl Bindings {
    /// Gives a packet the ports that the NATs on its way give it. Whether it gets through.
    fn translate(&self, bytes: &mut [u8], from: Slot, to: Slot, table: &Mutex<Table>, now: Instant) -> bool {
        let Some((source, target)) = packet::udp_ports(bytes) else { return true };
        let (out, back) = {
            let table = table.lock().unwrap_or_else(|e| e.into_inner());
            (table.binding(from, now), table.binding(to, now))
        };
        if out == 0 && back == 0 {
            return true;
        }
        let mut bindings = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let (mut new_source, mut new_target) = (source, target);
        if out > 0 && source >= FIRST_EPHEMERAL {
            let BindingTable { next, given, own } = &mut *bindings;
            new_source = *given.entry((from, source, out)).or_insert_with(|| {
                *next = (*next + 1) % (FIRST_EPHEMERAL - GIVEN);
                own.insert((from, GIVEN + *next), (source, out));
                GIVEN + *next
            });
        }
        if back > 0 && target != starling_protocol::MESH_PORT {
            match bindings.own.get(&(to, target)) {
                Some((port, binding)) if *binding == back => new_target = *port,
                // A port that was given before, or the node's own: the NAT does not know it.
                Some(_) => return false,
                None if target >= FIRST_EPHEMERAL => return false,
                None => {}
            }
        }
        if (new_source, new_target) != (source, target) {
            packet::set_udp_ports(bytes, new_source, new_target);
        }
        true
    }
}

fn slot_of(address: Ipv4Addr, numbers: &RwLock<Vec<usize>>) -> Option<Slot> {
    let [10, 77, high, low] = address.octets() else { return None };
    let number = usize::from(u16::from_be_bytes([high, low])).checked_sub(1)?;
    let numbers = numbers.read().unwrap_or_else(|e| e.into_inner());
    // Addresses hardly ever change hands.
    match numbers.get(number) {
        Some(same) if *same == number => Some(number),
        _ => numbers.iter().position(|n| *n == number),
    }
}
