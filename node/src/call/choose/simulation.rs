//! What callers make of instances that are not alike, on a clock of its own, without sockets: the choice that nodes make, beside
//! round robin, the less busy of two, and the cheaper of two (`docs/balancing.md`).
//!
//! ```sh
//! cargo test --release -p starling-node --lib -- --ignored --nocapture balancing_table
//! ```

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_gossip::Instance;
use starling_protocol::{NodeId, Protocol};

use super::{Candidate, Experience, PendingCall, Wish, pick};

/// Calls that an instance works on at a time; others stand in line there.
const SLOTS: usize = 8;
/// How long it works on one, on average.
const WORK: Duration = Duration::from_millis(5);
/// How much of all that the instances could do they are asked for.
const LOAD: f64 = 0.6;

/// After so long it is noticed that nobody answers.
const NOTICED: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// What nodes do.
    Ours,
    RoundRobin,
    /// Of two at random, the one to which the caller has fewer calls under way.
    LeastRequest,
    /// Of two at random, the one of which latency, as a moving average, times calls under way is less.
    PeakEwma,
}

/// What is the matter with the first instance, or with a zone, of which there are three. Callers and instances are spread over them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Odd {
    Nothing,
    /// It works ten times as long.
    Slow,
    /// It answers at once, with a failure.
    FailsFast,
    /// It fails for a second, every three.
    Flaps,
    /// It has just started, and works ten times as long for the first three seconds.
    Cold,
    /// A zone is gone from the second second on: nothing there answers, which is noticed after a while.
    LostZone,
    /// All callers are in one zone, which cannot do what they ask by itself.
    CrowdedZone,
}

const ZONES: [&str; 3] = ["a", "b", "c"];

#[derive(Debug)]
struct Outcome {
    /// Calls that the odd ones got, of their fair share.
    share: f64,
    p50_ms: f64,
    p99_ms: f64,
    failed: f64,
}

struct Job {
    caller: usize,
    begun: Duration,
    pending: Option<PendingCall>,
}

#[derive(Default)]
struct Server {
    working: usize,
    line: VecDeque<Job>,
}

enum Event {
    Call(usize),
    /// A job at an instance is done; whether it failed, and whether it had a slot.
    Done(usize, Job, bool, bool),
}

/// In the order of time, and of their making.
struct Due(Duration, u64, Event);

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

struct Caller {
    zone: &'static str,
    candidates: Vec<Candidate>,
    /// For those who keep it by themselves: calls under way, and latency in seconds with its time.
    under_way: Vec<u32>,
    latency: Vec<(f64, Duration)>,
    next: usize,
}

struct World {
    policy: Policy,
    odd: Odd,
    start: Instant,
    rng: StdRng,
    events: BinaryHeap<Reverse<Due>>,
    made: u64,
    servers: Vec<Server>,
    callers: Vec<Caller>,
    latencies: Vec<f64>,
    failed: usize,
    to_odd: usize,
    calls: usize,
}

fn candidate(n: usize, zone: &str) -> Candidate {
    let instance = Instance {
        node: NodeId((n as u128 + 1).to_be_bytes()),
        generation: 1,
        service: "orders".parse().unwrap(),
        node_name: format!("n{n}").parse().unwrap(),
        addr: ([127, 0, 0, 1], 7400).into(),
        zone: zone.into(),
        version: String::new(),
        protocol: Protocol::Http1,
        weight: 100,
    };
    Candidate { instance: Arc::new(instance), peer: Arc::default(), experience: Arc::new(Experience::new()) }
}

impl World {
    fn new(policy: Policy, odd: Odd, callers: usize, instances: usize) -> Self {
        let has_zones = matches!(odd, Odd::LostZone | Odd::CrowdedZone);
        let zone = |n: usize| if has_zones { ZONES[n * ZONES.len() / instances] } else { "" };
        let caller = |at: usize| Caller {
            zone: match odd {
                Odd::LostZone => ZONES[at % ZONES.len()],
                Odd::CrowdedZone => ZONES[0],
                _ => "",
            },
            candidates: (0..instances).map(|n| candidate(n, zone(n))).collect(),
            under_way: vec![0; instances],
            latency: vec![(0.0, Duration::ZERO); instances],
            next: at,
        };
        let mut world = Self {
            policy,
            odd,
            start: Instant::now(),
            rng: StdRng::seed_from_u64(7),
            events: BinaryHeap::new(),
            made: 0,
            servers: (0..instances).map(|_| Server::default()).collect(),
            callers: (0..callers).map(caller).collect(),
            latencies: Vec::new(),
            failed: 0,
            to_odd: 0,
            calls: 0,
        };
        for caller in 0..callers {
            let at = world.between_calls();
            world.put(at, Event::Call(caller));
        }
        world
    }

