use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use starling_protocol::{MemberHealth, Name, NodeId, NodeRecord, Protocol};

/// The mesh at one moment, as the data plane and the admin API read it. Immutable; a change makes a new one.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Everybody known, this node included, by name.
    pub members: Vec<MemberView>,
    services: HashMap<Name, Vec<Arc<Instance>>>,
}

impl Snapshot {
    pub(crate) fn new(members: Vec<MemberView>) -> Self {
        let mut services: HashMap<Name, Vec<Arc<Instance>>> = HashMap::new();
        for member in &members {
            let Some(record) = &member.record else { continue };
            for service in &record.services {
                // A service stays known when its last instance is gone: "nobody serves it now" is not "no such service".
                let instances = services.entry(service.name.clone()).or_default();
                if member.takes_calls() && service.state == starling_protocol::ServiceState::Up && service.weight > 0 {
                    instances.push(Arc::new(Instance {
                        node: member.id,
                        generation: record.generation,
                        node_name: record.name.clone(),
                        addr: member.addr,
                        zone: record.zone.clone(),
                        version: service.version.clone(),
                        protocol: service.protocol,
                        weight: service.weight,
                    }));
                }
            }
        }
        Self { members, services }
    }

    /// Instances that can be called now; `None` when no member, alive or dead, has ever announced the service.
    pub fn instances(&self, service: &Name) -> Option<&[Arc<Instance>]> {
        self.services.get(service).map(Vec::as_slice)
    }

    /// The member with that id.
    pub fn member(&self, id: &NodeId) -> Option<&MemberView> {
        self.members.iter().find(|member| member.id == *id)
    }

    /// This node.
    pub fn me(&self) -> Option<&MemberView> {
        self.members.iter().find(|member| member.is_self)
    }
}

/// A member as this node sees it.
#[derive(Debug, Clone)]
pub struct MemberView {
    /// Who.
    pub id: NodeId,
    /// Where its mesh port answers.
    pub addr: SocketAddr,
    /// Which life of it.
    pub generation: u64,
    /// Which refutation within that life.
    pub incarnation: u16,
    /// SWIM's judgement.
    pub health: MemberHealth,
    /// Whether it said good-bye in this life; then `health` is no failure.
    pub left: bool,
    /// Since when health or `left` are what they are, unix seconds.
    pub since: u64,
    /// Whether this is the observing node itself.
    pub is_self: bool,
    /// What it says about itself; absent until its record arrived.
    pub record: Option<Arc<NodeRecord>>,
}

impl MemberView {
    /// Whether new calls may go to it.
    pub fn takes_calls(&self) -> bool {
        self.is_live() && self.record.as_ref().is_some_and(|r| r.phase == starling_protocol::Phase::Up)
    }

    /// Whether it is in the mesh: alive or merely suspected.
    pub fn is_live(&self) -> bool {
        self.health != MemberHealth::Down && !self.left
    }
}

/// One callable instance of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// The node in front of it.
    pub node: NodeId,
    /// Which life of that node: a connection to an earlier one is stale.
    pub generation: u64,
    /// The node's name.
    pub node_name: Name,
    /// The node's mesh address.
    pub addr: SocketAddr,
    /// The node's zone.
    pub zone: String,
    /// API version, empty if not told.
    pub version: String,
    /// How its node speaks to it.
    pub protocol: Protocol,
    /// Share of calls; 100 is normal.
    pub weight: u16,
}
