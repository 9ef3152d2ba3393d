//! One question each, with a number for an answer. `cargo test --release -p starling-simulation -- --ignored
//! --nocapture table` prints them all.

use std::time::Duration;

use starling_protocol::MemberHealth;

use super::{assert_all_fired, mesh, settles};
use crate::{
    MS, S,
    network::Fault,
    world::{Action, World},
};

/// From the last start until all see all, when everybody starts within half a second.
pub(crate) fn convergence(nodes: usize, seed: u64) -> Duration {
    let mut world = World::new(nodes, seed);
    for node in 0..nodes {
        world.plan(S / 2 * node as u32 / nodes as u32, Action::Start(node));
    }
    world.run_until(S / 2);
    world.run_until_holds(60 * S, World::views_agree).unwrap_or_else(|| panic!("{}", world.disagreement()))
}

/// From kill -9 until all others show the node as down; the worst of some.
pub(crate) fn detection(nodes: usize, seed: u64, kills: usize) -> Vec<Duration> {
    let mut world = mesh(nodes, seed);
    world.run_until(world.now + 10 * S);
    (0..kills)
        .map(|kill| {
            let victim = if nodes > 3 { 3 + kill % (nodes - 3) } else { 1 + kill % 2 };
            world.plan(world.now, Action::Kill(victim));
            let known = world.run_until_holds(60 * S, |w| w.all_see_down(victim));
            world.plan(world.now + S, Action::Start(victim));
            world.run_until(world.now + 3 * S);
            known.unwrap_or_else(|| panic!("{victim} is never known to be dead"))
        })
        .collect()
}

/// Members shown as down, and members that had to rejoin, at ten per cent of loss.
pub(crate) fn loss(nodes: usize, seed: u64, time: Duration) -> (usize, u64) {
    let mut world = mesh(nodes, seed);
    world.plan(world.now, Action::Begin(Fault::Loss(0.1)));
    world.run_until(world.now + time);
    assert_all_fired(&world);
    assert_eq!(world.invariants.false_downs, [""; 0]);
    (world.invariants.false_downs.len(), world.times_lost())
}

/// From the end of a split of one minute until all see all.
pub(crate) fn heal(nodes: usize, seed: u64, first: usize) -> Duration {
    let mut world = mesh(nodes, seed);
    world.plan(world.now, Action::Begin(Fault::Split(first)));
    world.run_until(world.now + 60 * S);
    assert_all_fired(&world);
    world.plan(world.now, Action::End(Fault::Split(first)));
    settles(&mut world, 60 * S, "heal")
}

/// From a change of a service's state until 99 % of the nodes see it; the worst of some.
pub(crate) fn change(nodes: usize, seed: u64) -> Duration {
    let mut world = mesh(nodes, seed);
    world.run_until(world.now + 20 * S);
    let times = (0..8).map(|n| {
        let up = n % 2 == 1;
        world.plan(world.now, Action::Serve(5, up));
        let seen = world.run_until_holds(30 * S, |w| w.share_that_sees(5, up) >= 0.99);
        world.run_until(world.now + 3 * S);
        seen.expect("the change gets round")
    });
    times.max().unwrap_or_default()
}

/// Two faulty nodes of a hundred, one with 80 % loss and one that hears nobody, or is heard by nobody, every other 20 s.
/// Most transitions that a healthy node shows of a healthy one, and of a faulty one.
pub(crate) fn faulty_few(nodes: usize, seed: u64, one_way: fn(usize) -> Fault) -> (u32, u32) {
    let mut world = mesh(nodes, seed);
    // By then every pair has probed each other, and has a connection.
    let start = world.now + 60 * S;
    let faulty = [7, 11];
    world.plan(start, Action::Begin(Fault::Lossy(faulty[0], 0.8)));
    for turn in 0..3 {
        world.plan(start + 40 * S * turn, Action::Begin(one_way(faulty[1])));
        world.plan(start + 40 * S * turn + 20 * S, Action::End(one_way(faulty[1])));
    }
    world.plan(start + 120 * S, Action::End(Fault::Lossy(faulty[0], 0.8)));
    world.run_until(start);
    world.invariants.transitions.0.clear();
    world.run_until(start + 240 * S);
    assert_all_fired(&world);
    let shown = |of_faulty: bool| {
        let transitions = world.invariants.transitions.0.iter();
        let of_interest = transitions
            .filter(|((observer, subject), _)| !faulty.contains(observer) && faulty.contains(subject) == of_faulty);
        of_interest.map(|(_, count)| *count).max().unwrap_or(0)
    };
    assert_eq!(world.invariants.false_suspects, [""; 0], "healthy nodes suspect each other");
    assert_eq!(world.invariants.false_downs, [""; 0], "healthy nodes give each other up");
    assert_eq!(world.packets_refused(), 0);
    let counts = (shown(false), shown(true));
    settles(&mut world, 120 * S, "the faulty come back");
    counts
}

