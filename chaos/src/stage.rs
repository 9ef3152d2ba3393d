//! Where a run happens: a place for each node, and the network between them, whose faults stand in one [`Table`].

mod lab;
mod namespace;
mod packet;
mod relay;
mod table;
mod waiting;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result};

pub(crate) use self::{
    lab::Lab,
    namespace::Place,
    table::{Count, Effect, Links, Rule, RuleId, Table},
};
use crate::plan::Backend;

/// A node's number in the network. The clients of public doors are one more.
pub(crate) type Slot = usize;

/// The network of a run.
pub(crate) struct Stage {
    table: Arc<Mutex<Table>>,
    network: Network,
}

enum Network {
    Lab(Lab),
    Relay(relay::Relay),
}

/// Where a node listens, and what it tells others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MeshAddress {
    pub(crate) listen: SocketAddr,
    pub(crate) advertise: SocketAddr,
}

impl Stage {
    /// A network for that many nodes, and one more slot for clients.
    pub(crate) fn new(backend: Backend, nodes: usize, seed: u64) -> Result<Self> {
        let table = Arc::new(Mutex::new(Table::new(nodes + 1, seed)));
        let network = match backend {
            Backend::Lab => Network::Lab(Lab::start(nodes + 1, table.clone()).context("the lab cannot be set up")?),
            _ => Network::Relay(relay::Relay::start(nodes, table.clone())?),
        };
        Ok(Self { table, network })
    }

    /// What is wrong with the network.
    pub(crate) fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Where the processes of a slot run.
    pub(crate) fn place(&self, slot: Slot) -> Place {
        match &self.network {
            Network::Lab(lab) => lab.place(slot),
            Network::Relay(_) => Place::Host,
        }
    }

    /// The mesh address of a slot.
    pub(crate) fn mesh(&self, slot: Slot) -> MeshAddress {
        match &self.network {
            Network::Lab(lab) => {
                let addr = SocketAddr::from((lab.address(slot), starling_protocol::MESH_PORT));
                MeshAddress { listen: addr, advertise: addr }
            }
            Network::Relay(relay) => relay.mesh(slot),
        }
    }

    /// A TCP address of a slot that others reach: its own in the lab, any free one elsewhere.
    pub(crate) fn public(&self, slot: Slot, port: u16) -> SocketAddr {
        match &self.network {
            Network::Lab(lab) => (lab.address(slot), port).into(),
            Network::Relay(_) => crate::free_port(),
        }
    }

    /// A loopback address of a slot: that port in the lab, any free one elsewhere.
    pub(crate) fn local(&self, port: u16) -> SocketAddr {
        match &self.network {
            Network::Lab(_) => ([127, 0, 0, 1], port).into(),
            Network::Relay(_) => crate::free_port(),
        }
    }

    /// Which process a slot's node is.
    pub(crate) fn runs(&self, slot: Slot, pid: u32) {
        if let Network::Relay(relay) = &self.network {
            relay.runs(slot, pid);
        }
    }

    /// Two slots' addresses change hands. The lab has to be told before their processes start again.
    pub(crate) fn swap(&self, a: Slot, b: Slot) -> Result<()> {
        match &self.network {
            Network::Lab(lab) => lab.swap(a, b),
            Network::Relay(relay) => {
                relay.swap(a, b);
                Ok(())
            }
        }
    }

    /// Packets that were held back go on their way at once.
    pub(crate) fn release(&self) {
        match &self.network {
            Network::Lab(lab) => lab.release(),
            Network::Relay(relay) => relay.release(),
        }
    }
}
