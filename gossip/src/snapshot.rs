use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use starling_protocol::{MAX_WEIGHT, MemberHealth, Name, NodeId, NodeRecord, Phase, Protocol};

use crate::{Ident, records::Records};

/// Most instances of one version of a service that a node calls. Each node has its own lot of them, always the same, so
/// that connections stay few and load is spread all the same.
pub const SUBSET: usize = 100;
/// Fewest instances of which a sudden loss is taken for our own fault.
const MIN_PANIC: usize = 3;
/// How long the last known instances are called after a sudden loss; if they are still gone then, it is true.
const PANIC_HOLD: Duration = Duration::from_secs(30);

/// The mesh at one moment, as the data plane and the admin API read it. Immutable; a change makes a new one.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Everybody known, this node included, by name.
    pub members: Vec<MemberView>,
    /// Services most of whose instances vanished at once: the last known ones are still called, because the fault may be
    /// on this side.
    pub panicking: Vec<Name>,
    /// Whether a member has told this node all that it knows. Until then, what is missing here says nothing.
    pub introduced: bool,
    services: HashMap<Name, Vec<Arc<Instance>>>,
}

impl Snapshot {
    /// Instances that can be called now; `None` when no member, alive or dead, has ever announced the service. At most
    /// [`SUBSET`] of each version.
    pub fn instances(&self, service: &Name) -> Option<&[Arc<Instance>]> {
        self.services.get(service).map(Vec::as_slice)
    }

    /// The member with that id.
    pub fn member(&self, id: &NodeId) -> Option<&MemberView> {
        self.members.iter().find(|member| member.id == *id)
    }

    /// The member with that name; a live one if there are several.
    pub fn named(&self, name: &str) -> Option<&MemberView> {
        let named = || self.members.iter().filter(|m| m.record.as_ref().is_some_and(|r| r.name.as_str() == name));
        named().find(|member| member.is_live()).or_else(|| named().max_by_key(|member| member.generation))
    }

    /// The dead one of that name: of several namesakes, the one to be struck off.
    pub fn dead_named(&self, name: &str) -> Option<&MemberView> {
        let named = self.members.iter().filter(|m| m.record.as_ref().is_some_and(|r| r.name.as_str() == name));
        named.filter(|member| !member.is_live()).max_by_key(|member| member.generation)
    }

    /// Whether another member lives under the name of this one, which is dead: a machine that was replaced.
    pub fn is_superseded(&self, dead: &MemberView) -> bool {
        let Some(record) = dead.record.as_ref().filter(|_| !dead.is_live()) else { return false };
        self.members
            .iter()
            .any(|m| m.id != dead.id && m.is_live() && m.record.as_ref().is_some_and(|r| r.name == record.name))
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
    /// SWIM's judgement. A suspicion shows only when this node shares it or two others do: one node's word may say more
    /// about that node.
    pub health: MemberHealth,
    /// Who could not reach it, if it is suspected.
    pub suspected_by: Vec<NodeId>,
    /// Whether it said good-bye in this life, or an operator struck it off; then `health` is no failure.
    pub left: bool,
    /// Whether others hold it for dead and this node, which has never heard it, is about to find out. Not called until then.
    pub unheard: bool,
    /// Since when health or `left` are what they are, unix seconds.
    pub since: u64,
    /// Whether this is the observing node itself.
    pub is_self: bool,
    /// Where another node runs with its key, if one does: a copied state directory.
    pub also_at: Option<SocketAddr>,
    /// What it says about itself; absent until its record arrived.
    pub record: Option<Arc<NodeRecord>>,
}

impl MemberView {
    /// Whether new calls may go to it.
    pub fn takes_calls(&self) -> bool {
        self.is_live() && !self.unheard && self.record.as_ref().is_some_and(|r| r.phase == Phase::Up)
    }

    /// Whether it is in the mesh: alive or merely suspected.
    pub fn is_live(&self) -> bool {
        self.health != MemberHealth::Down && !self.left
    }

