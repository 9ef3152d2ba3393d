//! One state machine under watch: it is given any input, and what must hold is checked after every step.
//!
//! Shared by `arbitrary_input` and the fuzz targets in `tests/fuzz`.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use starling_gossip::{
    Announcement, Config, Credentials, DocumentError, Gossip, Ident, Memory, Outgoing, Profile, RecordError, Snapshot,
    Target, Via,
};
use starling_protocol::{
    Capabilities, Delta, Items, Life, MAX_DOCUMENTS, MAX_PACKET_BYTES, MemberHealth, MemberState, MeshDocument, News,
    NodeId, NodeKind, NodeRecord, Packet, Phase, Pong, Purpose, SignedDocument, SignedRecord, SignedStrike, Strike,
    Summary, Word,
};

/// The clock at the start, unix seconds.
const EPOCH: u64 = 1_800_000_000;
/// How far ahead of the clock a generation may be, in seconds.
const MAX_AHEAD_S: u64 = 24 * 3600;
/// Times that a node may ask to be woken at one and the same moment.
const MAX_AT_ONCE: usize = 64;

/// Credentials that believe whatever has the right form, so that the input reaches what lies behind the signatures.
struct Gullible;

impl Credentials for Gullible {
    fn sign(&self, record: &NodeRecord) -> SignedRecord {
        SignedRecord { body: SignedRecord::encode_body(record), signature: Bytes::new(), chain: Vec::new() }
    }

    fn sign_word(&self, _: &[u8]) -> Vec<u8> {
        Vec::new()
    }

    fn verify_word(&self, _: &SignedRecord, _: &[u8], _: &[u8]) -> bool {
        true
    }

    fn verify_strike(&self, signed: &SignedStrike) -> Result<Strike, RecordError> {
        signed.peek().map_err(|e| RecordError::Forged(e.to_string()))
    }

