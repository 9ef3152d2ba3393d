use bytes::Buf;

use super::*;
use crate::{Profile, suspicion::Accusation};

fn ident(n: u8) -> Ident {
    Ident { id: NodeId([n; 16]), addr: ([127, 0, 0, n], 7400).into(), generation: 1 }
}

fn new(n: u8) -> Membership {
    Membership::new(ident(n), &Config { seed: n.into(), ..Config::new(Profile::Lan) })
}

fn state(n: u8, incarnation: u16, health: MemberHealth) -> MemberState {
    MemberState { id: ident(n).id, addr: ident(n).addr, generation: 1, incarnation, health, down_s: 0 }
}

fn health_of(membership: &Membership, n: u8) -> Option<MemberHealth> {
    membership.others().find(|m| m.id == ident(n).id).map(|m| m.health)
}

/// Runs the timers for some simulated time; gives every effect to `on_effect`.
fn run(membership: &mut Membership, now: &mut Instant, ms: u64, mut on_effect: impl FnMut(Effect)) {
    let end = *now + Duration::from_millis(ms);
    while let Some(at) = membership.next_timer().filter(|at| *at <= end) {
        *now = at;
        membership.tick(at).into_iter().for_each(&mut on_effect);
    }
    *now = end;
}

/// The suspicion of node 2 that node 1 has when 2 does not answer.
fn suspecting(now: &mut Instant) -> (Membership, Vec<Effect>) {
    let mut a = new(1);
    a.learn(&[state(2, 0, MemberHealth::Alive)], *now, 1).unwrap();
    let mut effects = Vec::new();
    run(&mut a, now, 1100, |effect| effects.push(effect));
    assert_eq!(health_of(&a, 2), Some(MemberHealth::Suspect));
    (a, effects)
}

#[test]
fn a_refuted_suspicion_leaves_the_member_alone() {
    let mut now = Instant::now();
    let (mut a, _) = suspecting(&mut now);
    let suspicion = a.suspicions.first().expect("a suspicion starts a timer").timer.clone();
    a.check_failed(&ident(2), 0, now);
    a.learn(&[state(2, 1, MemberHealth::Alive)], now, 1).unwrap();
    a.timers.clear();
    now += Duration::from_secs(10);
    assert_eq!(a.tick(now), []);
    assert_eq!(health_of(&a, 2), Some(MemberHealth::Alive));

    // The same timer given to foca ungated shows the behaviour that the gate is there for: a healthy member is told
    // that it is dead.
    let ungated = a.fire(suspicion, now);
    assert!(matches!(&ungated[..], [Effect::Send { to, .. }] if to.id == ident(2).id), "{ungated:?}");
}

#[test]
fn a_suspect_is_told_and_asked_over_a_stream_and_only_then_given_up() {
    let mut now = Instant::now();
    let (mut a, effects) = suspecting(&mut now);
    assert!(effects.contains(&Effect::Check { suspect: ident(2), incarnation: 0 }), "{effects:?}");
    run(&mut a, &mut now, 2500, |_| ());
    assert_eq!(health_of(&a, 2), Some(MemberHealth::Suspect), "the stream has not given its answer yet");
    a.check_failed(&ident(2), 0, now);
    run(&mut a, &mut now, 100, |_| ());
    assert_eq!(health_of(&a, 2), Some(MemberHealth::Down));
}

#[test]
fn a_suspect_that_is_told_refutes_to_the_one_who_told_it() {
    let mut now = Instant::now();
    let (mut a, effects) = suspecting(&mut now);
    let mut b = new(2);
    b.learn(&[state(1, 0, MemberHealth::Alive)], now, 1).unwrap();
    let pings = effects.iter().filter_map(|e| match e {
        Effect::Send { to, bytes, .. } if to.id == ident(2).id => Some(bytes.clone()),
        _ => None,
    });
    let answers: Vec<Effect> = pings.flat_map(|ping| b.packet(ident(1).id, None, &ping, now, 1).unwrap()).collect();
    for answer in answers {
        if let Effect::Send { to, bytes, .. } = answer
            && to.id == ident(1).id
        {
            a.packet(ident(2).id, None, &bytes, now, 1).unwrap();
        }
    }
    assert_eq!(a.others().map(|m| (m.health, m.incarnation)).collect::<Vec<_>>(), [(MemberHealth::Alive, 1)]);
    assert_eq!(b.doubt(), 1, "who has to refute doubts itself");
}

