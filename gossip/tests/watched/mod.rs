//! One state machine under watch: it is given any input, and what must hold is checked after every step.
//!
//! Shared by `arbitrary_input` and the fuzz targets in `tests/fuzz`.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use foca::{Codec, Header, Member, Message, PostcardCodec};
use serde::{Deserialize, Serialize};
use starling_gossip::{
    Announcement, Config, Credentials, DocumentError, Gossip, Ident, Memory, Outgoing, Profile, RecordError, Snapshot,
    Target, Via,
};
use starling_protocol::{
    Delta, Items, MAX_DOCUMENTS, MemberHealth, MemberState, MeshDocument, NodeId, NodeKind, NodeRecord, Phase, Pong,
    ROOT_HASH_BYTES, SignedDocument, SignedRecord, Summary,
};

/// The clock at the start, unix seconds.
const EPOCH: u64 = 1_800_000_000;
/// How far ahead of the clock a generation may be, in seconds.
const MAX_AHEAD_S: u64 = 24 * 3600;
/// Largest datagram that every QUIC path carries, with the headers around it.
const MAX_DATAGRAM_BYTES: usize = 1150;
/// Times that a node may ask to be woken at one and the same moment.
const MAX_AT_ONCE: usize = 64;
/// Fewest bytes that name a member in a packet: id, address, generation.
const IDENT_BYTES: usize = 16 + 6 + 1;

/// Credentials that believe whatever has the right form, so that the input reaches what lies behind the signatures.
struct Gullible;

impl Credentials for Gullible {
    fn sign(&self, record: &NodeRecord) -> SignedRecord {
        SignedRecord { body: SignedRecord::encode_body(record), signature: Vec::new(), chain: Vec::new() }
    }

    fn verify(&self, signed: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError> {
        signed.peek().map(Arc::new).map_err(|e| RecordError(e.to_string()))
    }

    fn verify_document(&self, signed: &SignedDocument) -> Result<MeshDocument, DocumentError> {
        signed.peek().map_err(|e| DocumentError::Unverified(e.to_string()))
    }
}

/// A member in a few bytes; `who` 0 is the node under watch.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Told {
    /// Which of 256 ids.
    pub who: u8,
    /// Relative to its present or first life.
    pub generation: i8,
    /// Which refutation.
    pub incarnation: u16,
    /// How it is said to be.
    pub health: MemberHealth,
}

/// Something that happens to the node. `from` names an authenticated peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Step {
    /// Time goes on, and the node is woken when it asks to be.
    Run {
        /// For how long.
        ms: u16,
    },
    /// Time goes on while the process stands still.
    Stall {
        /// For how long.
        s: u16,
    },
    /// Any bytes.
    Datagram {
        /// The sender.
        from: u8,
        /// All of it.
        bytes: Vec<u8>,
    },
    /// A packet whose sender and receiver are right.
    Packet {
        /// The sender.
        from: Told,
        /// The message, any updates and broadcasts.
        rest: Vec<u8>,
    },
    /// A packet that is right in all its parts, but perhaps for its receiver.
    Tell {
        /// The sender.
        from: Told,
        /// Which of SWIM's messages; from 128 on it is meant for whom it is about.
        message: u8,
        /// Whom the message is about, if about anybody.
        about: Told,
        /// News of members.
        updates: Vec<Told>,
    },
    /// The beginning of an exchange.
    Answer {
        /// The sender.
        from: u8,
        /// Put in front of the summary's members.
        members: Vec<Told>,
        /// Anything.
        summary: Summary,
    },
    /// The answer to a summary.
    Absorb {
        /// The sender.
        from: u8,
        /// Put in front of the delta's members.
        members: Vec<Told>,
        /// Anything.
        delta: Delta,
    },
    /// A push.
    Receive {
        /// The sender.
        from: u8,
        /// Anything.
        items: Items,
    },
    /// A ping over a stream.
    Ping {
        /// The sender.
        from: u8,
        /// At which incarnation the node is suspected.
        suspected: Option<u16>,
    },
    /// What came of asking a suspect.
    Checked {
        /// The suspect.
        suspect: Told,
        /// What it answered.
        pong: Option<Pong>,
    },
    /// The node says good-bye.
    Leave,
}

/// Id of a member in a few bytes.
pub fn id(who: u8) -> NodeId {
    NodeId([who; 16])
}

fn addr(who: u8) -> SocketAddr {
    ([10, 0, 0, who], 7400).into()
}

/// How long the dead are remembered, less what it takes until they are shown.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600 - 60);

#[derive(Debug, Clone, Copy, PartialEq)]
struct Seen {
    ident: Ident,
    incarnation: u16,
    health: MemberHealth,
    /// Since when it has been seen like this.
    since: Instant,
}