    fn verify(&self, signed: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError> {
        signed.peek().map(Arc::new).map_err(|e| RecordError::Forged(e.to_string()))
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

/// A signed word in a few bytes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Said {
    /// Of whom, and at which incarnation.
    pub of: Told,
    /// Which of 256 ids says it.
    pub by: u8,
    /// What: an accusation, a sign of life, or nothing that is known.
    pub kind: u8,
    /// Whether it is for everybody.
    pub raised: bool,
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
        /// Words about members, by others.
        words: Vec<Said>,
    },
    /// A member's record.
    Introduce {
        /// Who brings it.
        from: u8,
        /// Whose.
        whose: Told,
        /// Which edition.
        seq: u8,
        /// Whether it has left.
        left: bool,
    },
    /// The beginning of an exchange.
    Answer {
        /// The sender.
        from: u8,
        /// Put in front of the summary's members.
        members: Vec<Told>,
        /// A [`Summary`], in bytes; one that is none is an empty one.
        summary: Vec<u8>,
    },
    /// The answer to a summary.
    Absorb {
        /// The sender.
        from: u8,
        /// Put in front of the delta's members.
        members: Vec<Told>,
        /// A [`Delta`], in bytes.
        delta: Vec<u8>,
    },
    /// A push.
    Receive {
        /// The sender.
        from: u8,
        /// [`Items`], in bytes.
        items: Vec<u8>,
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
            services: Vec::new(),
            phase: Phase::Up,
            cert_expires: EPOCH + 86_400,
            issuer: None,
            speaks: Capabilities::own("0"),
        };
        let config = Config { seed: 7, ..Config::new(Profile::Lan) };
        let mut gossip = Gossip::new(ident, announcement, Arc::new(Gullible), Memory::default(), &config, (now, EPOCH));
        gossip.set_seeds(vec![addr(0), addr(1)]);
        let mut watched =
            Self { gossip, start: now, now, unix: EPOCH, seen: HashMap::new(), named: 1, sent: Vec::new() };
        for who in [me.wrapping_add(1), me.wrapping_add(2)] {
            let whose = Told { who, generation: 0, incarnation: 0, health: MemberHealth::Alive };
            watched.step(Step::Introduce { from: who, whose, seq: 1, left: false });
        }
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
                self.gossip.deliver(id(from), &bytes, now);
            }
            Step::Packet { from, rest } => {
                let mut bytes = self.packet(from, self.gossip.me().generation, Purpose::Gossip).encode();
                // Behind the receiver come words and news.
                bytes.truncate(bytes.len() - 2);
                bytes.extend(rest);
                self.step(Step::Datagram { from: from.who, bytes });
            }
            Step::Tell { from, message, about, updates, words } => {
                let news = updates.iter().map(|told| News {
                    life: self.life(*told),
                    incarnation: told.incarnation,
                    health: told.health,
                });
                let words = words.iter().map(|said| self.word(*said));
                let (news, words) = (news.collect(), words.collect());
                let purpose = self.purpose(message, about);
                let mut packet = self.packet(from, self.gossip.me().generation, purpose);
                if message >= 128 {
                    packet.receiver = self.life(about);
                }
                packet.probe = about.incarnation as u8;
                let bytes = Packet { news, words, ..packet }.encode();
                self.step(Step::Datagram { from: from.who, bytes });
            }
            Step::Introduce { from, whose, seq, left } => {
                let Life { id, generation } = self.life(whose);
                let record = NodeRecord {
                    id,
                    generation,
                    seq: seq.into(),
                    name: format!("n{}", whose.who).parse().expect("a name"),
                    addr: addr(whose.who),
                    kind: NodeKind::Node,
                    zone: String::new(),
                    services: Vec::new(),
                    phase: if left { Phase::Left } else { Phase::Up },
                    cert_expires: if whose.health == MemberHealth::Down { 0 } else { u64::MAX },
                    issuer: None,
                    speaks: Capabilities::own("0"),
                };
                let items = Items { records: vec![Arc::new(Gullible.sign(&record))], ..Items::default() };
                self.step(Step::Receive { from, items: starling_protocol::encode(&items) });
            }
            Step::Answer { from, members, summary } => {
                let mut summary: Summary = starling_protocol::decode(&summary).unwrap_or_default();
                summary.members.splice(0..0, members.into_iter().map(|told| self.state(told)));
                self.gossip.answer(id(from), summary, now);
            }
            Step::Absorb { from, members, delta } => {
                let mut delta: Delta = starling_protocol::decode(&delta).unwrap_or_default();
                delta.members.splice(0..0, members.into_iter().map(|told| self.state(told)));
                self.named += delta.items.records.len();
                let with = Target::Addr(addr(from));
                self.gossip.absorb(id(from), with, delta, now);
            }
            Step::Receive { from, items } => {
                let items: Items = starling_protocol::decode(&items).unwrap_or_default();
                self.named += items.records.len();
                self.gossip.receive(id(from), items, Via::Push, now);
            }
            Step::Ping { from, suspected } => {
                let pong = self.gossip.answer_ping(id(from), suspected, now);
                assert!(pong.is_none_or(|pong| pong.generation == self.gossip.me().generation));
            }
            Step::Checked { suspect, pong } => {
                let Life { id, generation } = self.life(suspect);
                let ident = Ident { id, addr: addr(suspect.who), generation };
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
                    assert!(bytes.len() <= MAX_PACKET_BYTES, "a datagram of {} bytes", bytes.len());
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
            let later = seen.incarnation > before.incarnation;
            assert!(!down(&before) || down(&seen) || later, "back from the dead: {before:?} then {seen:?}");
            // A death is told with the incarnation of the suspicion that led to it, which may be an old one.
            assert!(before.incarnation <= seen.incarnation || down(&seen), "went back: {before:?} then {seen:?}");
        }
    }

    fn life(&self, told: Told) -> Life {
        let me = self.gossip.me();
        let base = if id(told.who) == me.id { me.generation } else { EPOCH };
        Life { id: id(told.who), generation: base.saturating_add_signed(told.generation.into()) }
    }

    fn state(&self, told: Told) -> MemberState {
        let Life { id, generation } = self.life(told);
        MemberState { id, generation, seq: 1, incarnation: told.incarnation, health: told.health, down_s: 0 }
    }

    fn word(&self, said: Said) -> Word {
        let Said { of, by, kind, raised } = said;
        let Life { id: subject, generation } = self.life(of);
        Word {
            kind: kind % 4,
            subject,
            generation,
            incarnation: of.incarnation,
            by: id(by),
            raised,
            signature: Vec::new(),
        }
    }

    fn packet(&self, from: Told, generation: u64, purpose: Purpose) -> Packet {
        let receiver = Life { id: self.gossip.me().id, generation };
        let (news, words) = (Vec::new(), Vec::new());
        let (source, incarnation) = (self.life(from), from.incarnation);
        Packet { root: 0, source, incarnation, receiver, purpose, probe: 0, news, words }
    }

    fn purpose(&self, message: u8, about: Told) -> Purpose {
        let life = self.life(about);
        match message % 8 {
            0 => Purpose::Ping,
            1 => Purpose::Ack,
            2 => Purpose::PingRequest(life),
            3 => Purpose::IndirectPing(life),
            4 => Purpose::IndirectAck(life),
            5 => Purpose::ForwardedAck(life),
            6 => Purpose::Gossip,
            _ => Purpose::Dead,
        }
    }
}
