//! Whatever arrives, from whomever: no panic, and what must hold holds. Signatures are believed here, so that members with
//! valid keys and bad intentions are among the senders.

#[allow(unreachable_pub, reason = "the fuzz targets share it")]
mod watched;

use std::sync::Arc;

use proptest::{collection::vec, prelude::*};
use starling_protocol::{
    Capabilities, Delta, DocumentEdition, DocumentHash, Items, MemberHealth, MeshDocument, NodeKind, NodeRecord, Phase,
    Pong, SignedDocument, SignedRecord, SignedStrike, Strike, StrikeEdition, Summary, encode,
};
use watched::{Said, Step, Told, Watched, id};

const GENERATION: u64 = 1_800_000_000;

/// Few ids, so that steps meet: the node itself, the two that it knows, and strangers.
fn who() -> impl Strategy<Value = u8> {
    prop_oneof![8 => 0..6u8, 1 => any::<u8>()]
}

fn generation() -> impl Strategy<Value = u64> {
    prop_oneof![4 => GENERATION - 2..GENERATION + 4, 1 => any::<u64>()]
}

fn incarnation() -> impl Strategy<Value = u16> {
    prop_oneof![6 => 0..4u16, 1 => any::<u16>(), 1 => Just(u16::MAX)]
}

fn told() -> impl Strategy<Value = Told> {
    let health = prop_oneof![Just(MemberHealth::Alive), Just(MemberHealth::Suspect), Just(MemberHealth::Down)];
    let generation = prop_oneof![6 => Just(0), 2 => -2..3i8, 1 => any::<i8>()];
    (who(), generation, incarnation(), health).prop_map(|(who, generation, incarnation, health)| Told {
        who,
        generation,
        incarnation,
        health,
    })
}

fn members() -> impl Strategy<Value = Vec<Told>> {
    vec(told(), 0..8)
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..200)
}

fn record() -> impl Strategy<Value = Arc<SignedRecord>> {
    let record =
        (who(), generation(), any::<u64>(), any::<bool>(), "[a-c]").prop_map(|(who, generation, seq, up, name)| {
            SignedRecord::encode_body(&NodeRecord {
                id: id(who),
                generation,
                seq,
                name: name.parse().expect("a name"),
                addr: ([10, 0, 0, who], 7400).into(),
                kind: NodeKind::Node,
                zone: String::new(),
                services: Vec::new(),
                phase: if up { Phase::Up } else { Phase::Left },
                cert_expires: u64::MAX,
                issuer: None,
                speaks: Capabilities::own("0"),
            })
            .to_vec()
        });
    prop_oneof![4 => record, 1 => bytes()]
        .prop_map(|body| Arc::new(SignedRecord { body: body.into(), signature: Default::default(), chain: Vec::new() }))
}

fn document() -> impl Strategy<Value = Arc<SignedDocument>> {
    let document = ("[a-z]{1,2}", any::<u64>(), any::<Option<u64>>()).prop_map(|(kind, version, expires)| {
        SignedDocument::encode_body(&MeshDocument {
            kind: kind.parse().expect("a name"),
            version,
            previous: DocumentHash::default(),
            not_before: 0,
            expires,
            deleted: false,
            content: Default::default(),
            understood: true,
        })
        .to_vec()
    });
    prop_oneof![4 => document, 1 => bytes()].prop_map(|body| {
        let (signature, certificate) = Default::default();
        Arc::new(SignedDocument { body: body.into(), signature, certificate })
    })
}

fn strike() -> impl Strategy<Value = Strike> {
    (who(), generation(), any::<bool>()).prop_map(|(who, generation, prune)| Strike { id: id(who), generation, prune })
}

fn said() -> impl Strategy<Value = Said> {
    let kind = prop_oneof![4 => 1..3u8, 1 => any::<u8>()];
    (told(), who(), kind, any::<bool>()).prop_map(|(of, by, kind, raised)| Said { of, by, kind, raised })
}

fn items() -> impl Strategy<Value = Vec<u8>> {
    let strikes = vec(strike(), 0..4).prop_map(|strikes| {
        let signed = |strike: &Strike| {
            let (signature, certificate) = Default::default();
            Arc::new(SignedStrike { body: SignedStrike::encode_body(strike), signature, certificate })
        };
        strikes.iter().map(signed).collect::<Vec<_>>()
    });
    (vec(record(), 0..4), vec(document(), 0..4), strikes)
        .prop_map(|(records, documents, strikes)| encode(&Items { records, documents, strikes, words: Vec::new() }))
}

