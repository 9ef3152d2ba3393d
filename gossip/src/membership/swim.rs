//! foca's side of the driver: what a member is to it, how it is set up, and what it hands back.

use std::{
    net::SocketAddr,
    num::{NonZeroU8, NonZeroUsize},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use foca::{Codec, Header, Member, Message, Notification, PeriodicParams, PostcardCodec, Timer};
use serde::{Deserialize, Serialize};
use starling_protocol::{Life, MAX_PACKET_BYTES, MemberHealth, News, NodeId, Packet, Purpose, Word};

use crate::Config;

/// Largest packet of foca's own form, in bytes. What travels names members without their addresses, and so is always smaller.
const MAX_INNER_BYTES: usize = MAX_PACKET_BYTES - 10;
/// How long a dead member is remembered, so that old news cannot bring it back. Counted from when the first node declared
/// it dead, or members would go on reminding each other of it for ever.
pub(super) const REMEMBER_DOWN: Duration = Duration::from_secs(24 * 3600);

/// A member in SWIM's eyes: which node, where, in which life. Nothing that changes while it lives may be in here, because
/// foca drops packets to any other identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ident {
    /// Who.
    pub id: NodeId,
    /// Where its mesh port answers.
    pub addr: SocketAddr,
    /// Which life; higher wins.
    pub generation: u64,
}

impl foca::Identity for Ident {
    type Addr = NodeId;

    /// Never by itself: when a node that was declared dead may come back is for `recovery` to say.
    fn renew(&self) -> Option<Self> {
        None
    }

    fn addr(&self) -> NodeId {
        self.id
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        // Two different identities of one life can only differ in the address; any order will do if all use the same.
        (self.generation, self.addr) > (adversary.generation, adversary.addr)
    }
}

/// What one call of foca wants done.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) packets: Vec<(Ident, Bytes)>,
    pub(super) timers: Vec<(Timer<Ident>, Duration)>,
    /// Members that are up, down or in another life now.
    pub(super) news: Vec<NodeId>,
    pub(super) death: bool,
    pub(super) defunct: bool,
}

impl foca::Runtime<Ident> for Collected {
    fn notify(&mut self, notification: Notification<'_, Ident>) {
        match notification {
            Notification::MemberUp(member) | Notification::Rename(_, member) => self.news.push(member.id),
            Notification::MemberDown(member) => {
                self.news.push(member.id);
                self.death = true;
            }
            Notification::Defunct => self.defunct = true,
            _ => {}
        }
    }

    fn send_to(&mut self, to: Ident, data: &[u8]) {
        self.packets.push((to, Bytes::copy_from_slice(data)));
    }

    fn submit_after(&mut self, event: Timer<Ident>, after: Duration) {
        self.timers.push((event, after));
    }
}

/// A member as membership has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PeerState {
    /// Who.
    pub(crate) id: NodeId,
    /// Where its mesh port answers, by its record.
    pub(crate) addr: SocketAddr,
    /// Which life of it.
    pub(crate) generation: u64,
    /// Which refutation within that life.
    pub(crate) incarnation: u16,
    /// How it is.
    pub(crate) health: MemberHealth,
}

impl Ident {
    /// It, as it is named in packets.
    pub(crate) fn life(&self) -> Life {
        Life { id: self.id, generation: self.generation }
    }
}

impl From<&PeerState> for Ident {
    fn from(state: &PeerState) -> Self {
        Self { id: state.id, addr: state.addr, generation: state.generation }
    }
}

/// A state as foca takes it.
pub(super) fn member_of(state: &PeerState) -> Member<Ident> {
    let health = match state.health {
        MemberHealth::Alive => foca::State::Alive,
        MemberHealth::Suspect => foca::State::Suspect,
        MemberHealth::Down => foca::State::Down,
    };
    Member::new(state.into(), state.incarnation, health)
}

/// A member as foca has it.
pub(super) fn state_of(member: &Member<Ident>) -> PeerState {
    PeerState {
        id: member.id().id,
        addr: member.id().addr,
        generation: member.id().generation,
        incarnation: member.incarnation(),
        health: match member.state() {
            foca::State::Alive => MemberHealth::Alive,
            foca::State::Suspect => MemberHealth::Suspect,
            foca::State::Down => MemberHealth::Down,
        },
    }
}