    fn put(&mut self, at: Duration, event: Event) {
        self.made += 1;
        self.events.push(Reverse(Due(at, self.made, event)));
    }

    fn exponential(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(-(1.0 - self.rng.random::<f64>()).ln())
    }

    fn between_calls(&mut self) -> Duration {
        let all = WORK.div_f64(LOAD * (SLOTS * self.servers.len()) as f64);
        self.exponential(all * self.callers.len() as u32)
    }

    fn is_odd(&self, instance: usize) -> bool {
        match self.odd {
            Odd::LostZone | Odd::CrowdedZone => instance < self.servers.len() / 3,
            _ => instance == 0,
        }
    }

    fn run(mut self, time: Duration) -> Outcome {
        while let Some(Reverse(Due(now, _, event))) = self.events.pop()
            && now < time
        {
            match event {
                Event::Call(caller) => {
                    let next = now + self.between_calls();
                    self.put(next, Event::Call(caller));
                    self.call(caller, now);
                }
                Event::Done(instance, job, failed, had_slot) => self.done(instance, job, failed, had_slot, now),
            }
        }
        self.latencies.sort_by(f64::total_cmp);
        let at = |share: f64| self.latencies[((self.latencies.len() - 1) as f64 * share) as usize] * 1000.0;
        let odd = (0..self.servers.len()).filter(|n| self.is_odd(*n)).count();
        Outcome {
            share: self.to_odd as f64 / self.calls as f64 * self.servers.len() as f64 / odd as f64,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            failed: self.failed as f64 / self.calls as f64,
        }
    }

    fn call(&mut self, caller: usize, now: Duration) {
        let instant = self.start + now;
        let instances = self.servers.len();
        let (a, b) = (self.rng.random_range(0..instances), self.rng.random_range(0..instances));
        let who = &mut self.callers[caller];
        let (chosen, pending) = match self.policy {
            Policy::Ours => {
                let wish = Wish { zone: who.zone, ..Wish::default() };
                let picked = pick(&who.candidates, wish, instant, &mut self.rng, |_| {}).expect("there are some");
                let chosen = who.candidates.iter().position(|c| std::ptr::eq(c, picked)).expect("one of them");
                (chosen, Some(picked.experience.begin_at(&picked.peer, instant)))
            }
            Policy::RoundRobin => {
                who.next += 1;
                (who.next % instances, None)
            }
            Policy::LeastRequest => (if who.under_way[a] <= who.under_way[b] { a } else { b }, None),
            Policy::PeakEwma => {
                let cost = |n: usize| (who.latency[n].0 + 1e-6) * f64::from(who.under_way[n] + 1);
                (if cost(a) <= cost(b) { a } else { b }, None)
            }
        };
        who.under_way[chosen] += 1;
        self.calls += 1;
        self.to_odd += usize::from(self.is_odd(chosen));
        let job = Job { caller, begun: now, pending };
        let is_failing = match self.odd {
            Odd::FailsFast => chosen == 0,
            Odd::Flaps => chosen == 0 && now.as_secs() % 3 == 1,
            _ => false,
        };
        if self.odd == Odd::LostZone && self.is_odd(chosen) && now > Duration::from_secs(1) {
            self.put(now + NOTICED, Event::Done(chosen, job, true, false));
        } else if is_failing {
            self.put(now + Duration::from_micros(100), Event::Done(chosen, job, true, false));
        } else if self.servers[chosen].working < SLOTS {
            self.servers[chosen].working += 1;
            self.work(chosen, job, now);
        } else {
            self.servers[chosen].line.push_back(job);
        }
    }

