use bytes::Bytes;
use starling_protocol::{Capabilities, MeshDocument, NodeKind, SignedDocument, SignedRecord, SignedStrike, Strike};

use super::*;
use crate::{DocumentError, Profile, RecordError};

/// A key that signs with its owner's number.
struct TestKey(u8);

impl Credentials for TestKey {
    fn sign(&self, _: &NodeRecord) -> SignedRecord {
        unreachable!("membership signs no records")
    }
    fn verify(&self, _: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError> {
        unreachable!("nor does it verify them")
    }
    fn sign_word(&self, bytes: &[u8]) -> Vec<u8> {
        [&[self.0], bytes].concat()
    }
    fn verify_word(&self, signer: &SignedRecord, bytes: &[u8], signature: &[u8]) -> bool {
        signature == [&signer.body[..1], bytes].concat()
    }
    fn verify_document(&self, _: &SignedDocument) -> Result<MeshDocument, DocumentError> {
        unreachable!("nor documents")
    }
    fn verify_strike(&self, _: &SignedStrike) -> Result<Strike, RecordError> {
        unreachable!("nor strikes")
    }
}

fn ident(n: u8) -> Ident {
    Ident { id: NodeId([n; 16]), addr: ([127, 0, 0, n], 7400).into(), generation: 1 }
}

fn record(n: u8, generation: u64) -> NodeRecord {
    NodeRecord {
        id: ident(n).id,
        generation,
        seq: 1,
        name: format!("n{n}").parse().unwrap(),
        addr: ident(n).addr,
        kind: NodeKind::Node,
        zone: String::new(),
        services: Vec::new(),
        phase: Phase::Up,
        cert_expires: u64::MAX,
        issuer: None,
        speaks: Capabilities::own("0"),
    }
}

/// A node's membership, and what it stands on.
struct Node {
    membership: Membership,
    records: Records,
    trust: Trust,
}

impl Node {
    fn new(n: u8) -> Self {
        let config = Config { seed: n.into(), ..Config::new(Profile::Lan) };
        let membership = Membership::new(ident(n), &config, Arc::new(TestKey(n)));
        let mut node = Self { membership, records: Records::default(), trust: Trust::default() };
        node.put(record(n, 1));
        node
    }

    /// One that knows those others.
    fn knowing(n: u8, others: &[u8], now: Instant) -> Self {
        let mut node = Self::new(n);
        others.iter().for_each(|other| node.meet(record(*other, 1), now));
        node
    }

    fn put(&mut self, record: NodeRecord) {
        let body = SignedRecord::encode_body(&record);
        self.records.put(Arc::new(record), Arc::new(SignedRecord { body, signature: Bytes::new(), chain: Vec::new() }));
    }

    fn meet(&mut self, record: NodeRecord, now: Instant) {
        self.put(record.clone());
        self.membership.meet([&record].into_iter(), 1, &HashMap::new(), now);
    }

    fn grounds(&mut self, now: Instant) -> (&mut Membership, Grounds<'_>) {
        (&mut self.membership, Grounds { records: &self.records, trust: &mut self.trust, now })
    }

    fn packet(&mut self, from: u8, packet: &Packet, now: Instant) -> Result<Vec<Effect>, String> {
        let known = self.membership.others().find(|m| m.id == ident(from).id);
        let (membership, mut grounds) = self.grounds(now);
        membership.packet(ident(from).id, known.as_ref(), packet, &mut grounds)
    }

    fn tick(&mut self, now: Instant) -> Vec<Effect> {
        let (membership, mut grounds) = self.grounds(now);
        membership.tick(&mut grounds)
    }

    /// What node `from` says of others without a signature.
    fn told(&mut self, from: u8, of: &[(u8, u16, MemberHealth)], now: Instant) -> Vec<Effect> {
        let state = |&(n, incarnation, health): &(u8, u16, MemberHealth)| MemberState {
            id: ident(n).id,
            generation: 1,
            seq: 1,
            incarnation,
            health,
            down_s: 0,
        };
        let states: Vec<MemberState> = of.iter().map(state).collect();
        let (membership, mut grounds) = self.grounds(now);
        membership.learn(ident(from).id, &states, &mut grounds)
    }