/// A packet as foca takes it. `about` is whom its purpose is about; news is for the driver alone.
pub(super) fn inner(
    source: Ident,
    incarnation: u16,
    receiver: Ident,
    (purpose, probe): (Purpose, u8),
    about: Option<Ident>,
) -> Vec<u8> {
    let target = about.unwrap_or(receiver);
    let message = match purpose {
        Purpose::Ping => Message::Ping(probe),
        Purpose::Ack => Message::Ack(probe),
        Purpose::PingRequest(_) => Message::PingReq { target, probe_number: probe },
        Purpose::IndirectPing(_) => Message::IndirectPing { origin: target, probe_number: probe },
        Purpose::IndirectAck(_) => Message::IndirectAck { target, probe_number: probe },
        Purpose::ForwardedAck(_) => Message::ForwardedAck { origin: target, probe_number: probe },
        Purpose::Gossip => Message::Gossip,
        Purpose::Dead => Message::TurnUndead,
    };
    let mut bytes = Vec::with_capacity(128);
    let header = Header { src: source, src_incarnation: incarnation, dst: receiver, message };
    PostcardCodec.encode_header(&header, &mut bytes).expect("a vector grows");
    bytes.put_u16(0);
    bytes
}

/// A packet of foca's as it travels; the root hash is filled in later. `None` for what has no place in the protocol.
pub(super) fn outer(mut bytes: &[u8]) -> Option<Packet> {
    let header: Header<Ident> = PostcardCodec.decode_header(&mut bytes).expect("foca writes what it reads");
    let (purpose, probe) = match header.message {
        Message::Ping(probe) => (Purpose::Ping, probe),
        Message::Ack(probe) => (Purpose::Ack, probe),
        Message::PingReq { target, probe_number } => (Purpose::PingRequest(target.life()), probe_number),
        Message::IndirectPing { origin, probe_number } => (Purpose::IndirectPing(origin.life()), probe_number),
        Message::IndirectAck { target, probe_number } => (Purpose::IndirectAck(target.life()), probe_number),
        Message::ForwardedAck { origin, probe_number } => (Purpose::ForwardedAck(origin.life()), probe_number),
        Message::Gossip | Message::Broadcast => (Purpose::Gossip, 0),
        Message::TurnUndead => (Purpose::Dead, 0),
        // Members are introduced by their records.
        Message::Announce | Message::Feed => return None,
    };
    let mut news = Vec::new();
    if header.message != Message::Broadcast && bytes.len() >= 2 {
        for _ in 0..bytes.get_u16() {
            let member: Member<Ident> = PostcardCodec.decode_member(&mut bytes).expect("foca writes what it reads");
            let PeerState { incarnation, health, .. } = state_of(&member);
            news.push(News { life: member.id().life(), incarnation, health });
        }
    }
    let mut words = Vec::new();
    while bytes.len() > 2 {
        let length = usize::from(bytes.get_u16());
        let (word, rest) = bytes.split_at(length);
        words.extend(Word::decode(word));
        bytes = rest;
    }
    let (source, receiver, incarnation) = (header.src.life(), header.dst.life(), header.src_incarnation);
    Some(Packet { root: 0, source, incarnation, receiver, purpose, probe, news, words })
}

/// foca's settings for a mesh of that size.
pub(super) fn foca_config(config: &Config, size: usize) -> foca::Config {
    let nonzero = |n: usize| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
    let rounds = (size as f64 + 1.0).log2().max(1.0);
    foca::Config {
        probe_period: config.probe_period,
        probe_rtt: config.probe_rtt,
        num_indirect_probes: nonzero(3),
        max_transmissions: NonZeroU8::new(rounds.ceil().min(60.0) as u8 + 4).unwrap_or(NonZeroU8::MIN),
        // The driver keeps these timers itself: see `Suspicion::deadline`.
        suspect_to_down_after: config.suspicion[1],
        remove_down_after: Some(REMEMBER_DOWN),
        max_packet_size: nonzero(MAX_INNER_BYTES),
        notify_down_members: true,
        // Full state travels over streams (see `contacts`), so members need not be asked for a packet of others.
        periodic_announce: None,
        periodic_announce_to_down_members: None,
        periodic_gossip: Some(PeriodicParams { frequency: Duration::from_millis(200), num_members: nonzero(3) }),
    }
}
