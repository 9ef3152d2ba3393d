//! A SWIM packet: one datagram between two members.

use crate::{
    MemberHealth, NodeId, WireError, Word,
    wire::{put_varint, take_array, take_varint},
};

/// Largest packet, in bytes. It fits the 1162 bytes of a datagram that every QUIC path carries (1200 bytes, RFC 9000 §14, less
/// headers), so no packet depends on what a path offers beyond that.
pub const MAX_PACKET_BYTES: usize = 1150;
/// The version of packets that this version writes.
const VERSION: u8 = 1;
/// Versions and purposes that later software may use; what is above is no packet.
const LATER_VERSIONS: std::ops::RangeInclusive<u8> = VERSION + 1..=31;
const LATER_PURPOSES: std::ops::RangeInclusive<u8> = 9..=63;

/// A life of a member. Where it is, its record says, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Life {
    /// Who.
    pub id: NodeId,
    /// Which life; higher wins.
    pub generation: u64,
}

/// What a packet is for (SWIM §3.1, §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Asks for an acknowledgement.
    Ping,
    /// Answers a ping.
    Ack,
    /// Asks the receiver to ping a third member.
    PingRequest(Life),
    /// A ping on behalf of a third member.
    IndirectPing(Life),
    /// Answers that; names the one on whose behalf.
    IndirectAck(Life),
    /// Tells whoever asked that the third member has answered.
    ForwardedAck(Life),
    /// Carries news alone.
    Gossip,
    /// Tells the receiver that the sender holds it for dead.
    Dead,
}

/// News of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct News {
    /// Of whom.
    pub life: Life,
    /// At which incarnation.
    pub incarnation: u16,
    /// How it is.
    pub health: MemberHealth,
}

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Root hash of all records and documents that the sender has.
    pub root: u64,
    /// The sender.
    pub source: Life,
    /// Its incarnation.
    pub incarnation: u16,
    /// Whom it is for. News may be for whoever gets it.
    pub receiver: Life,
    /// What it is for.
    pub purpose: Purpose,
    /// Number of the probe that it belongs to.
    pub probe: u8,
    /// News of members.
    pub news: Vec<News>,
    /// Signed words of members.
    pub words: Vec<Word>,
}

/// Why a datagram is no packet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Of a version, or for a purpose, that this one does not know: no offence.
    #[error("of a later version")]
    Unsupported,
    /// Not a packet.
    #[error("{0}")]
    Malformed(#[from] WireError),
}

impl Packet {
    /// Its bytes; as much news and as many words, from the front, as fit into [`MAX_PACKET_BYTES`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MAX_PACKET_BYTES);
        out.push(VERSION);
        out.extend_from_slice(&self.root.to_be_bytes());
        let (number, about) = self.purpose.parts();
        out.push(number);
        out.push(self.probe);
        self.source.write(&mut out);
        put_varint(self.incarnation.into(), &mut out);
        self.receiver.write(&mut out);
        if let Some(about) = about {
            about.write(&mut out);
        }
        // Words first: without them, news of an incarnation is not believed.
        let words: Vec<Vec<u8>> = self.words.iter().map(Word::encode).collect();
        // Each list has its length in front: one byte for each, as so many words or members fit.
        let mut room = MAX_PACKET_BYTES.saturating_sub(out.len() + 2);
        let fitting = |size: usize, room: &mut usize| {
            let fits = size <= *room;
            *room -= if fits { size } else { *room };
            fits
        };
        let words: Vec<_> = words.iter().take_while(|word| fitting(word.len() + 2, &mut room)).collect();
        put_varint(words.len() as u64, &mut out);
        for word in words {
            put_varint(word.len() as u64, &mut out);
            out.extend_from_slice(word);
        }
        let mut items = Vec::new();
        let mut count = 0;
        for news in &self.news {
            let mut item = Vec::with_capacity(24);
            news.life.write(&mut item);
            put_varint(news.incarnation.into(), &mut item);
            item.push(news.health.number());
            if !fitting(item.len(), &mut room) {
                break;
            }
            items.extend(item);
            count += 1;
        }
        put_varint(count, &mut out);
        out.extend(items);
        out
    }

    /// Reads a datagram; what follows the news is ignored, and so is news of a health that this version does not know.
    pub fn decode(datagram: &[u8]) -> Result<Self, PacketError> {
        let mut rest = datagram;
        let bytes = &mut rest;
        let [version] = take_array(bytes)?;
        if LATER_VERSIONS.contains(&version) {
            return Err(PacketError::Unsupported);
        }
        if version != VERSION {
            return Err(WireError::Malformed(format!("version {version}")).into());
        }
        if datagram.len() > MAX_PACKET_BYTES {
            return Err(WireError::TooLong { length: datagram.len(), limit: MAX_PACKET_BYTES }.into());
        }
        let root = u64::from_be_bytes(take_array(bytes)?);
        let [number, probe] = take_array(bytes)?;
        let source = Life::read(bytes)?;
        let incarnation = take_small(bytes)?;
        let receiver = Life::read(bytes)?;
        let purpose = Purpose::read(number, bytes)?;
        let mut words = Vec::new();
        for _ in 0..take_count(bytes)? {
            let length = take_count(bytes)?;
            let (word, behind) = bytes.split_at_checked(length).ok_or_else(cut_short)?;
            *bytes = behind;
            words.push(Word::decode(word)?);
        }
        let mut news = Vec::new();
        for _ in 0..take_count(bytes)? {
            let life = Life::read(bytes)?;
            let incarnation = take_small(bytes)?;
            let [health] = take_array(bytes)?;
            news.extend(MemberHealth::of(health).map(|health| News { life, incarnation, health }));
        }
        Ok(Self { root, source, incarnation, receiver, purpose, probe, news, words })
    }
}

