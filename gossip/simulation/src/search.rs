//! Looks for a plan that breaks something: many seeds, each with faults of its own, and what fails made small.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use starling_chaos::{
    Plan, judge,
    judge::{Outcome, Verdict},
    plan::{Backend, Expect, Fault, Role, Step, Victims},
};

use crate::plan::run;

/// Nodes of a plan that is looked at: enough for every role, few enough for thousands of seeds.
const NODES: usize = 16;
const MOST_STEPS: usize = 5;

/// A plan that did not hold.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its seed.
    pub seed: u64,
    /// As it was.
    pub plan: Plan,
    /// Why.
    pub verdict: Verdict,
}

/// The plan of a seed: some kinds of faults, in steps, one or two at a time.
pub fn random_plan(seed: u64) -> Plan {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5ea6c4);
    let mut kinds: Vec<usize> = (0..KINDS).collect();
    kinds.shuffle(&mut rng);
    kinds.truncate(rng.random_range(2..=4));
    let steps = (0..rng.random_range(2..=MOST_STEPS)).map(|number| {
        let hold = Duration::from_secs(rng.random_range(4..25));
        let both = rng.random_bool(0.4);
        let faults: Vec<Fault> = (0..if both { 2 } else { 1 })
            .map(|_| fault(kinds[rng.random_range(0..kinds.len())], hold, &mut rng))
            .collect();
        Step { name: format!("step {}", number + 1), hold, stagger: Duration::ZERO, faults, expect: expect() }
    });
    let steps = steps.collect();
    let mut plan = Plan::named("smoke").expect("it ships");
    plan.about = format!("What a search made of seed {seed}.");
    plan.seed = seed;
    plan.backends = vec![Backend::Sim];
    plan.mesh.nodes = NODES;
    plan.mesh.issuers = 1;
    plan.mesh.seeds = 3;
    plan.steps = steps;
    plan
}

/// Faults that overlap may hit a node once more while it comes back; and one that was lost again and again is held for up to
/// five minutes.
fn expect() -> Expect {
    Expect { transitions: 8, heal: Duration::from_secs(320), ..Expect::default() }
}

const KINDS: usize = 10;

fn fault(kind: usize, hold: Duration, rng: &mut StdRng) -> Fault {
    let some = |rng: &mut StdRng| Victims { count: Some(rng.random_range(1..=3)), role: Role::Any };
    let all = Victims { count: None, role: Role::Any };
    let two = Victims { count: Some(2), role: Role::Any };
    match kind {
        0 => Fault::Kill { victims: some(rng), back: None, for_good: false },
        1 => Fault::Kill { victims: some(rng), back: Some(Duration::from_millis(300)), for_good: false },
        2 => Fault::Pause { victims: some(rng) },
        3 => Fault::Partition { victims: some(rng), flip: None },
        4 => Fault::Partition { victims: Victims { count: None, role: Role::Half }, flip: None },
        5 => Fault::Mute { victims: some(rng) },
        6 => Fault::Deaf { victims: some(rng) },
        7 => Fault::Loss { victims: all, share: f64::from(rng.random_range(1..=10)) / 100.0, burst: 1.0 },
        8 => Fault::Cut { victims: two },
        _ => Fault::Partition { victims: some(rng), flip: Some(hold / 4) },
    }
}

/// Whether it does not hold, and why.
fn violated(plan: &Plan) -> Option<Verdict> {
    let history = run("search", plan, String::new()).ok()?;
    let verdict = judge(&history).ok()?;
    (verdict.outcome == Outcome::Violated).then_some(verdict)
}

/// Tries seeds on all cores; what failed, by seed. `each` is told of every seed that is done.
pub fn search(seeds: std::ops::Range<u64>, stop: &AtomicBool, each: &(dyn Fn(u64, bool) + Sync)) -> Vec<Found> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let mut found: Vec<Found> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let seeds = seeds.clone().filter(move |seed| seed % threads == thread);
                scope.spawn(move || {
                    let mut found = Vec::new();
                    for seed in seeds.take_while(|_| !stop.load(Relaxed)) {
                        let plan = random_plan(seed);
                        let verdict = violated(&plan);
                        each(seed, verdict.is_some());
                        found.extend(verdict.map(|verdict| Found { seed, plan, verdict }));
                    }
                    found
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    });
    found.sort_by_key(|found| found.seed);
    found
}

/// A smaller plan that still fails: steps and faults left out, times and the mesh made shorter, as long as it fails.
pub fn shrink(found: &Found) -> Found {
    let mut best = found.clone();
    loop {
        let smaller = candidates(&best.plan).into_iter().find_map(|plan| {
            let verdict = violated(&plan)?;
            Some(Found { seed: best.seed, plan, verdict })
        });
        match smaller {
            Some(smaller) => best = smaller,
            None => return best,
        }
    }
}

fn candidates(plan: &Plan) -> Vec<Plan> {
    let mut smaller = Vec::new();
    let mut offer = |change: &dyn Fn(&mut Plan)| {
        let mut candidate = plan.clone();
        change(&mut candidate);
        if candidate != *plan {
            smaller.push(candidate);
        }
    };
    for step in 0..plan.steps.len() {
        if plan.steps.len() > 1 {
            offer(&|plan| drop(plan.steps.remove(step)));
        }
        for fault in 0..plan.steps[step].faults.len() {
            if plan.steps[step].faults.len() > 1 {
                offer(&|plan| drop(plan.steps[step].faults.remove(fault)));
            }
        }
        if plan.steps[step].hold > Duration::from_secs(2) {
            offer(&|plan| plan.steps[step].hold = Duration::from_secs(plan.steps[step].hold.as_secs() / 2));
        }
    }
    if plan.mesh.nodes > 5 {
        offer(&|plan| plan.mesh.nodes = (plan.mesh.nodes / 2).max(5));
    }
    smaller
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_of_a_seed_is_whole_and_always_the_same() {
        for seed in 0..200 {
            let plan = random_plan(seed);
            assert_eq!(plan, random_plan(seed));
            assert!(plan.cannot(Backend::Sim).is_empty());
        }
    }

    #[test]
    fn a_plan_replays_exactly_and_what_fails_is_made_small() {
        let mut plan = random_plan(3);
        plan.mesh.nodes = 8;
        let digest = |plan: &Plan| {
            let history = run("x", plan, String::new()).unwrap();
            format!("{:?}", history.entries.iter().rev().nth(1))
        };
        assert_eq!(digest(&plan), digest(&plan));
        // Nothing heals within no time.
        plan.steps.iter_mut().for_each(|step| step.expect.heal = Duration::ZERO);
        plan.steps.push(Step {
            name: "a death".into(),
            hold: Duration::from_secs(8),
            stagger: Duration::ZERO,
            faults: vec![Fault::Kill { victims: "any 1".parse().unwrap(), back: None, for_good: false }],
            expect: Expect { heal: Duration::ZERO, ..expect() },
        });
        let verdict = violated(&plan).expect("it cannot hold");
        let small = shrink(&Found { seed: 3, plan, verdict });
        assert_eq!(small.plan.steps.len(), 1);
        assert_eq!(small.plan.mesh.nodes, 5);
    }
}