#[test]
fn a_hundred_nodes_find_each_other() {
    assert!(convergence(100, 1) <= 2 * S);
    assert!(convergence(50, 2) <= S);
}

#[test]
fn a_thousand_nodes_find_each_other() {
    assert!(convergence(1000, 1) <= 10 * S);
}

#[test]
fn a_killed_node_is_known_within_three_seconds() {
    for nodes in [3, 20, 50] {
        let mut times = detection(nodes, 3, 9);
        times.sort();
        assert!(times[4] <= 3 * S, "median {:?} of {times:?} at {nodes}", times[4]);
    }
}

#[test]
fn a_death_gets_round_also_where_few_have_a_connection_yet() {
    let times = detection(300, 1, 3);
    assert!(times.iter().all(|time| *time <= 6 * S), "{times:?}");
}

#[test]
fn ten_per_cent_of_loss_costs_nobody_the_membership() {
    assert_eq!(loss(100, 4, 60 * S), (0, 0));
}

#[test]
fn a_split_mesh_heals_within_ten_seconds() {
    for first in [1, 30, 50] {
        let healed = heal(100, 5, first);
        assert!(healed <= 10 * S, "{healed:?} after a split at {first}");
    }
    assert!(heal(2, 6, 1) <= 10 * S);
}

#[test]
fn a_change_gets_round_within_a_third_of_a_second() {
    let time = change(100, 7);
    assert!(time <= 300 * MS, "{time:?}");
}

#[test]
fn a_few_faulty_nodes_disturb_nobody_else() {
    for (seed, one_way) in
        [(1, Fault::Deaf as fn(usize) -> Fault), (2, Fault::Deaf), (8, Fault::Mute), (9, Fault::Mute)]
    {
        let (healthy, faulty) = faulty_few(100, seed, one_way);
        assert_eq!(healthy, 0, "seed {seed}: healthy nodes seem to come and go");
        assert!(faulty <= 2, "seed {seed}: the faulty come and go {faulty} times");
    }
}

#[test]
fn a_node_that_keeps_vanishing_is_kept_out() {
    let cut = Fault::Split(1);
    for [vanish, come] in
        [[Action::Pause(0), Action::Resume(0)], [Action::Begin(cut.clone()), Action::End(cut.clone())]]
    {
        let mut world = mesh(30, 13);
        let start = world.now;
        for turn in 0..5 {
            world.plan(start + 40 * S * turn, vanish.clone());
            world.plan(start + 40 * S * turn + 20 * S, come.clone());
        }
        world.run_until(start);
        world.invariants.transitions.0.clear();
        world.run_until(start + 200 * S);
        let shown = world.invariants.transitions.0.iter().filter(|((_, subject), _)| *subject == 0);
        // It went, came, went again, and is not let in before it has been there for longer.
        assert_eq!(shown.map(|(_, count)| *count).max(), Some(3), "{vanish:?}");
        settles(&mut world, 120 * S, "it comes back");
    }
}

#[test]
fn a_thousand_nodes_for_two_minutes() {
    let mut world = mesh(1000, 9);
    let start = world.now;
    fault_a_few(&mut world, start);
    world.run_until(start + 120 * S);
    assert_all_fired(&world);
    settles(&mut world, 60 * S, "a thousand nodes");
    assert_eq!(world.packets_refused(), 0);
    assert_eq!(world.invariants.false_downs, [""; 0]);
    println!("{} events, {} snapshots checked", world.events_done, world.invariants.checked);
}

fn fault_a_few(world: &mut World, start: Duration) {
    for n in 0..5u32 {
        let node = 100 * (n as usize + 1);
        world.plan(start + 10 * S * n, Action::Kill(node));
        world.plan(start + 10 * S * n + 15 * S, Action::Start(node));
        world.plan(start + 10 * S * n + S, Action::Publish { by: 1, version: u64::from(n) + 1 });
    }
    world.plan(start + 20 * S, Action::Begin(Fault::Loss(0.02)));
    world.plan(start + 60 * S, Action::End(Fault::Loss(0.02)));
    world.plan(start + 70 * S, Action::Pause(777));
    world.plan(start + 80 * S, Action::Resume(777));
}