fn summary() -> impl Strategy<Value = Vec<u8>> {
    let document = ("[a-z]{1,2}", any::<u64>(), any::<[u8; 32]>()).prop_map(|(kind, version, hash)| DocumentEdition {
        kind: kind.parse().expect("a name"),
        version,
        hash: DocumentHash(hash),
    });
    let strikes = vec(strike().prop_map(|strike| strike.edition()), 0..4);
    (vec(document, 0..4), strikes, any::<u32>(), any::<bool>()).prop_map(
        |(documents, strikes, standing, appeals): (_, Vec<StrikeEdition>, _, _)| {
            encode(&Summary { members: Vec::new(), documents, strikes, standing, appeals })
        },
    )
}

fn delta() -> impl Strategy<Value = Vec<u8>> {
    let wanted = vec(who().prop_map(id), 0..4);
    (items(), wanted, any::<u64>(), any::<u32>()).prop_map(|(items, wanted, deaf_ms, standing)| {
        encode(&Delta {
            items: starling_protocol::decode(&items).expect("items"),
            wanted_records: wanted.clone(),
            wanted_words: wanted.clone(),
            wanted_strikes: wanted,
            wanted_documents: vec!["a".parse().expect("a name")],
            deaf_ms,
            standing,
            ..Delta::default()
        })
    })
}

fn step() -> impl Strategy<Value = Step> {
    let pong = (generation(), incarnation()).prop_map(|(generation, incarnation)| Pong { generation, incarnation });
    prop_oneof![
        20 => prop_oneof![3 => 0..600u16, 1 => 0..10_000u16].prop_map(|ms| Step::Run { ms }),
        2 => any::<u16>().prop_map(|s| Step::Stall { s }),
        4 => (who(), bytes()).prop_map(|(from, bytes)| Step::Datagram { from, bytes }),
        6 => (told(), bytes()).prop_map(|(from, rest)| Step::Packet { from, rest }),
        20 => (told(), any::<u8>(), told(), members(), vec(said(), 0..5))
            .prop_map(|(from, message, about, updates, words)| Step::Tell { from, message, about, updates, words }),
        8 => (who(), told(), any::<u8>(), prop::bool::weighted(0.1))
            .prop_map(|(from, whose, seq, left)| Step::Introduce { from, whose, seq, left }),
        6 => (who(), members(), summary()).prop_map(|(from, members, summary)| Step::Answer { from, members, summary }),
        6 => (who(), members(), delta()).prop_map(|(from, members, delta)| Step::Absorb { from, members, delta }),
        6 => (who(), items()).prop_map(|(from, items)| Step::Receive { from, items }),
        3 => (who(), any::<Option<u16>>()).prop_map(|(from, suspected)| Step::Ping { from, suspected }),
        3 => (told(), prop::option::of(pong)).prop_map(|(suspect, pong)| Step::Checked { suspect, pong }),
        1 => Just(Step::Leave),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_input_in_any_order(steps in vec(step(), 1..40)) {
        let mut watched = Watched::new(0);
        steps.into_iter().for_each(|step| watched.step(step));
    }

    /// What a real node sends, with bytes changed, cut off or put in.
    #[test]
    fn real_packets_that_were_altered(
        changes in vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..60),
    ) {
        // Its first acquaintance is the node under watch.
        let mut sender = Watched::new(255);
        sender.step(Step::Run { ms: 5000 });
        let mut packets: Vec<Vec<u8>> =
            std::mem::take(&mut sender.sent).into_iter().filter(|(to, _)| *to == id(0)).map(|(_, p)| p).collect();
        prop_assert!(!packets.is_empty());
        let mut watched = Watched::new(0);
        let count = packets.len();
        for (n, (at, byte, how)) in changes.into_iter().enumerate() {
            let packet = &mut packets[n % count];
            let at = at.index(packet.len() + 1);
            match how {
                0 => packet.truncate(at.max(1)),
                1 => packet.insert(at, byte),
                _ => packet[at.saturating_sub(1)] = byte,
            }
            watched.step(Step::Datagram { from: 255, bytes: packet.clone() });
            watched.step(Step::Run { ms: 100 });
        }
    }
}
