//! Whole meshes, asked one question each; and seeds of mixed faults.
//!
//! `STARLING_SIM_SEED=n` replays one seed and prints what is done to it, `STARLING_SIM_SEEDS=n` runs more of them.

mod liars;
mod scenarios;

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    MS, S,
    network::Fault,
    world::{Action, World},
};

/// A mesh of that size, started within a second, all seeing all.
fn mesh(nodes: usize, seed: u64) -> World {
    let mut world = World::new(nodes, seed);
    for node in 0..nodes {
        world.plan(S * node as u32 / nodes as u32, Action::Start(node));
    }
    world.run_until(S);
    let agreed = world.run_until_holds(60 * S, World::views_agree);
    assert!(agreed.is_some(), "seed {seed}: no agreement after the start:\n{}", world.disagreement());
    world
}

fn settles(world: &mut World, limit: Duration, what: &str) -> Duration {
    let settled = world.run_until_holds(limit, |w| w.views_agree() && w.roots_agree());
    settled.unwrap_or_else(|| panic!("{what}: views still differ after {limit:?}:\n{}", world.disagreement()))
}

fn assert_all_fired(world: &World) {
    for (fault, count) in &world.network.fired {
        assert!(*count > 0, "{fault} touched nothing");
    }
}

/// Faults of many kinds, one after the other and on top of each other, chosen by the seed.
fn mixed_faults(seed: u64) -> World {
    const NODES: usize = 32;
    let mut world = mesh(NODES, seed);
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    let start = world.now;
    let mut at = start;
    let mut version = 0;
    world.plan(start, Action::Begin(Fault::Duplication(0.02)));
    world.plan(start + 90 * S, Action::End(Fault::Duplication(0.02)));
    let mut absent_until = [start; NODES];
    for _ in 0..8 {
        at += S * rng.random_range(3..10);
        // Nothing that happens to a node that is not there would touch anything.
        let present: Vec<usize> = (3..NODES).filter(|node| absent_until[*node] < at).collect();
        let node = present[rng.random_range(0..present.len())];
        let long = S * rng.random_range(2..15);
        let kind = rng.random_range(0..10);
        if matches!(kind, 0 | 2 | 9) {
            absent_until[node] = at + long;
        }
        match kind {
            0 => {
                world.plan(at, Action::Kill(node));
                world.plan(at + long, Action::Start(node));
            }
            1 => {
                // Faster than anybody can notice.
                world.plan(at, Action::Kill(node));
                world.plan(at + 200 * MS, Action::Start(node));
            }
            2 => {
                world.plan(at, Action::Pause(node));
                world.plan(at + long, Action::Resume(node));
            }
            3 => fault(&mut world, at, long, Fault::Loss(0.1)),
            4 => fault(&mut world, at, long, Fault::Split(rng.random_range(1..NODES))),
            5 => fault(&mut world, at, long, Fault::Mute(node)),
            6 => fault(&mut world, at, long, Fault::Deaf(node)),
            // A pair says little to each other: give the cut the time to be met.
            7 => fault(&mut world, at, long + 60 * S, Fault::Cut(node, (node + 7) % NODES)),
            8 => fault(&mut world, at, long, Fault::Lossy(node, 0.8)),
            _ => {
                world.plan(at, Action::Leave(node));
                world.plan(at + long, Action::Start(node));
            }
        }
        version += 1;
        world.plan(at + S, Action::Publish { by: rng.random_range(0..3), version });
        world.plan(at + S, Action::Forge(rng.random_range(0..3)));
        world.plan(at + 2 * S, Action::Serve(rng.random_range(0..3), version % 2 == 0));
    }
    world.run_until(at + 80 * S);
    world
}

fn fault(world: &mut World, at: Duration, long: Duration, fault: Fault) {
    world.plan(at, Action::Begin(fault.clone()));
    world.plan(at + long, Action::End(fault));
}

#[test]
fn mixed_faults_heal_and_break_no_invariant() {
    let only: Option<u64> = std::env::var("STARLING_SIM_SEED").ok().and_then(|s| s.parse().ok());
    let count = std::env::var("STARLING_SIM_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(64);
    let seeds = only.map_or(0..count, |seed| seed..seed + 1);
    let slowest = std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let workers: Vec<_> = (0..threads)
            .map(|t| {
                let seeds = seeds.clone().filter(move |seed| seed % threads == t);
                scope.spawn(move || seeds.map(check_mixed).max())
            })
            .collect();
        let worst = workers.into_iter().map(|w| w.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
        worst.max().flatten()
    });
    println!("{} seeds, slowest to settle: {slowest:?}", seeds.count());
}

fn check_mixed(seed: u64) -> Duration {
    let outcome = std::panic::catch_unwind(|| {
        let mut world = mixed_faults(seed);
        assert_all_fired(&world);
        let settled = settles(&mut world, 60 * S, "mixed faults");
        assert_eq!(world.invariants.false_downs, [""; 0], "healthy nodes were shown as down");
        assert!(world.forged > 0 && world.records_refused() > 0 && world.documents_refused() > 0);
        settled
    });
    outcome.unwrap_or_else(|panic| {
        eprintln!("replay with STARLING_SIM_SEED={seed}");
        std::panic::resume_unwind(panic)
    })
}

#[test]
fn a_seed_replays_exactly() {
    let (one, other, different) = (mixed_faults(7), mixed_faults(7), mixed_faults(8));
    assert_eq!((one.trace, one.events_done), (other.trace, other.events_done));
    assert_ne!(one.trace, different.trace);
}