#[test]
fn a_node_that_leaves_is_left_and_not_down() {
    let mut world = mesh(10, 10);
    world.plan(world.now, Action::Leave(4));
    world.run_until(world.now + 2 * S);
    for observer in world.running() {
        assert_eq!(world.view_of(observer, 4), Some((MemberHealth::Down, true)), "{observer}");
    }
}

#[test]
fn every_seed_can_die_and_the_rest_come_back() {
    let mut world = mesh(12, 11);
    world.run_until(world.now + 5 * S);
    // The seeds die for good; then everybody else restarts at once, with nothing but remembered peers.
    for node in 0..3 {
        world.plan(world.now, Action::Kill(node));
    }
    world.run_until(world.now + 10 * S);
    for node in 3..12 {
        world.plan(world.now, Action::Kill(node));
        world.plan(world.now + 100 * MS, Action::Start(node));
    }
    world.run_until(world.now + S);
    settles(&mut world, 20 * S, "without seeds");
}

#[test]
#[ignore = "on demand: minutes; prints the table of docs/gossip.md"]
fn table() {
    let seconds = |d: Duration| format!("{:.2} s", d.as_secs_f64());
    for nodes in [50, 100, 1000] {
        println!("| all see all after the last start, N={nodes} | {} |", seconds(convergence(nodes, 1)));
    }
    for nodes in [3, 20, 50, 100, 1000] {
        let mut times = detection(nodes, 2, if nodes < 1000 { 21 } else { 5 });
        times.sort();
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        println!("| kill -9 until all know, N={nodes} | {}, worst {} |", seconds(median), seconds(worst));
    }
    let (downs, rejoins) = loss(100, 3, 300 * S);
    println!("| 10 % loss for 300 s, N=100 | {downs} false downs, {rejoins} rejoins |");
    for first in [1, 50] {
        println!("| heal after 60 s, {first} against {} | {} |", 100 - first, seconds(heal(100, 4, first)));
    }
    for nodes in [100, 1000] {
        println!("| change of a service until 99 % see it, N={nodes} | {} |", seconds(change(nodes, 5)));
    }
    for (what, one_way) in [("deaf", Fault::Deaf as fn(usize) -> Fault), ("mute", Fault::Mute)] {
        let (healthy, faulty) = faulty_few(100, 6, one_way);
        println!(
            "| transitions with one node at 80 % loss and one {what} every other 20 s | healthy {healthy}, faulty {faulty} |"
        );
    }
    for nodes in [50, 100] {
        let mut world = mesh(nodes, 7);
        world.run_until(world.now + 30 * S);
        let (bytes, start) = (world.sent_bytes(), world.now);
        world.run_until(world.now + 300 * S);
        let rate = (world.sent_bytes() - bytes) as f64 / (world.now - start).as_secs_f64() / nodes as f64;
        println!("| payload at rest, N={nodes} | {rate:.0} B/s a node |");
    }
}

#[test]
#[ignore = "on demand: needs gigabytes and minutes; STARLING_SIM_NODES says how many"]
fn many_nodes() {
    let nodes = std::env::var("STARLING_SIM_NODES").ok().and_then(|n| n.parse().ok()).unwrap_or(5000);
    let mut world = mesh(nodes, 12);
    let start = world.now;
    world.plan(start + 5 * S, Action::Kill(nodes / 2));
    world.run_until(start + 5 * S);
    let known = world.run_until_holds(60 * S, |w| w.all_see_down(nodes / 2)).expect("it is noticed");
    println!("{nodes} nodes: all see all {start:?} after the first start; a dead one known after {known:?}");
}

#[test]
fn a_node_that_stood_still_is_back_in_a_mesh_of_any_size() {
    for nodes in [2, 3, 4, 5, 9] {
        let mut world = mesh(nodes, 14);
        world.run_until(world.now + 5 * S);
        world.plan(world.now, Action::Pause(nodes - 1));
        world.plan(world.now + 20 * S, Action::Resume(nodes - 1));
        world.run_until(world.now + 20 * S);
        let took = settles(&mut world, 30 * S, "it is back");
        println!("{nodes}: {took:?}");
    }
}