    /// It turns out that those that are to be checked give no answer.
    fn fail_checks(&mut self, effects: &[Effect], now: Instant) {
        for effect in effects {
            if let Effect::Check { suspect, incarnation } = effect {
                self.membership.check_failed(suspect, *incarnation, now);
            }
        }
    }

    /// Those answer.
    fn pass_checks(&mut self, effects: &[Effect], incarnation: u16, now: Instant) {
        for effect in effects {
            if let Effect::Check { suspect, .. } = effect {
                let pong = Pong { generation: suspect.generation, incarnation };
                let (membership, mut grounds) = self.grounds(now);
                membership.vouched(suspect, pong, &mut grounds);
            }
        }
    }

    /// Runs the timers for some simulated time; everything that it wants done.
    fn run(&mut self, now: &mut Instant, ms: u64) -> Vec<Effect> {
        let end = *now + Duration::from_millis(ms);
        let mut effects = Vec::new();
        while let Some(at) = self.membership.next_timer().filter(|at| *at <= end) {
            *now = at;
            effects.extend(self.tick(at));
        }
        *now = end;
        effects
    }

    fn health_of(&self, n: u8) -> Option<MemberHealth> {
        self.membership.others().find(|m| m.id == ident(n).id).map(|m| m.health)
    }

    fn says(&self, to: u8, purpose: Purpose) -> Packet {
        self.membership.craft(ident(to).life(), purpose)
    }
}

/// Node `by` accuses that one.
fn accusation(by: u8, of: u8, incarnation: u16) -> Word {
    let Life { id: subject, generation } = ident(of).life();
    let (kind, by_id) = (Word::ACCUSES, ident(by).id);
    let mut word = Word { kind, subject, generation, incarnation, by: by_id, raised: true, signature: Vec::new() };
    word.signature = TestKey(by).sign_word(&word.signed_bytes());
    word
}

fn checks(effects: &[Effect]) -> Vec<u8> {
    let suspect = |effect: &Effect| match effect {
        Effect::Check { suspect, .. } => Some(suspect.id.0[0]),
        _ => None,
    };
    effects.iter().filter_map(suspect).collect()
}

fn sent(effects: &[Effect]) -> impl Iterator<Item = (u8, &Packet)> {
    effects.iter().filter_map(|effect| match effect {
        Effect::Send { to, packet, .. } => Some((to.id.0[0], packet)),
        _ => None,
    })
}

/// The suspicion of node 2 that node 1 has when 2 does not answer.
fn suspecting(now: &mut Instant) -> (Node, Vec<Effect>) {
    let mut a = Node::knowing(1, &[2], *now);
    let effects = a.run(now, 1100);
    assert_eq!(a.health_of(2), Some(MemberHealth::Suspect));
    (a, effects)
}

#[test]
fn a_suspect_is_told_and_asked_over_a_stream_and_only_then_given_up() {
    let mut now = Instant::now();
    let (mut a, effects) = suspecting(&mut now);
    assert_eq!(checks(&effects), [2]);
    a.run(&mut now, 2500);
    assert_eq!(a.health_of(2), Some(MemberHealth::Suspect), "the stream has not given its answer yet");
    a.fail_checks(&effects, now);
    a.run(&mut now, 100);
    assert_eq!(a.health_of(2), Some(MemberHealth::Down));
}

#[test]
fn a_suspect_that_is_told_refutes_to_the_one_who_told_it() {
    let mut now = Instant::now();
    let (mut a, effects) = suspecting(&mut now);
    let mut b = Node::knowing(2, &[1], now);
    let mut answers = Vec::new();
    for (_, packet) in sent(&effects).filter(|(to, _)| *to == 2) {
        answers.extend(b.packet(1, packet, now).unwrap());
    }
    for (_, packet) in sent(&answers).filter(|(to, _)| *to == 1) {
        a.packet(2, packet, now).unwrap();
    }
    let state = a.membership.others().next().unwrap();
    assert_eq!((state.health, state.incarnation), (MemberHealth::Alive, 1));
    a.fail_checks(&effects, now);
    now += Duration::from_secs(10);
    a.tick(now);
    assert_ne!(a.health_of(2), Some(MemberHealth::Down), "it was refuted in time");
}

/// How long until node 1 gives up node 2, which is silent, within 30 s. Node 3 is heard or not, and accuses node 2, too, or
/// has no complaint.
fn given_up_after(heard: bool, accuses: bool, doubts: bool) -> Option<Duration> {
    let start = Instant::now();
    let mut now = start;
    let (mut a, c) = (Node::knowing(1, &[2, 3], now), Node::new(3));
    while now < start + Duration::from_secs(30) {
        for _ in 0..if doubts { 8 } else { 0 } {
            a.membership.awareness.worse();
        }
        if heard {
            a.packet(3, &c.says(1, Purpose::Gossip), now).unwrap();
        }
        let mut effects = a.run(&mut now, 100);
        let pings: Vec<u8> = sent(&effects)
            .filter(|(to, packet)| *to == 3 && heard && packet.purpose == Purpose::Ping)
            .map(|(_, packet)| packet.probe)
            .collect();
        for probe in pings {
            let words = if accuses { vec![accusation(3, 2, 0)] } else { Vec::new() };
            let ack = Packet { probe, words, ..c.says(1, Purpose::Ack) };
            effects.extend(a.packet(3, &ack, now).unwrap());
        }
        a.fail_checks(&effects, now);
        if a.health_of(2) == Some(MemberHealth::Down) {
            return Some(now - start);
        }
    }
    None
}

#[test]
fn whom_nobody_else_accuses_is_not_given_up_while_others_are_heard() {
    assert_eq!(given_up_after(true, false, false), None);
    assert!(given_up_after(false, false, false).is_some());
}

#[test]
fn who_doubts_itself_leaves_the_verdict_to_others_while_they_are_heard() {
    let [sure, doubtful] = [false, true].map(|doubts| given_up_after(true, true, doubts).unwrap());
    assert!(sure < Duration::from_secs(4) && doubtful > Duration::from_secs(12), "{sure:?}, {doubtful:?}");
    let alone = given_up_after(false, false, true).unwrap();
    assert!(alone < Duration::from_secs(20), "{alone:?}");
}

#[test]
fn who_hears_nobody_keeps_its_verdicts_to_itself() {
    let mut now = Instant::now();
    let mut a = Node::knowing(1, &[2, 3, 4], now);
    let mut packets = Vec::new();
    for _ in 0..60 {
        let effects = a.run(&mut now, 1000);
        packets.extend(sent(&effects).map(|(_, packet)| packet.clone()));
        a.fail_checks(&effects, now);
    }
    assert_eq!([2, 3, 4].map(|n| a.health_of(n)), [Some(MemberHealth::Down); 3]);
    let told = a.membership.states(&a.records, now);
    assert!(told.iter().all(|state| state.health == MemberHealth::Alive), "it tells nobody of them: {told:?}");
    assert!(packets.len() > 50, "{} packets", packets.len());
    for packet in packets {
        assert_ne!(packet.purpose, Purpose::Dead);
        assert!(packet.news.iter().all(|news| news.health != MemberHealth::Down));
    }
    // One of them is there: so it was this node.
    let effects = a.packet(2, &Node::new(2).says(1, Purpose::Ping), now).unwrap();
    assert!(effects.contains(&Effect::Lost) && a.membership.is_lost(), "{effects:?}");
}

#[test]
fn what_was_concluded_alone_is_told_once_others_have_been_heard_for_a_minute() {
    let mut now = Instant::now();
    let mut a = Node::knowing(1, &[2, 3], now);
    let second = |a: &mut Node, now: &mut Instant| {
        let effects = a.run(now, 100);
        for (_, ping) in sent(&effects).filter(|(to, packet)| *to == 4 && packet.purpose == Purpose::Ping) {
            let ack = Packet { probe: ping.probe, ..Node::new(4).says(1, Purpose::Ack) };
            a.packet(4, &ack, *now).unwrap();
        }
        a.fail_checks(&effects, *now);
        a.tick(*now);
    };
    (0..300).for_each(|_| second(&mut a, &mut now));
    assert_eq!([2, 3].map(|n| a.health_of(n)), [Some(MemberHealth::Down); 2]);
    let tells = |a: &Node, now| {
        let states = a.membership.states(&a.records, now);
        states.iter().any(|m| m.id == ident(2).id && m.health == MemberHealth::Down)
    };
    a.meet(record(4, 1), now);
    for heard in 0..800 {
        assert!(heard > 600 || !tells(&a, now), "after {} s", heard / 10);
        a.packet(4, &Node::new(4).says(1, Purpose::Gossip), now).unwrap();
        second(&mut a, &mut now);
    }
    assert!(tells(&a, now));
}

#[test]
fn a_probe_ends_when_everybody_who_was_asked_has_failed_too() {
    for failed in [1, 2] {
        let mut now = Instant::now();
        let mut a = Node::knowing(1, &[2, 3, 4], now);
        let mut asked = Vec::new();
        while asked.is_empty() {
            let effects = a.run(&mut now, 10);
            let packets: Vec<(u8, Packet)> = sent(&effects).map(|(to, packet)| (to, packet.clone())).collect();
            for (to, packet) in packets {
                match packet.purpose {
                    Purpose::PingRequest(_) => asked.push(to),
                    // Nodes 3 and 4 answer.
                    Purpose::Ping if to != 2 => {
                        let ack = Packet { probe: packet.probe, ..Node::new(to).says(1, Purpose::Ack) };
                        a.packet(to, &ack, now).unwrap();
                    }
                    _ => {}
                }
            }
        }
        assert_eq!(asked.len(), 2);
        for by in &asked[..failed] {
            let nack = Word { raised: false, ..accusation(*by, 2, 0) };
            let packet = Packet { words: vec![nack], ..Node::new(*by).says(1, Purpose::Gossip) };
            a.packet(*by, &packet, now).unwrap();
        }
        a.run(&mut now, 1);
        let expected = if failed == 2 { MemberHealth::Suspect } else { MemberHealth::Alive };
        assert_eq!(a.health_of(2), Some(expected), "{failed} of 2 have failed");
    }
}

#[test]
fn a_node_that_was_stalled_does_not_blame_others() {
    let mut now = Instant::now();
    let (mut a, effects) = suspecting(&mut now);
    a.fail_checks(&effects, now);
    let doubt = a.membership.doubt();
    now += Duration::from_secs(60);
    a.tick(now);
    assert_eq!(a.health_of(2), Some(MemberHealth::Suspect));
    assert_eq!(a.membership.doubt(), doubt + 1);
    let again = a.run(&mut now, 2000);
    assert!(!checks(&again).is_empty(), "what was heard before the stall is no evidence any more");
    a.fail_checks(&again, now);
    a.run(&mut now, 100);
    assert_eq!(a.health_of(2), Some(MemberHealth::Down));
}

#[test]
fn complaints_are_a_reason_to_look_and_no_more() {
    let mut now = Instant::now();
    let others = [2, 3, 4, 5, 6];
    let mut a = Node::knowing(1, &others, now);
    a.packet(3, &Node::new(3).says(1, Purpose::Gossip), now).unwrap();
    // One accuser is not enough to look, and two are; one who holds it for dead is.
    let accuse = |a: &mut Node, by: u8, now: Instant| {
        let packet = Packet { words: vec![accusation(by, 2, 0)], ..Node::new(by).says(1, Purpose::Gossip) };
        a.packet(by, &packet, now).unwrap()
    };
    assert_eq!(checks(&accuse(&mut a, 3, now)), []);
    let effects = accuse(&mut a, 4, now);
    assert_eq!(checks(&effects), [2]);
    a.pass_checks(&effects, 1, now);
    assert_eq!(a.health_of(2), Some(MemberHealth::Alive));
    assert_eq!([3, 4].map(|by| a.trust.refused(&ident(by).id).complaints), [1, 1]);
    for n in 0..100 {
        let effects = a.told(3, &[(2, 1, MemberHealth::Down)], now);
        assert!(n < 3 || checks(&effects).is_empty(), "who complains in vain is not heard for ever");
        a.pass_checks(&effects, 1, now);
        a.run(&mut now, 10);
        assert_ne!(a.health_of(2), Some(MemberHealth::Down));
    }
    // If it does not answer, it is given up, as the accusers say.
    let mut b = Node::knowing(1, &others, now);
    b.packet(5, &Node::new(5).says(1, Purpose::Gossip), now).unwrap();
    let mut effects = Vec::new();
    for by in [3, 4, 5] {
        effects.extend(accuse(&mut b, by, now));
    }
    assert_eq!(checks(&effects), [2]);
    for _ in 0..100 {
        b.fail_checks(&effects, now);
        effects = b.run(&mut now, 100);
    }
    assert_eq!(b.health_of(2), Some(MemberHealth::Down));
}

#[test]
fn words_count_with_the_signature_of_who_says_them() {
    let now = Instant::now();
    let mut a = Node::knowing(1, &[2, 3, 4], now);
    let forged = Word { signature: vec![7], ..accusation(4, 2, 0) };
    let of_another = Word { by: ident(4).id, ..accusation(3, 2, 0) };
    let lives = Word { kind: Word::LIVES, ..accusation(3, 2, 9) };
    let stranger = accusation(9, 2, 0);
    let ahead = accusation(3, 2, 5);
    let later = Word { kind: 99, ..accusation(3, 2, 0) };
    let packet = Packet {
        words: vec![forged, of_another, lives, stranger, ahead, later],
        ..Node::new(3).says(1, Purpose::Gossip)
    };
    a.packet(3, &packet, now).unwrap();
    assert_eq!(a.membership.accusations.against(&ident(2), 0), []);
    // Of the two in node 4's name one is looked at.
    assert_eq!(a.trust.refused(&ident(3).id).forged, 2);
    assert_eq!(a.membership.others().find(|m| m.id == ident(2).id).unwrap().incarnation, 0);
    // Its own word, whoever passes it on, counts.
    let mut own = Word { kind: Word::LIVES, by: ident(2).id, ..accusation(2, 2, 9) };
    own.signature = TestKey(2).sign_word(&own.signed_bytes());
    let packet = Packet { words: vec![own], ..Node::new(3).says(1, Purpose::Gossip) };
    a.packet(3, &packet, now).unwrap();
    assert_eq!(a.membership.others().find(|m| m.id == ident(2).id).unwrap().incarnation, 9);
}

#[test]
fn who_is_called_dead_asks_around() {
    for (dead, others) in [(false, &[3, 4, 5][..]), (true, &[3, 4, 5]), (true, &[])] {
        let mut now = Instant::now();
        let mut a = Node::knowing(1, &[&[2], others].concat(), now);
        let effects = a.packet(2, &Node::new(2).says(1, Purpose::Dead), now).unwrap();
        assert!(!a.membership.is_lost());
        let pings = |effects: &[Effect]| -> Vec<(u8, u8)> {
            sent(effects).filter(|(_, p)| p.purpose == Purpose::Ping).map(|(to, ping)| (to, ping.probe)).collect()
        };
        let asked = pings(&effects);
        assert_eq!(asked.len(), others.len().max(1));
        let purpose = if dead { Purpose::Dead } else { Purpose::Ack };
        let (mut effects, mut asked) = (Vec::new(), asked);
        // Two juries must find so.
        for _ in 0..2 {
            let mut next = Vec::new();
            for (juror, probe) in std::mem::take(&mut asked) {
                let says = |purpose, probe| Packet { probe, ..Node::new(juror).says(1, purpose) };
                // What it sent before it knew of any death is no answer.
                next.extend(a.packet(juror, &says(Purpose::Ack, probe.wrapping_add(1)), now).unwrap());
                next.extend(a.packet(juror, &says(purpose, probe), now).unwrap());
            }
            asked.extend(pings(&next));
            effects.extend(next);
        }
        effects.extend(a.run(&mut now, 400));
        assert_eq!(a.membership.is_lost(), dead, "{effects:?}");
        assert_eq!(effects.contains(&Effect::Lost), dead);
        // The one that said so is shown that it is wrong.
        assert_eq!(effects.contains(&Effect::Appeal(ident(2))), !dead);
        assert_eq!(a.trust.refused(&ident(2).id).complaints, u64::from(!dead));
    }
}

#[test]
fn an_appeal_is_heard_and_who_answers_is_a_member_again() {
    let mut now = Instant::now();
    let (mut a, effects) = suspecting(&mut now);
    a.fail_checks(&effects, now);
    a.run(&mut now, 3000);
    assert_eq!(a.health_of(2), Some(MemberHealth::Down));
    let hear = |a: &mut Node, incarnation| {
        let (membership, mut grounds) = a.grounds(now);
        membership.hear_appeal(ident(2), incarnation, &mut grounds)
    };
    assert_eq!(checks(&hear(&mut a, 0)), [], "at an incarnation that was given up");
    let effects = hear(&mut a, 1);
    assert_eq!(checks(&effects), [2]);
    assert_eq!(a.health_of(2), Some(MemberHealth::Down), "it has not answered yet");
    a.pass_checks(&effects, 1, now);
    assert_eq!(a.health_of(2), Some(MemberHealth::Alive));
    // Without an appeal an answer changes nothing: the dead do not come and go.
    let (mut b, effects) = suspecting(&mut now);
    b.fail_checks(&effects, now);
    b.run(&mut now, 3000);
    b.pass_checks(&effects, 1, now);
    assert_eq!(b.health_of(2), Some(MemberHealth::Down));
}

#[test]
fn a_suspicion_of_this_node_is_refuted_in_small_steps_and_not_for_ever() {
    let now = Instant::now();
    let mut a = Node::knowing(1, &[2, 3], now);
    let suspect = |a: &mut Node, by: u8, incarnation| {
        let (membership, mut grounds) = a.grounds(now);
        membership.refute(ident(by).id, incarnation, &mut grounds).0.incarnation
    };
    assert_eq!(suspect(&mut a, 2, u16::MAX), 0, "an incarnation that this node never had");
    assert_eq!(suspect(&mut a, 2, 0), 1);
    assert_eq!(suspect(&mut a, 2, 0), 1, "refuted already");
    (1..100).for_each(|n| assert!(suspect(&mut a, 2, n) < 10));
    assert!(a.membership.own_state().incarnation < 10, "one member alone");
    let before = a.membership.own_state().incarnation;
    assert_eq!(suspect(&mut a, 3, before), before + 1, "another is heard all the same");
}

#[test]
fn who_is_declared_dead_comes_back_in_a_new_life_once_it_is_heard() {
    let mut now = Instant::now();
    let mut a = Node::knowing(1, &[2], now);
    let effects = a.membership.concede(now);
    assert!(effects.contains(&Effect::Lost) && a.membership.is_lost(), "{effects:?}");
    a.run(&mut now, 5000);
    assert!(a.membership.is_lost(), "nobody has answered");
    let mut b = Node::knowing(2, &[1], now);
    for _ in 0..40 {
        let effects = a.run(&mut now, 150);
        let pings: Vec<Packet> = sent(&effects).map(|(_, packet)| packet.clone()).collect();
        for ping in pings {
            let answers = b.packet(1, &ping, now).unwrap();
            for (_, answer) in sent(&answers).filter(|(to, _)| *to == 1) {
                a.packet(2, answer, now).unwrap();
            }
        }
    }
    assert!(!a.membership.is_lost());
    assert_eq!(a.membership.me().generation, 2);
}

#[test]
fn nobody_is_a_member_without_a_record() {
    let now = Instant::now();
    let (mut a, b) = (Node::new(1), Node::new(2));
    assert!(a.packet(3, &b.says(1, Purpose::Ping), now).is_err(), "it speaks for another");
    let effects = a.packet(2, &b.says(1, Purpose::Ping), now).unwrap();
    assert_eq!(a.membership.others().count(), 0);
    let acks: Vec<u8> = sent(&effects).filter(|(_, p)| p.purpose == Purpose::Ack).map(|(to, _)| to).collect();
    assert!(effects.contains(&Effect::Introduce(ident(2).id)) && acks == [2], "it is answered: {effects:?}");
    a.meet(record(2, 1), now);
    assert_eq!(a.membership.others().count(), 1);
    // Phantoms, as news and as targets.
    let phantom = News { life: ident(9).life(), incarnation: 0, health: MemberHealth::Alive };
    for purpose in [Purpose::Gossip, Purpose::PingRequest(ident(9).life()), Purpose::IndirectAck(ident(9).life())] {
        let packet = Packet { news: vec![phantom; 3], ..b.says(1, purpose) };
        let effects = a.packet(2, &packet, now).unwrap();
        assert!(sent(&effects).all(|(to, _)| to == 2), "{effects:?}");
    }
    assert_eq!(a.membership.others().count(), 1);
    let strangers = |a: &Node| a.trust.refused(&ident(2).id).strangers;
    assert_eq!(strangers(&a), 0, "its record may still come");
    let packet = Packet { news: vec![phantom], ..b.says(1, Purpose::Gossip) };
    a.packet(2, &packet, now + Duration::from_secs(11)).unwrap();
    assert_eq!(strangers(&a), 1, "it has not");
    let crowd = (10..60).map(|n| News { life: ident(n).life(), ..phantom });
    let packet = Packet { news: crowd.collect(), ..b.says(1, Purpose::Gossip) };
    a.packet(2, &packet, now + Duration::from_secs(11)).unwrap();
    assert!(strangers(&a) > 10, "nobody has that many new friends");
    // A record of a later life is what begins it, and the packets of the former one are over.
    a.meet(record(2, 2), now);
    assert_eq!(a.packet(2, &b.says(1, Purpose::Ping), now), Ok(Vec::new()));
    let left = NodeRecord { phase: Phase::Left, seq: 2, ..record(2, 2) };
    a.meet(left, now);
    assert_eq!(a.health_of(2), Some(MemberHealth::Down), "it says itself that it has left");
    a.meet(NodeRecord { cert_expires: 0, ..record(5, 1) }, now);
    assert_eq!(a.health_of(5), Some(MemberHealth::Down), "its certificate has ended");
}

#[test]
fn a_rumour_is_for_whoever_hears_it_and_nothing_else_is() {
    let now = Instant::now();
    let (mut a, b) = (Node::knowing(1, &[2, 3, 4], now), Node::new(2));
    let word = accusation(2, 4, 0);
    let rumour = Packet { words: vec![word], ..b.says(3, Purpose::Gossip) };
    a.packet(2, &rumour, now).unwrap();
    assert_eq!(a.membership.accusations.against(&ident(4), 0), [ident(2).id]);
    assert!(a.packet(2, &b.says(3, Purpose::Ping), now).is_err());
    assert_eq!(a.packet(2, &b.says(3, Purpose::Dead), now).map(|effects| effects.len()), Ok(0));
    assert!(!a.membership.is_lost(), "it was said to another");
}
