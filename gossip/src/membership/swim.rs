//! foca's side of the driver: what a member is to it, how it is set up, and what it hands back.

use std::{
    net::SocketAddr,
    num::{NonZeroU8, NonZeroUsize},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use foca::{Codec, Header, Member, Message, Notification, PeriodicParams, PostcardCodec, Timer};
use serde::{Deserialize, Serialize};
use starling_protocol::{MemberHealth, MemberState, NodeId};

use crate::Config;

/// Largest SWIM packet, in bytes. With the root hash in front it fits the 1162 bytes of a datagram that every QUIC path
/// carries (1200 bytes, RFC 9000 §14, less headers), so no packet depends on what a path offers beyond that.
pub(super) const MAX_PACKET_BYTES: usize = 1142;
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

impl From<&MemberState> for Ident {
    fn from(state: &MemberState) -> Self {
        Self { id: state.id, addr: state.addr, generation: state.generation }
    }
}

/// A state as foca takes it.
pub(super) fn member_of(state: &MemberState) -> Member<Ident> {
    let health = match state.health {
        MemberHealth::Alive => foca::State::Alive,
        MemberHealth::Suspect => foca::State::Suspect,
        MemberHealth::Down => foca::State::Down,
    };
    Member::new(state.into(), state.incarnation, health)
}

/// A member as foca has it.
pub(super) fn state_of(member: &Member<Ident>) -> MemberState {
    MemberState {
        id: member.id().id,
        addr: member.id().addr,
        generation: member.id().generation,
        incarnation: member.incarnation(),
        health: match member.state() {
            foca::State::Alive => MemberHealth::Alive,
            foca::State::Suspect => MemberHealth::Suspect,
            foca::State::Down => MemberHealth::Down,
        },
        down_s: 0,
    }
}

/// Members that a packet brings news of.
pub(super) fn members_in(header: &Header<Ident>, mut rest: &[u8]) -> Result<Vec<Ident>, String> {
    if matches!(header.message, Message::Broadcast | Message::Announce) {
        return Ok(Vec::new());
    }
    let count = rest.get_u16();
    (0..count)
        .map(|_| PostcardCodec.decode_member(&mut rest).map(|member: Member<Ident>| *member.id()))
        .collect::<Result<_, _>>()
        .map_err(|e| e.to_string())
}

/// A rumour that was meant for another node: foca takes only what names this one. What does not fit any more because this
/// node's address is longer is left out, from the end.
pub(super) fn readdressed(header: Header<Ident>, rest: &[u8], me: Ident) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(MAX_PACKET_BYTES + 64);
    PostcardCodec.encode_header(&Header { dst: me, ..header }, &mut bytes).map_err(|e| e.to_string())?;
    let room = MAX_PACKET_BYTES.saturating_sub(bytes.len());
    if rest.len() <= room {
        bytes.extend_from_slice(rest);
        return Ok(bytes);
    }
    let mut left = rest;
    let count = left.try_get_u16().map_err(|e| e.to_string())?;
    let (mut fit, mut end) = (0, 2);
    while fit < count {
        let _: Member<Ident> = PostcardCodec.decode_member(&mut left).map_err(|e| e.to_string())?;
        if rest.len() - left.len() > room {
            break;
        }
        (fit, end) = (fit + 1, rest.len() - left.len());
    }
    while fit == count && left.len() > 2 {
        let length = usize::from(left.get_u16());
        left = left.get(length..).ok_or("a broadcast is cut short")?;
        if rest.len() - left.len() > room {
            break;
        }
        end = rest.len() - left.len();
    }
    bytes.put_u16(fit);
    bytes.extend_from_slice(&rest[2..end]);
    Ok(bytes)
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
        max_packet_size: nonzero(MAX_PACKET_BYTES),
        notify_down_members: true,
        // Full state travels over streams (see `contacts`), so members need not be asked for a packet of others.
        periodic_announce: None,
        periodic_announce_to_down_members: None,
        periodic_gossip: Some(PeriodicParams { frequency: Duration::from_millis(200), num_members: nonzero(3) }),
    }
}
