//! What a scenario does to the mesh.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use rand::RngExt;
use starling_gossip::{Announcement, Config, Gossip, Ident, Memory, Via};
use starling_protocol::{
    Capabilities, DocumentHash, Items, MeshDocument, NodeKind, Phase, Protocol, ServiceRecord, ServiceState,
    SignedDocument,
};

use super::{EPOCH, Event, World};
use crate::{
    credentials::{SimulatedKey, sign_document},
    invariants::Observer,
    network::Fault,
};

/// After a fault has ended, this long may pass before its victims are called healthy again: a suspicion that it caused may
/// still run its course.
const EXCUSE: Duration = Duration::from_secs(20);
/// Nodes that serve something in the very large meshes, where what each node remembers of services would fill the memory.
const FEW_SERVING: usize = 100;
const VERY_LARGE: usize = 1001;

/// One thing that is done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    Start(usize),
    Kill(usize),
    Pause(usize),
    Resume(usize),
    Begin(Fault),
    End(Fault),
    /// A node's service becomes unhealthy, or healthy again.
    Serve(usize, bool),
    Publish {
        by: usize,
        version: u64,
    },
    /// Somebody with no key of the mesh, or with another node's id, sends records and documents to a node.
    Forge(usize),
    Leave(usize),
    /// From the node's next start on, its clock is so many seconds ahead.
    Clock(usize, u64),
    /// A member with a valid key sends whatever might hurt others.
    Lie(usize),
}

impl World {
    pub(super) fn act(&mut self, action: Action) {
        if self.tells {
            eprintln!("{:9.3} s: {action:?} ({} events)", self.now.as_secs_f64(), self.events_done);
        }
        let now = self.instant();
        let for_ever = Duration::MAX;
        let over = self.now + EXCUSE;
        match action {
            Action::Start(node) => {
                self.start(node);
                self.truth.excused.insert(node, over);
            }
            Action::Kill(node) => {
                self.nodes[node].gossip = None;
                self.links.die(node);
                self.nodes[node].life += 1;
                self.nodes[node].tick_at = None;
                self.nodes[node].waiting.clear();
                self.nodes[node].paused = false;
                self.truth.excuse(node, for_ever);
            }
            Action::Leave(node) => {
                self.with(node, |gossip, _| gossip.leave(now));
                self.truth.excuse(node, for_ever);
                let at = self.now + Duration::from_millis(300);
                self.schedule(at, Event::Do(Action::Kill(node)));
            }
            Action::Pause(node) => {
                self.nodes[node].paused = true;
                self.truth.excuse(node, for_ever);
            }
            Action::Resume(node) => {
                self.nodes[node].paused = false;
                self.nodes[node].tick_at = None;
                self.truth.excused.insert(node, over);
                // What waits in the socket is read before the timers are looked at.
                for (from, message) in std::mem::take(&mut self.nodes[node].waiting) {
                    self.arrive(from, node, message);
                }
                self.with(node, |gossip, _| gossip.tick(now));
            }
            Action::Begin(fault) => {
                self.victims(&fault).into_iter().for_each(|node| self.truth.excuse(node, for_ever));
                self.network.begin(fault);
            }
            Action::End(fault) => {
                self.network.end(&fault);
                for node in self.victims(&fault) {
                    self.truth.excused.insert(node, over);
                }
            }
            Action::Serve(node, up) => self.with(node, |gossip, _| {
                let mut announcement = gossip.announcement().clone();
                announcement.services[0].state = if up { ServiceState::Up } else { ServiceState::Unhealthy };
                gossip.announce(announcement, now);
            }),
            Action::Publish { by, version } => {
                let signed = sign_document(&document(version, b"rules".to_vec()));
                self.with(by, |gossip, _| gossip.publish(signed, now).expect("the admin key signed it"));
            }
            Action::Forge(node) => self.forge(node),
            Action::Clock(node, ahead) => self.nodes[node].ahead = ahead,
            Action::Lie(liar) => {
                let liars = self.truth.liars.clone();
                self.lie(liar, &liars);
            }
        }
    }

