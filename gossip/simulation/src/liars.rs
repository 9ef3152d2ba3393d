//! Members that lie: they have valid keys, and send whatever might hurt others.

use std::sync::Arc;

use bytes::Bytes;
use rand::RngExt;
use starling_gossip::{Credentials, Ident};
use starling_protocol::{
    Capabilities, Delta, Items, Life, MemberHealth, MemberState, News, NodeId, NodeKind, NodeRecord, Packet, Phase,
    Purpose, SignedRecord, SignedStrike, Strike, StrikeEdition, Summary, Word,
};

use crate::{credentials::SimulatedKey, world::World};

/// Phantoms that are named in one message.
const PHANTOMS: usize = 30;

impl World {
    /// One round of lies.
    pub(crate) fn lie(&mut self, liar: usize, liars: &[usize]) {
        if self.nodes[liar].gossip.is_none() {
            return;
        }
        let honest: Vec<usize> = self.running().into_iter().filter(|node| !liars.contains(node)).collect();
        // Those who collude choose the same victim: the one whose turn it is.
        let victim = honest[(self.now.as_millis() / 1000) as usize % honest.len()];
        for _ in 0..4 {
            let to = honest[self.rng.random_range(0..honest.len())];
            self.lie_to(liar, to, victim);
        }
        self.lie_to(liar, victim, victim);
    }

    fn lie_to(&mut self, liar: usize, to: usize, victim: usize) {
        let now = self.instant();
        let kind = self.rng.random_range(0..14);
        let from = self.id_of(liar);
        let (source, receiver) = (self.life(liar), self.life(to));
        let about = self.life(victim);
        let incarnation = self.incarnation(victim);
        let plain = Packet {
            root: self.rng.random(),
            source,
            incarnation: self.incarnation(liar),
            receiver,
            purpose: Purpose::Gossip,
            probe: 7,
            news: Vec::new(),
            words: Vec::new(),
        };
        let news = |health, incarnation| vec![News { life: about, incarnation, health }];
        let key = SimulatedKey(from, self.interned.clone());
        let word = |kind, by: NodeId, subject: Life, incarnation, raised| {
            let Life { id, generation } = subject;
            let mut word = Word { kind, subject: id, generation, incarnation, by, raised, signature: Vec::new() };
            word.signature = key.sign_word(&word.signed_bytes());
            word
        };
        let everybody = |world: &Self, health, jump: u16| -> Vec<MemberState> {
            let states = (0..world.nodes.len()).map(|node| {
                let Life { id, generation } = world.life(node);
                let incarnation = world.incarnation(node).saturating_add(jump);
                MemberState { id, generation, seq: 1, incarnation, health, down_s: 3 }
            });
            states.collect()
        };
        let packet = match kind {
            // Deaths, of the victim and of the receiver itself.
            0 => Packet { news: news(MemberHealth::Down, incarnation), ..plain },
            1 => Packet { purpose: Purpose::Dead, ..plain },
            // Incarnations that nobody can outdo.
            2 => Packet {
                purpose: Purpose::Ping,
                news: [news(MemberHealth::Suspect, u16::MAX), news(MemberHealth::Alive, u16::MAX - 1)].concat(),
                ..plain
            },
            // A true signature under a false accusation, and another's name under the own signature.
            3 | 4 => Packet { words: vec![word(Word::ACCUSES, from, about, incarnation, true)], ..plain },
            5 => {
                let other = self.id_of((victim + 1) % self.nodes.len());
                let words = [
                    word(Word::ACCUSES, other, about, incarnation, true),
                    word(Word::LIVES, about.id, about, incarnation + 9, true),
                    word(Word::ACCUSES, other, about, incarnation, false),
                ];
                Packet { words: words.into(), ..plain }
            }
            // Phantoms, and probes of them.
            6 => {
                let generation = about.generation;
                let phantom = |_| Life { id: NodeId(self.rng.random()), generation };
                let phantoms: Vec<Life> = (0..PHANTOMS).map(phantom).collect();
                let purpose = match self.rng.random_range(0..3) {
                    0 => Purpose::PingRequest(phantoms[0]),
                    1 => Purpose::IndirectAck(phantoms[0]),
                    _ => Purpose::Gossip,
                };
                let health = MemberHealth::Alive;
                let news = phantoms.into_iter().map(|life| News { life, incarnation: 0, health }).collect();
                Packet { purpose, news, ..plain }
            }
            7 => {
                return self.with(to, |gossip, _| {
                    for suspected in [0, incarnation, u16::MAX] {
                        gossip.answer_ping(from, Some(suspected), now);
                    }
                });
            }
            8 | 9 => {
                let members = everybody(self, MemberHealth::Down, 0);
                let strikes = vec![StrikeEdition { id: about.id, generation: u64::MAX, prune: true }];
                let summary =
                    Summary { members, strikes, standing: u32::MAX, appeals: kind == 9, ..Summary::default() };
                return self.with(to, |gossip, _| drop(gossip.answer(from, summary, now)));
            }
            10 => {
                let members = everybody(self, MemberHealth::Down, 300);
                let delta = Delta { members, deaf_ms: 1 << 40, standing: u32::MAX, ..Delta::default() };
                let with = Ident { id: from, addr: ([10, 0, 0, 1], 1).into(), generation: source.generation };
                return self.with(to, |gossip, _| {
                    drop(gossip.absorb(from, starling_gossip::Target::Node(with), delta, now));
                });
            }
            11 => {
                // The record of a phantom, and of the victim in its next life, under the liar's own signature.
                let record = |id, generation| NodeRecord {
                    id,
                    generation,
                    seq: 1 << 40,
                    name: "forged".parse().unwrap(),
                    addr: ([10, 0, 0, 1], 1).into(),
                    kind: NodeKind::Node,
                    zone: "forged".into(),
                    services: Vec::new(),
                    phase: Phase::Left,
                    cert_expires: u64::MAX,
                    issuer: None,
                    speaks: Capabilities::own("0"),
                };
                let records =
                    [record(NodeId(self.rng.random()), about.generation), record(about.id, about.generation + 1)];
                let records = records.iter().map(|record| {
                    let body = SignedRecord::encode_body(record);
                    Arc::new(SignedRecord { signature: key.sign_word(&body).into(), body, chain: Vec::new() })
                });
                let items = Items { records: records.collect(), ..Items::default() };
                return self.with(to, |gossip, _| gossip.receive(from, items, starling_gossip::Via::Push, now));
            }
            12 => {
                let strike = Strike { id: about.id, generation: u64::MAX, prune: true };
                let body = SignedStrike::encode_body(&strike);
                let signature = key.sign_word(&body).into();
                let signed = Arc::new(SignedStrike { body, signature, certificate: Bytes::new() });
                let items = Items { strikes: vec![signed], ..Items::default() };
                return self.with(to, |gossip, _| gossip.receive(from, items, starling_gossip::Via::Exchange, now));
            }
            _ => {
                let noise: [u8; 64] = self.rng.random();
                return self.with(to, |gossip, _| {
                    gossip.deliver(from, &[&[1], &noise[..]].concat(), now);
                    gossip.malformed(from, now);
                });
            }
        };
        self.lies += 1;
        let bytes = packet.encode();
        self.with(to, |gossip, _| gossip.deliver(from, &bytes, now));
    }

    fn life(&self, node: usize) -> Life {
        Life { id: self.id_of(node), generation: self.truth.generation[node] }
    }

    /// As the node itself says.
    fn incarnation(&self, node: usize) -> u16 {
        self.nodes[node].gossip.as_ref().map_or(0, |gossip| gossip.incarnation())
    }
}