/// A node that knows two others, and what was seen of it.
pub struct Watched {
    gossip: Gossip,
    start: Instant,
    now: Instant,
    unix: u64,
    seen: HashMap<NodeId, Seen>,
    /// Most members that the node can have heard of.
    named: usize,
    /// Datagrams that it sent, with whom they were for.
    pub sent: Vec<(NodeId, Vec<u8>)>,
}

impl Watched {
    /// Node `me`, which knows two other members, the next two ids.
    pub fn new(me: u8) -> Self {
        let now = Instant::now();
        let ident = Ident { id: id(me), addr: addr(me), generation: EPOCH };
        let announcement = Announcement {
            name: format!("n{me}").parse().expect("a name"),
            kind: NodeKind::Node,
            zone: String::new(),
            issuer: None,
            services: Vec::new(),
            phase: Phase::Up,
            cert_expires: EPOCH + 86_400,
        };
        let config = Config { seed: 7, ..Config::new(Profile::Lan) };
        let mut gossip = Gossip::new(ident, announcement, Box::new(Gullible), Memory::default(), &config, (now, EPOCH));
        gossip.set_seeds(vec![addr(0), addr(1)]);
        let mut watched =
            Self { gossip, start: now, now, unix: EPOCH, seen: HashMap::new(), named: 1, sent: Vec::new() };
        let members = [me.wrapping_add(1), me.wrapping_add(2)].map(|who| Told {
            who,
            generation: 0,
            incarnation: 0,
            health: MemberHealth::Alive,
        });
        watched.step(Step::Answer { from: members[0].who, members: members.into(), summary: Summary::default() });
        watched.step(Step::Run { ms: 300 });
        assert_eq!(watched.seen.len(), 2, "it knows two others");
        watched
    }