    /// Nodes that may rightly be given up because of the fault.
    fn victims(&self, fault: &Fault) -> Vec<usize> {
        match fault {
            Fault::Loss(p) if *p > 0.1 => (0..self.nodes.len()).collect(),
            Fault::Loss(_) | Fault::Duplication(_) | Fault::Cut(..) | Fault::Slow(..) => Vec::new(),
            Fault::Lossy(_, p) if *p <= 0.1 => Vec::new(),
            Fault::Lossy(node, _) | Fault::Mute(node) | Fault::Deaf(node) => vec![*node],
            Fault::Split(_) => (0..self.nodes.len()).collect(),
            Fault::Apart(side) => side.clone(),
        }
    }

    fn start(&mut self, node: usize) {
        let id = self.id_of(node);
        let unix = EPOCH + self.now.as_secs() + self.nodes[node].ahead;
        let generation = (self.nodes[node].generation + 1).max(unix);
        let config = Config { seed: self.rng.random(), ..Config::new(self.profile) };
        let known = &self.nodes[node];
        let memory = Memory {
            peers: known.peers.clone(),
            documents: known.documents.values().map(|view| view.signed.clone()).collect(),
            floors: known.documents.values().map(|v| (v.document.kind.clone(), v.document.version)).collect(),
        };
        let me = Ident { id, addr: addr(node), generation };
        let credentials = Arc::new(SimulatedKey(id, self.interned.clone()));
        let serves = self.nodes.len() < VERY_LARGE || node < FEW_SERVING;
        let mut gossip =
            Gossip::new(me, announcement(node, serves), credentials, memory, &config, (self.instant(), unix));
        gossip.set_seeds((0..self.seeds.min(self.nodes.len())).map(addr).collect());
        self.links.die(node);
        let place = &mut self.nodes[node];
        place.generation = generation;
        place.life += 1;
        place.observer = Observer::default();
        place.gossip = Some(Box::new(gossip));
        place.tick_at = None;
        self.truth.generation[node] = generation;
        self.with(node, |_, _| ());
    }

    fn forge(&mut self, node: usize) {
        let now = self.instant();
        let (victim, sender) = (self.id_of((node + 1) % self.nodes.len()), self.id_of((node + 2) % self.nodes.len()));
        let record = starling_protocol::NodeRecord {
            id: victim,
            generation: EPOCH * 2,
            seq: u64::MAX,
            name: "forged".parse().unwrap(),
            addr: addr(0),
            kind: NodeKind::Node,
            zone: "forged".into(),
            services: Vec::new(),
            phase: Phase::Up,
            cert_expires: 0,
            issuer: None,
            speaks: Capabilities::own("0"),
        };
        let near = starling_protocol::NodeRecord { generation: EPOCH + self.now.as_secs() + 5, ..record.clone() };
        let records = [record, near].map(|record| {
            let body = starling_protocol::SignedRecord::encode_body(&record);
            Arc::new(starling_protocol::SignedRecord { body, signature: vec![7; 32].into(), chain: Vec::new() })
        });
        let body = SignedDocument::encode_body(&document(1 << 30, b"forged".to_vec()));
        let forged = Arc::new(SignedDocument { body, signature: vec![7; 32].into(), certificate: Bytes::new() });
        self.forged += 1;
        self.with(node, |gossip, _| {
            // One by one: of several records of a member only the newest is looked at.
            for record in records {
                gossip.receive(sender, Items { records: vec![record], ..Items::default() }, Via::Push, now);
            }
            gossip.receive(sender, Items { documents: vec![forged], ..Items::default() }, Via::Push, now);
            gossip.deliver(sender, b"garbage that is no packet", now);
        });
    }
}

fn document(version: u64, content: Vec<u8>) -> MeshDocument {
    MeshDocument {
        kind: "policy".parse().unwrap(),
        version,
        previous: DocumentHash::default(),
        not_before: 0,
        expires: None,
        deleted: false,
        content: content.into(),
        understood: true,
    }
}

fn addr(node: usize) -> SocketAddr {
    ([10, 0, 0, 1], u16::try_from(node + 1).expect("fewer nodes than ports")).into()
}

fn announcement(node: usize, serves: bool) -> Announcement {
    Announcement {
        name: format!("n{node}").parse().unwrap(),
        kind: NodeKind::Node,
        zone: String::new(),
        issuer: None,
        services: serves
            .then(|| ServiceRecord::new(format!("s{}", node % 20).parse().unwrap(), Protocol::Http1))
            .into_iter()
            .collect(),
        phase: Phase::Up,
        cert_expires: EPOCH + 86_400,
        speaks: Capabilities::own("0"),
    }
}