impl Life {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        put_varint(self.generation, out);
    }

    fn read(bytes: &mut &[u8]) -> Result<Self, WireError> {
        let id = NodeId(take_array(bytes)?);
        let generation = take_varint(bytes).ok_or_else(cut_short)?;
        Ok(Self { id, generation })
    }
}

impl Purpose {
    /// Its number, and whom it is about.
    fn parts(&self) -> (u8, Option<&Life>) {
        match self {
            Self::Ping => (1, None),
            Self::Ack => (2, None),
            Self::PingRequest(target) => (3, Some(target)),
            Self::IndirectPing(origin) => (4, Some(origin)),
            Self::IndirectAck(origin) => (5, Some(origin)),
            Self::ForwardedAck(target) => (6, Some(target)),
            Self::Gossip => (7, None),
            Self::Dead => (8, None),
        }
    }

    fn read(number: u8, bytes: &mut &[u8]) -> Result<Self, PacketError> {
        Ok(match number {
            1 => Self::Ping,
            2 => Self::Ack,
            3 => Self::PingRequest(Life::read(bytes)?),
            4 => Self::IndirectPing(Life::read(bytes)?),
            5 => Self::IndirectAck(Life::read(bytes)?),
            6 => Self::ForwardedAck(Life::read(bytes)?),
            7 => Self::Gossip,
            8 => Self::Dead,
            later if LATER_PURPOSES.contains(&later) => return Err(PacketError::Unsupported),
            _ => return Err(WireError::Malformed(format!("purpose {number}")).into()),
        })
    }
}

fn cut_short() -> WireError {
    WireError::Malformed("cut short".into())
}

fn take_small(bytes: &mut &[u8]) -> Result<u16, WireError> {
    let number = take_varint(bytes).ok_or_else(cut_short)?;
    u16::try_from(number).map_err(|_| WireError::Malformed("an incarnation above 65535".into()))
}

fn take_count(bytes: &mut &[u8]) -> Result<usize, WireError> {
    let count = take_varint(bytes).and_then(|count| usize::try_from(count).ok());
    // Whatever is counted takes at least a byte.
    count.filter(|count| *count <= bytes.len()).ok_or_else(cut_short)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn life(n: u8) -> Life {
        Life { id: NodeId([n; 16]), generation: 1_800_000_000 + u64::from(n) }
    }

    fn packet(purpose: Purpose) -> Packet {
        let word = Word {
            kind: Word::ACCUSES,
            subject: life(3).id,
            generation: 1_800_000_003,
            incarnation: 300,
            by: life(1).id,
            raised: true,
            signature: vec![9; 71],
        };
        let news = News { life: life(3), incarnation: 300, health: MemberHealth::Suspect };
        let (source, receiver) = (life(1), life(2));
        Packet { root: 7, source, incarnation: 2, receiver, purpose, probe: 5, news: vec![news], words: vec![word] }
    }

    #[test]
    fn packets_come_back() {
        for purpose in [
            Purpose::Ping,
            Purpose::Ack,
            Purpose::PingRequest(life(4)),
            Purpose::IndirectPing(life(4)),
            Purpose::IndirectAck(life(4)),
            Purpose::ForwardedAck(life(4)),
            Purpose::Gossip,
            Purpose::Dead,
        ] {
            let bytes = packet(purpose).encode();
            assert_eq!(Packet::decode(&[&bytes[..], b"later"].concat()), Ok(packet(purpose)));
            for cut in 1..bytes.len() {
                assert!(Packet::decode(&bytes[..cut]).is_err(), "{cut} of {purpose:?}");
            }
        }
    }

    #[test]
    fn later_versions_are_no_offence() {
        let mut bytes = packet(Purpose::Ping).encode();
        bytes[9] = 9;
        assert_eq!(Packet::decode(&bytes), Err(PacketError::Unsupported));
        bytes[0] = 2;
        assert_eq!(Packet::decode(&bytes), Err(PacketError::Unsupported));
        bytes[0] = 0xee;
        assert!(matches!(Packet::decode(&bytes), Err(PacketError::Malformed(_))));
        let mut bytes = packet(Purpose::Ping).encode();
        *bytes.last_mut().unwrap() = 17;
        assert_eq!(Packet::decode(&bytes).unwrap().news, []);
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let mut large = packet(Purpose::Gossip);
        large.words = vec![large.words[0].clone(); 4];
        large.news = vec![large.news[0]; 200];
        let bytes = large.encode();
        assert!((MAX_PACKET_BYTES - 24..=MAX_PACKET_BYTES).contains(&bytes.len()), "{}", bytes.len());
        let read = Packet::decode(&bytes).unwrap();
        assert_eq!((read.words.len(), &read.news[..]), (4, &large.news[..read.news.len()]));
        large.words = vec![large.words[0].clone(); 40];
        let bytes = large.encode();
        assert!(bytes.len() <= MAX_PACKET_BYTES && Packet::decode(&bytes).unwrap().words.len() > 7);
    }

    proptest! {
        #[test]
        fn any_datagram_is_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), version in 0..3u8) {
            if let Some(first) = bytes.first_mut() {
                *first = version;
            }
            let _ = Packet::decode(&bytes);
        }
    }
}