    /// It, in this life of it.
    pub fn ident(&self) -> Ident {
        Ident { id: self.id, addr: self.addr, generation: self.generation }
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
    /// The service.
    pub service: Name,
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

impl Instance {
    /// Those that a record offers.
    pub(crate) fn all_of(record: &NodeRecord) -> impl Iterator<Item = Arc<Self>> {
        let offered = record.services.iter().filter(|service| record.speaks.fits() && service.is_callable());
        offered.map(|service| {
            Arc::new(Self {
                node: record.id,
                generation: record.generation,
                node_name: record.name.clone(),
                service: service.name.clone(),
                addr: record.addr,
                zone: record.zone.clone(),
                version: service.version.clone(),
                protocol: service.protocol,
                weight: service.weight.min(MAX_WEIGHT),
            })
        })
    }
}

/// Makes snapshots. Remembers which instances there were, to notice when too many vanish at once.
#[derive(Debug)]
pub(crate) struct Photographer {
    /// Two probe periods: what vanishes within them vanishes at once.
    moment: Duration,
    last: Option<Instant>,
    services: HashMap<Name, Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Callable at the last snapshot.
    latest: Vec<Arc<Instance>>,
    /// Callable before the present burst of changes.
    before: Vec<Arc<Instance>>,
    panic_since: Option<Instant>,
}

impl Photographer {
    pub(crate) fn new(moment: Duration) -> Self {
        Self { moment, last: None, services: HashMap::new() }
    }

    /// When a snapshot is wanted though nothing changed: a panic is over.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.services.values().filter_map(|known| known.panic_since).min().map(|since| since + PANIC_HOLD)
    }

    /// The mesh now. `me` and `zone` are this node's.
    pub(crate) fn snapshot(
        &mut self,
        members: Vec<MemberView>,
        records: &Records,
        me: NodeId,
        zone: &str,
        now: Instant,
    ) -> Snapshot {
        let new_burst = self.last.is_none_or(|last| now.saturating_duration_since(last) > self.moment);
        self.last = Some(now);
        let dead: HashSet<NodeId> =
            members.iter().filter(|m| m.health == MemberHealth::Down && !m.left).map(|m| m.id).collect();
        let mut services: HashMap<Name, Vec<Arc<Instance>>> = HashMap::new();
        for member in &members {
            let Some(record) = &member.record else { continue };
            // A service stays known when its last instance is gone: "nobody serves it now" is not "no such service".
            for service in &record.services {
                if !services.contains_key(&service.name) {
                    services.insert(service.name.clone(), Vec::new());
                }
            }
            let callable = if member.takes_calls() { records.instances(&member.id) } else { &[] };
            for instance in callable {
                // In a new life it may have a new address, and its new record be still on its way.
                let instance = match instance.addr == member.addr {
                    true => instance.clone(),
                    false => Arc::new(Instance { addr: member.addr, ..Instance::clone(instance) }),
                };
                services.get_mut(&instance.service).expect("its record names it").push(instance);
            }
        }
        self.services.retain(|name, _| services.contains_key(name));
        let mut panicking = Vec::new();
        for (name, instances) in &mut services {
            let known = self.services.entry(name.clone()).or_default();
            if known.keep_lost(name, instances, &dead, new_burst, now) {
                panicking.push(name.clone());
            }
            *instances = subset(std::mem::take(instances), me, zone);
        }
        panicking.sort();
        Snapshot { members, panicking, introduced: false, services }
    }
}

impl Known {
    /// Adds the instances of nodes that died with more than half of the service within a moment. Whether it did.
    fn keep_lost(
        &mut self,
        service: &Name,
        instances: &mut Vec<Arc<Instance>>,
        dead: &HashSet<NodeId>,
        new_burst: bool,
        now: Instant,
    ) -> bool {
        if new_burst && self.panic_since.is_none() {
            self.before = std::mem::take(&mut self.latest);
        }
        self.latest = instances.clone();
        let lost = self.before.iter().filter(|i| dead.contains(&i.node));
        let lost: Vec<_> = lost.filter(|i| !instances.iter().any(|live| live.node == i.node)).cloned().collect();
        let sudden = self.before.len() >= MIN_PANIC && lost.len() * 2 > self.before.len();
        let over = self.panic_since.is_some_and(|since| now.saturating_duration_since(since) >= PANIC_HOLD);
        if !sudden || over {
            if self.panic_since.take().is_some() {
                self.before.clone_from(&self.latest);
            }
            return false;
        }
        if self.panic_since.is_none() {
            tracing::warn!(%service, lost = lost.len(), "most instances vanished at once; calling the last known, too");
            self.panic_since = Some(now);
        }
        instances.extend(lost);
        true
    }
}

/// This node's lot of the instances: of each version at most [`SUBSET`], those of its zone first, by rendezvous hashing
/// (Thaler, Ravishankar 1998), so that a change of the service changes little of the lot.
fn subset(instances: Vec<Arc<Instance>>, me: NodeId, zone: &str) -> Vec<Arc<Instance>> {
    if instances.len() <= SUBSET {
        return instances;
    }
    let mut by_version: BTreeMap<String, Vec<Arc<Instance>>> = BTreeMap::new();
    for instance in instances {
        by_version.entry(instance.version.clone()).or_default().push(instance);
    }
    by_version
        .into_values()
        .flat_map(|mut instances| {
            if instances.len() > SUBSET {
                let far = |instance: &Instance| zone.is_empty() || instance.zone != zone;
                instances.sort_by_cached_key(|instance| (far(instance), lot(me, instance.node)));
                instances.truncate(SUBSET);
            }
            instances
        })
        .collect()
}

/// A number that belongs to two nodes, the same on all of them.
fn lot(me: NodeId, other: NodeId) -> u64 {
    let digest = Sha256::new().chain_update(me.0).chain_update(other.0).finalize();
    u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use starling_protocol::{Capabilities, NodeKind, ServiceRecord, SignedRecord};

    use super::*;

    const MOMENT: Duration = Duration::from_secs(1);

    fn member(n: u16, health: MemberHealth) -> MemberView {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&n.to_be_bytes());
        let addr = ([127, 0, 0, 1], 1000 + n).into();
        let service = ServiceRecord::new("orders".parse().unwrap(), Protocol::Http1);
        let record = NodeRecord {
            id: NodeId(id),
            generation: 1,
            seq: 1,
            name: format!("n{n}").parse().unwrap(),
            addr,
            kind: NodeKind::Node,
            zone: if n.is_multiple_of(10) { "near".into() } else { "far".into() },
            services: vec![service],
            phase: Phase::Up,
            cert_expires: 0,
            issuer: None,
            speaks: Capabilities::own(""),
        };
        MemberView {
            id: NodeId(id),
            addr,
            generation: 1,
            incarnation: 0,
            health,
            suspected_by: vec![],
            left: false,
            unheard: false,
            since: 0,
            is_self: false,
            also_at: None,
            record: Some(Arc::new(record)),
        }
    }