    /// Does it, and checks what must hold afterwards.
    ///
    /// # Panics
    /// If something does not hold.
    pub fn step(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Run { ms } => self.run(Duration::from_millis(ms.into())),
            Step::Stall { s } => {
                self.now += Duration::from_secs(s.into());
                self.gossip.tick(self.now);
            }
            Step::Datagram { from, bytes } => {
                self.named += bytes.len() / IDENT_BYTES;
                self.gossip.deliver(id(from), &bytes, now);
            }
            Step::Packet { from, rest } => {
                let mut bytes = self.head(from, self.gossip.me(), None);
                bytes.extend(rest);
                self.step(Step::Datagram { from: from.who, bytes });
            }
            Step::Tell { from, message, about, updates } => {
                let dst = if message < 128 { self.gossip.me() } else { self.ident(about) };
                let mut bytes = self.head(from, dst, Some(self.message(message, about)));
                bytes.extend((updates.len() as u16).to_be_bytes());
                for told in updates {
                    let state = match told.health {
                        MemberHealth::Alive => foca::State::Alive,
                        MemberHealth::Suspect => foca::State::Suspect,
                        MemberHealth::Down => foca::State::Down,
                    };
                    let member = Member::new(self.ident(told), told.incarnation, state);
                    PostcardCodec.encode_member(&member, &mut bytes).expect("a vector grows");
                }
                self.step(Step::Datagram { from: from.who, bytes });
            }
            Step::Answer { from, members, mut summary } => {
                summary.members.splice(0..0, members.into_iter().map(|told| self.state(told)));
                self.named += summary.members.len();
                self.gossip.answer(id(from), summary, now);
            }
            Step::Absorb { from, members, mut delta } => {
                delta.members.splice(0..0, members.into_iter().map(|told| self.state(told)));
                self.named += delta.members.len() + delta.items.records.len();
                let with = Target::Addr(addr(from));
                self.gossip.absorb(id(from), with, delta, now);
            }
            Step::Receive { from, items } => {
                self.named += items.records.len();
                self.gossip.receive(id(from), items, Via::Push, now);
            }
            Step::Ping { from, suspected } => {
                let pong = self.gossip.answer_ping(id(from), suspected, now);
                assert_eq!(pong.generation, self.gossip.me().generation);
            }
            Step::Checked { suspect, pong } => {
                self.named += 1;
                let ident = self.ident(suspect);
                self.gossip.checked(ident, suspect.incarnation, pong, now);
            }
            Step::Leave => self.gossip.leave(now),
        }
        self.look();
    }

    /// Time goes on; the node is woken whenever it asks to be.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.gossip.next_tick() <= end {
            self.now = self.gossip.next_tick().max(self.now);
            let mut times = 0;
            while self.gossip.next_tick() <= self.now {
                times += 1;
                assert!(times < MAX_AT_ONCE, "time stands still");
                self.gossip.tick(self.now);
                self.look();
            }
        }
        self.now = end;
    }

    fn look(&mut self) {
        self.unix = EPOCH + self.now.saturating_duration_since(self.start).as_secs();
        for out in self.gossip.drain(self.now) {
            match out {
                Outgoing::Datagram { to, bytes, .. } => {
                    assert!(bytes.len() <= MAX_DATAGRAM_BYTES, "a datagram of {} bytes", bytes.len());
                    self.sent.push((to.id, bytes.to_vec()));
                }
                Outgoing::Generation(generation) => {
                    assert_eq!(generation, self.gossip.me().generation);
                    // It has been cut off, and what it held for true may have been wrong.
                    self.seen.clear();
                }
                Outgoing::Changed(snapshot) => self.look_at(&snapshot),
                _ => {}
            }
        }
        let documents = self.gossip.documents();
        assert!(documents.len() <= MAX_DOCUMENTS, "{} documents", documents.len());
    }

    fn look_at(&mut self, snapshot: &Snapshot) {
        let me = snapshot.me().expect("a node sees itself");
        assert_eq!((me.id, me.health), (self.gossip.me().id, MemberHealth::Alive));
        let members = &snapshot.members;
        assert!(members.len() <= self.named, "{} members, of {} named", members.len(), self.named);
        let mut ids: Vec<NodeId> = members.iter().map(|m| m.id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), members.len(), "each member is shown once");
        for member in members {
            assert!(member.generation <= self.unix + MAX_AHEAD_S, "a generation of the future: {member:?}");
            if let Some(record) = &member.record {
                assert_eq!(record.id, member.id);
                assert!(record.generation <= self.unix + MAX_AHEAD_S, "a record of the future: {record:?}");
            }
            if !member.is_self {
                let (ident, incarnation, health) = (member.ident(), member.incarnation, member.health);
                self.see(Seen { ident, incarnation, health, since: self.now });
            }
        }
    }

    /// One life of a member only goes on, and no life comes back from the dead.
    fn see(&mut self, mut seen: Seen) {
        if let Some(before) = self.seen.get(&seen.ident.id).filter(|b| (b.ident, b.health) == (seen.ident, seen.health))
        {
            seen.since = before.since;
        }
        let Some(before) = self.seen.insert(seen.ident.id, seen) else { return };
        if before.health == MemberHealth::Down && self.now - before.since >= REMEMBERED {
            // The dead are forgotten after a day, and who was forgotten is new.
            return;
        }
        let life = |seen: &Seen| (seen.ident.generation, seen.ident.addr);
        assert!(life(&before) <= life(&seen), "an earlier life: {before:?} then {seen:?}");
        if life(&before) == life(&seen) {
            let down = |seen: &Seen| seen.health == MemberHealth::Down;
            assert!(!down(&before) || down(&seen), "back from the dead: {before:?} then {seen:?}");
            // A death is told with the incarnation of the suspicion that led to it, which may be an old one.
            assert!(before.incarnation <= seen.incarnation || down(&seen), "went back: {before:?} then {seen:?}");
        }
    }

    fn ident(&self, told: Told) -> Ident {
        let me = self.gossip.me();
        let base = if id(told.who) == me.id { me.generation } else { EPOCH };
        Ident { id: id(told.who), addr: addr(told.who), generation: base.saturating_add_signed(told.generation.into()) }
    }

    fn state(&self, told: Told) -> MemberState {
        let Ident { id, addr, generation } = self.ident(told);
        MemberState { id, addr, generation, incarnation: told.incarnation, health: told.health, down_s: 0 }
    }

    /// Root hash and header of a packet; without a message, whatever follows is one.
    fn head(&self, from: Told, dst: Ident, message: Option<Message<Ident>>) -> Vec<u8> {
        let mut bytes = vec![0; ROOT_HASH_BYTES];
        let raw = message.is_none();
        let message = message.unwrap_or(Message::Gossip);
        let header = Header { src: self.ident(from), src_incarnation: from.incarnation, dst, message };
        PostcardCodec.encode_header(&header, &mut bytes).expect("a vector grows");
        if raw {
            bytes.pop();
        }
        bytes
    }

    fn message(&self, message: u8, about: Told) -> Message<Ident> {
        let (ident, probe_number) = (self.ident(about), about.incarnation as u8);
        match message % 11 {
            0 => Message::Ping(probe_number),
            1 => Message::Ack(probe_number),
            2 => Message::PingReq { target: ident, probe_number },
            3 => Message::IndirectPing { origin: ident, probe_number },
            4 => Message::IndirectAck { target: ident, probe_number },
            5 => Message::ForwardedAck { origin: ident, probe_number },
            6 => Message::Announce,
            7 => Message::Feed,
            8 => Message::Gossip,
            9 => Message::Broadcast,
            _ => Message::TurnUndead,
        }
    }
}