/// How long until node 1 gives up node 2, which is silent, within 30 s. Node 3 is heard or not, and accuses node 2, too, or
/// has no complaint.
fn given_up_after(heard: bool, accuses: bool, doubts: bool) -> Option<Duration> {
    let start = Instant::now();
    let mut now = start;
    let (mut a, c) = (new(1), new(3));
    a.learn(&[state(2, 0, MemberHealth::Alive), state(3, 0, MemberHealth::Alive)], now, 1).unwrap();
    let accusation =
        Accusation { suspect: ident(2).id, generation: 1, incarnation: 0, by: ident(3).id, raised: true }.encode();
    while now < start + Duration::from_secs(30) {
        for _ in 0..if doubts { 8 } else { 0 } {
            a.awareness.worse();
        }
        if heard {
            a.packet(ident(3).id, None, &c.craft(ident(1), Message::Gossip, None, None), now, 1).unwrap();
        }
        let mut effects = Vec::new();
        run(&mut a, &mut now, 100, |effect| effects.push(effect));
        for effect in effects {
            match effect {
                Effect::Send { to, bytes, .. } if to.id == ident(3).id && heard => {
                    let header: Header<Ident> = PostcardCodec.decode_header(&bytes[..]).unwrap();
                    let Message::Ping(number) = header.message else { continue };
                    let ack = c.craft(ident(1), Message::Ack(number), None, accuses.then_some(&accusation[..]));
                    a.packet(ident(3).id, None, &ack, now, 1).unwrap();
                }
                Effect::Check { suspect, incarnation } => a.check_failed(&suspect, incarnation, now),
                _ => {}
            }
        }
        if health_of(&a, 2) == Some(MemberHealth::Down) {
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
    let mut a = new(1);
    let others = [2, 3, 4];
    a.learn(&others.map(|n| state(n, 0, MemberHealth::Alive)), now, 1).unwrap();
    let mut packets = Vec::new();
    for _ in 0..60 {
        let mut checks = Vec::new();
        run(&mut a, &mut now, 1000, |effect| match effect {
            Effect::Send { bytes, .. } => packets.push(bytes),
            Effect::Check { suspect, incarnation } => checks.push((suspect, incarnation)),
            _ => {}
        });
        checks.into_iter().for_each(|(suspect, incarnation)| a.check_failed(&suspect, incarnation, now));
    }
    assert_eq!(others.map(|n| health_of(&a, n)), [Some(MemberHealth::Down); 3]);
    assert_eq!(a.states(now), [a.own_state()], "it tells nobody of them");
    assert!(packets.len() > 50, "{} packets", packets.len());
    for packet in packets {
        let mut rest = &packet[..];
        let header: Header<Ident> = PostcardCodec.decode_header(&mut rest).unwrap();
        assert_ne!(header.message, Message::TurnUndead);
        let updates = if header.message == Message::Broadcast { 0 } else { rest.get_u16() };
        for _ in 0..updates {
            let member: Member<Ident> = PostcardCodec.decode_member(&mut rest).unwrap();
            assert_ne!(member.state(), foca::State::Down);
        }
    }
    // One of them is there: so it was this node.
    let known = state(2, 0, MemberHealth::Down);
    let ping = new(2).craft(ident(1), Message::Ping(1), None, None);
    let effects = a.packet(ident(2).id, Some(&known), &ping, now, 1).unwrap();
    assert!(effects.contains(&Effect::Lost) && a.is_lost(), "{effects:?}");
}

#[test]
fn what_was_concluded_alone_is_told_once_others_have_been_heard_for_a_minute() {
    let start = Instant::now();
    let (mut a, mut now) = (new(1), start);
    a.learn(&[2, 3].map(|n| state(n, 0, MemberHealth::Alive)), now, 1).unwrap();
    let mut checks = Vec::new();
    let second = |a: &mut Membership, now: &mut Instant, checks: &mut Vec<(Ident, u16)>| {
        run(a, now, 1000, |effect| {
            if let Effect::Check { suspect, incarnation } = effect {
                checks.push((suspect, incarnation));
            }
        });
        checks.drain(..).for_each(|(suspect, incarnation)| a.check_failed(&suspect, incarnation, *now));
        a.tick(*now);
    };
    (0..30).for_each(|_| second(&mut a, &mut now, &mut checks));
    assert_eq!([2, 3].map(|n| health_of(&a, n)), [Some(MemberHealth::Down); 2]);
    let tells = |a: &Membership, now| a.states(now).iter().any(|m| m.id == ident(2).id);
    for heard_s in 0..80 {
        assert!(heard_s > 60 || !tells(&a, now), "after {heard_s} s");
        a.packet(ident(4).id, None, &new(4).craft(ident(1), Message::Gossip, None, None), now, 1).unwrap();
        second(&mut a, &mut now, &mut checks);
    }
    assert!(tells(&a, now));
}

#[test]
fn those_thought_dead_do_not_count_as_heard() {
    let start = Instant::now();
    let (mut a, mut now) = (new(1), start);
    a.learn(&[2, 3, 4].map(|n| state(n, 0, MemberHealth::Alive)), now, 1).unwrap();
    let dead = state(3, 0, MemberHealth::Down);
    a.learn(&[dead], now, 1).unwrap();
    while now < start + Duration::from_secs(30) {
        let rumour = new(3).craft(ident(1), Message::Gossip, None, None);
        a.packet(ident(3).id, Some(&dead), &rumour, now, 1).unwrap();
        let mut checks = Vec::new();
        run(&mut a, &mut now, 100, |effect| {
            if let Effect::Check { suspect, incarnation } = effect {
                checks.push((suspect, incarnation));
            }
        });
        checks.into_iter().for_each(|(suspect, incarnation)| a.check_failed(&suspect, incarnation, now));
    }
    assert_eq!([2, 4].map(|n| health_of(&a, n)), [Some(MemberHealth::Down); 2]);
}

#[test]
fn a_probe_ends_when_everybody_who_was_asked_has_failed_too() {
    for failed in [1, 2] {
        let mut now = Instant::now();
        let mut a = new(1);
        let others = [2, 3, 4].map(|n| state(n, 0, MemberHealth::Alive));
        a.learn(&others, now, 1).unwrap();
        let mut asked = Vec::new();
        while asked.is_empty() {
            let mut packets = Vec::new();
            run(&mut a, &mut now, 10, |effect| {
                if let Effect::Send { to, bytes, .. } = effect {
                    packets.push((to, PostcardCodec.decode_header(&bytes[..]).unwrap()));
                }
            });
            for (to, header) in packets {
                let header: Header<Ident> = header;
                match header.message {
                    Message::PingReq { .. } => asked.push(to),
                    // Nodes 3 and 4 answer.
                    Message::Ping(number) if to != ident(2) => {
                        let ack = new(to.id.0[0]).craft(ident(1), Message::Ack(number), None, None);
                        a.packet(to.id, None, &ack, now, 1).unwrap();
                    }
                    _ => {}
                }
            }
        }
        assert_eq!(asked.len(), 2);
        for by in &asked[..failed] {
            let (suspect, by_id) = (ident(2), by.id);
            let nack = Accusation { suspect: suspect.id, generation: 1, incarnation: 0, by: by_id, raised: false };
            let nack = new(by_id.0[0]).craft(ident(1), Message::Broadcast, None, Some(&nack.encode()));
            a.packet(by_id, None, &nack, now, 1).unwrap();
        }
        run(&mut a, &mut now, 1, |_| ());
        let expected = if failed == 2 { MemberHealth::Suspect } else { MemberHealth::Alive };
        assert_eq!(health_of(&a, 2), Some(expected), "{failed} of 2 have failed");
    }
}

#[test]
fn a_node_that_was_stalled_does_not_blame_others() {
    let mut now = Instant::now();
    let (mut a, _) = suspecting(&mut now);
    a.check_failed(&ident(2), 0, now);
    let doubt = a.doubt();
    now += Duration::from_secs(60);
    a.tick(now);
    assert_eq!(health_of(&a, 2), Some(MemberHealth::Suspect));
    assert_eq!(a.doubt(), doubt + 1);
    let mut asked_again = false;
    run(&mut a, &mut now, 2000, |effect| asked_again |= matches!(effect, Effect::Check { .. }));
    assert!(asked_again, "what was heard before the stall is no evidence any more");
    a.check_failed(&ident(2), 0, now);
    run(&mut a, &mut now, 100, |_| ());
    assert_eq!(health_of(&a, 2), Some(MemberHealth::Down));
}

#[test]
fn who_is_declared_dead_comes_back_in_a_new_life_once_it_is_heard() {
    let mut now = Instant::now();
    let mut a = new(1);
    a.learn(&[state(2, 0, MemberHealth::Alive)], now, 1).unwrap();
    let effects = a.learn(&[state(1, 0, MemberHealth::Down)], now, 1).unwrap();
    assert!(effects.contains(&Effect::Lost) && a.is_lost(), "{effects:?}");
    run(&mut a, &mut now, 5000, |_| ());
    assert!(a.is_lost(), "nobody has answered");
    let mut b = new(2);
    b.learn(&[state(1, 0, MemberHealth::Down)], now, 1).unwrap();
    for _ in 0..40 {
        let mut pings = Vec::new();
        run(&mut a, &mut now, 150, |effect| pings.push(effect));
        for ping in pings {
            let Effect::Send { bytes, .. } = ping else { continue };
            for answer in b.packet(ident(1).id, None, &bytes, now, 1).unwrap() {
                if let Effect::Send { to, bytes, .. } = answer
                    && to.id == ident(1).id
                {
                    a.packet(ident(2).id, None, &bytes, now, 1).unwrap();
                }
            }
        }
    }
    assert!(!a.is_lost());
    assert_eq!(a.me().generation, 2);
}

#[test]
fn garbage_strangers_and_the_future_are_refused() {
    let now = Instant::now();
    let (mut a, b) = (new(1), new(2));
    assert!(a.packet(ident(2).id, None, b"\xff\xff\xff\xff", now, 1).is_err());
    let ping = b.craft(ident(1), Message::Ping(1), None, None);
    assert!(a.packet(ident(3).id, None, &ping, now, 1).is_err(), "it speaks for another");
    let mut padded = ping.to_vec();
    padded.resize(MAX_PACKET_BYTES + 1, 0);
    assert!(a.packet(ident(2).id, None, &padded, now, 1).is_err(), "too long");
    let future = Ident { generation: MAX_AHEAD_S + 2, ..ident(3) };
    let news = Member::new(future, 0, foca::State::Down);
    let rumour = b.craft(ident(1), Message::Gossip, Some(news), None);
    assert!(a.packet(ident(2).id, None, &rumour, now, 1).is_err());
    let from_the_future =
        Membership::new(Ident { generation: MAX_AHEAD_S + 2, ..ident(2) }, &Config::new(Profile::Lan));
    let ping = from_the_future.craft(ident(1), Message::Ping(1), None, None);
    assert!(a.packet(ident(2).id, None, &ping, now, 1).is_err());
    assert_eq!(a.others().count(), 0);
    a.packet(ident(2).id, None, &b.craft(ident(1), Message::Ping(1), None, None), now, 1).unwrap();
    assert_eq!(a.others().count(), 1);
}

#[test]
fn a_rumour_is_for_whoever_hears_it_and_nothing_else_is() {
    let now = Instant::now();
    let (mut a, b) = (new(1), new(2));
    for (n, message) in [(4, Message::Ping(1)), (5, Message::Ack(1)), (6, Message::Gossip)] {
        let news = Member::new(ident(n), 0, foca::State::Alive);
        a.packet(ident(2).id, None, &b.craft(ident(3), message, Some(news), None), now, 1).unwrap();
    }
    assert_eq!([4, 5, 6].map(|n| health_of(&a, n).is_some()), [false, false, true]);
    a.packet(ident(2).id, None, &b.craft(ident(3), Message::TurnUndead, None, None), now, 1).unwrap();
    assert!(!a.is_lost(), "it was said to another");
}

/// A rumour for node 3 about so many members, filled up with accusations; and how many those are.
fn rumour(members: u8) -> (Vec<u8>, u8) {
    let header = Header { src: ident(2), src_incarnation: 0, dst: ident(3), message: Message::Gossip };
    let mut packet = Vec::new();
    PostcardCodec.encode_header(&header, &mut packet).unwrap();
    packet.put_u16(members.into());
    for n in 0..members {
        let member = Member::new(ident(10 + n), 0, foca::State::Alive);
        PostcardCodec.encode_member(&member, &mut packet).unwrap();
    }
    for n in 0.. {
        let (suspect, by) = (ident(10 + n).id, ident(2).id);
        let accusation = Accusation { suspect, generation: 1, incarnation: 0, by, raised: true }.encode();
        if packet.len() + 2 + accusation.len() > MAX_PACKET_BYTES {
            return (packet, n);
        }
        packet.put_u16(accusation.len() as u16);
        packet.put_slice(&accusation);
    }
    unreachable!("a packet is full some time")
}

#[test]
fn a_full_rumour_is_heard_also_by_a_node_with_a_longer_address() {
    let now = Instant::now();
    let addr = (std::net::Ipv6Addr::LOCALHOST, 65_000).into();
    let mut overlong = 0;
    for members in 0..42 {
        let mut a = Membership::new(Ident { addr, ..ident(1) }, &Config::new(Profile::Lan));
        let (packet, accusations) = rumour(members);
        overlong += usize::from(packet.len() + 12 > MAX_PACKET_BYTES);
        a.packet(ident(2).id, None, &packet, now, 1).unwrap();
        let known = (0..members).filter(|n| health_of(&a, 10 + n).is_some()).count();
        let accused = (0..accusations).filter(|n| !a.accusations.against(&ident(10 + n), 0).is_empty()).count();
        let told = usize::from(members + accusations);
        assert!(known + accused >= told - 1, "{known} members and {accused} accusations of {told}");
    }
    assert!(overlong > 5, "{overlong}");
}