    fn work(&mut self, instance: usize, job: Job, now: Duration) {
        let mut time = self.exponential(WORK);
        match self.odd {
            Odd::Slow if instance == 0 => time *= 10,
            Odd::Cold if instance == 0 && now < Duration::from_secs(3) => time *= 10,
            _ => {}
        }
        self.put(now + time, Event::Done(instance, job, false, true));
    }

    fn done(&mut self, instance: usize, job: Job, failed: bool, had_slot: bool, now: Duration) {
        if had_slot {
            match self.servers[instance].line.pop_front() {
                Some(next) => self.work(instance, next, now),
                None => self.servers[instance].working -= 1,
            }
        }
        let took = now - job.begun;
        if let Some(mut pending) = job.pending {
            let load = self.servers[instance].working + self.servers[instance].line.len();
            pending.told_at(load as u32, self.start + now);
            pending.answered_at(took, failed, self.start + now);
        }
        let who = &mut self.callers[job.caller];
        who.under_way[instance] -= 1;
        let (latency, at) = &mut who.latency[instance];
        let kept = (-(now - *at).as_secs_f64() / 10.0).exp();
        *latency = if took.as_secs_f64() > *latency {
            took.as_secs_f64()
        } else {
            *latency * kept + took.as_secs_f64() * (1.0 - kept)
        };
        *at = now;
        self.failed += usize::from(failed);
        self.latencies.push(took.as_secs_f64());
    }
}

const POLICIES: [Policy; 4] = [Policy::Ours, Policy::RoundRobin, Policy::LeastRequest, Policy::PeakEwma];

#[test]
#[ignore = "prints the table of docs/balancing.md"]
fn balancing_table() {
    for (callers, instances, seconds) in [(10, 9, 10), (100, 99, 10)] {
        println!("\n{callers} callers, {instances} instances, {seconds} s, {:.0} % load", LOAD * 100.0);
        println!("{:<10} {:<13} {:>8} {:>9} {:>9} {:>9}", "", "", "share", "p50 ms", "p99 ms", "failed %");
        for odd in [Odd::Nothing, Odd::Slow, Odd::FailsFast, Odd::Flaps, Odd::Cold, Odd::LostZone, Odd::CrowdedZone] {
            for policy in POLICIES {
                let Outcome { share, p50_ms, p99_ms, failed } =
                    World::new(policy, odd, callers, instances).run(Duration::from_secs(seconds));
                println!(
                    "{:<10} {:<13} {share:>8.2} {p50_ms:>9.1} {p99_ms:>9.1} {:>9.2}",
                    format!("{odd:?}"),
                    format!("{policy:?}"),
                    failed * 100.0
                );
            }
        }
    }
}

/// What the table says, as far as it must stay so.
#[test]
fn odd_instances_get_what_they_can_bear() {
    let run = |policy, odd| World::new(policy, odd, 10, 9).run(Duration::from_secs(6));
    let even = run(Policy::Ours, Odd::Nothing);
    assert!((0.8..1.2).contains(&even.share) && even.p99_ms < 40.0, "{even:?}");
    let slow = run(Policy::Ours, Odd::Slow);
    assert!(slow.share < 0.2 && slow.p99_ms < run(Policy::RoundRobin, Odd::Slow).p99_ms / 5.0, "{slow:?}");
    let failing = run(Policy::Ours, Odd::FailsFast);
    assert!(failing.failed < 0.005, "a fast failure attracts nobody: {failing:?}");
    assert!(failing.failed < run(Policy::PeakEwma, Odd::FailsFast).failed / 10.0);
    let flapping = run(Policy::Ours, Odd::Flaps);
    assert!(flapping.failed < run(Policy::RoundRobin, Odd::Flaps).failed / 3.0, "{flapping:?}");
    let cold = run(Policy::Ours, Odd::Cold);
    assert!(cold.p99_ms < run(Policy::RoundRobin, Odd::Cold).p99_ms / 3.0, "{cold:?}");
    let lost = run(Policy::Ours, Odd::LostZone);
    assert!(lost.failed < run(Policy::RoundRobin, Odd::LostZone).failed / 3.0, "{lost:?}");
    let crowded = run(Policy::Ours, Odd::CrowdedZone);
    assert!(crowded.p99_ms < 150.0 && crowded.share > 1.2, "near first, and not at any price: {crowded:?}");
}