    fn callable(snapshot: &Snapshot) -> usize {
        snapshot.instances(&"orders".parse().unwrap()).unwrap().len()
    }

    fn records_of(members: &[MemberView]) -> Records {
        let mut records = Records::default();
        for record in members.iter().filter_map(|member| member.record.clone()) {
            let signed = SignedRecord { body: Bytes::new(), signature: Bytes::new(), chain: Vec::new() };
            records.put(record, Arc::new(signed));
        }
        records
    }

    fn shoot(photographer: &mut Photographer, down: u16, now: Instant) -> Snapshot {
        let members = (0..4).map(|n| member(n, if n < down { MemberHealth::Down } else { MemberHealth::Alive }));
        let members: Vec<_> = members.collect();
        let records = records_of(&members);
        photographer.snapshot(members, &records, NodeId([9; 16]), "", now)
    }

    #[test]
    fn a_new_life_is_called_at_its_new_address() {
        let mut members = vec![member(0, MemberHealth::Alive)];
        let records = records_of(&members);
        let moved = ([127, 0, 0, 1], 9).into();
        members[0].addr = moved;
        let snapshot = Photographer::new(MOMENT).snapshot(members, &records, NodeId([9; 16]), "", Instant::now());
        assert_eq!(snapshot.instances(&"orders".parse().unwrap()).unwrap()[0].addr, moved);
    }

    #[test]
    fn when_most_vanish_at_once_the_last_known_are_kept_for_a_while() {
        let (mut photographer, start) = (Photographer::new(MOMENT), Instant::now());
        shoot(&mut photographer, 0, start);
        let half = shoot(&mut photographer, 2, start + 10 * MOMENT);
        assert_eq!((callable(&half), half.panicking.len()), (2, 0));
        let most = shoot(&mut photographer, 3, start + 10 * MOMENT + MOMENT / 2);
        assert_eq!((callable(&most), most.panicking.len()), (4, 1));
        let still = shoot(&mut photographer, 3, start + 20 * MOMENT);
        assert_eq!(callable(&still), 4);
        assert_eq!(photographer.next(), Some(start + 10 * MOMENT + MOMENT / 2 + PANIC_HOLD));
        let over = shoot(&mut photographer, 3, start + 10 * MOMENT + MOMENT / 2 + PANIC_HOLD);
        assert_eq!((callable(&over), over.panicking.len(), photographer.next()), (1, 0, None));
    }

    #[test]
    fn one_after_the_other_is_no_panic_and_recovery_ends_one() {
        let (mut photographer, start) = (Photographer::new(MOMENT), Instant::now());
        for down in 0..4 {
            let snapshot = shoot(&mut photographer, down, start + 10 * MOMENT * u32::from(down));
            assert_eq!(callable(&snapshot), 4 - usize::from(down));
        }
        let mut photographer = Photographer::new(MOMENT);
        shoot(&mut photographer, 0, start);
        assert_eq!(shoot(&mut photographer, 4, start + 5 * MOMENT).panicking.len(), 1);
        let back = shoot(&mut photographer, 1, start + 6 * MOMENT);
        assert_eq!((callable(&back), back.panicking.len()), (3, 0));
    }

    #[test]
    fn large_services_are_shared_out_evenly_and_stably() {
        let members: Vec<_> = (0..400).map(|n| member(n, MemberHealth::Alive)).collect();
        let lot = |me: u8, members: Vec<MemberView>, zone: &str| {
            let records = records_of(&members);
            let mut photographer = Photographer::new(MOMENT);
            let snapshot = photographer.snapshot(members, &records, NodeId([me; 16]), zone, Instant::now());
            snapshot.instances(&"orders".parse().unwrap()).unwrap().to_vec()
        };
        let mine = lot(1, members.clone(), "");
        assert_eq!(mine.len(), SUBSET);
        let other = lot(2, members.clone(), "");
        assert!(mine.iter().filter(|i| other.contains(i)).count() < 60);
        let fewer = lot(1, members[..399].to_vec(), "");
        assert!(mine.iter().filter(|i| fewer.contains(i)).count() >= SUBSET - 1);
        assert_eq!(lot(1, members, "near").iter().filter(|i| i.zone == "near").count(), 40);
    }
}
