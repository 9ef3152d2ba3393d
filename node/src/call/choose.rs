//! Which instance gets a call: two random choices, the less loaded one wins (Mitzenmacher 2001), load being the peak-sensitive
//! moving average of latency times the calls in flight, as in Finagle's and Linkerd's PeakEWMA.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rand::{Rng, RngExt};
use starling_gossip::Instance;

/// Weight of the past: after this long, an old sample counts for about a third.
const DECAY: Duration = Duration::from_secs(10);
/// What a node is taken for before it has answered anything.
const INITIAL_LATENCY: Duration = Duration::from_millis(1);
/// What a failing answer counts as, so that a node that fails fast does not look fast.
const FAILURE_LATENCY: Duration = Duration::from_secs(2);
/// Failures in a row that take a node out.
const MAX_CONSECUTIVE_FAILURES: u32 = 5;
const EJECT_MIN: Duration = Duration::from_secs(1);
const EJECT_MAX: Duration = Duration::from_secs(60);

/// This node's own experience with one peer. Counters only: read and written without locks on the way of a call.
#[derive(Debug)]
pub(crate) struct PeerLoad {
    epoch: Instant,
    in_flight: AtomicU32,
    /// Calls in flight that the peer itself last told, from all its callers.
    told: AtomicU32,
    latency_ns: AtomicU64,
    updated_ms: AtomicU64,
    failures: AtomicU32,
    ejections: AtomicU32,
    ejected_until_ms: AtomicU64,
}

impl PeerLoad {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            in_flight: AtomicU32::new(0),
            told: AtomicU32::new(0),
            latency_ns: AtomicU64::new(INITIAL_LATENCY.as_nanos() as u64),
            updated_ms: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            ejected_until_ms: AtomicU64::new(0),
        }
    }

    /// Counts a call until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Relaxed);
        InFlight(self.clone())
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    pub(crate) fn told(&self, load: u32) {
        self.told.store(load, Relaxed);
    }

    /// An answer came after `latency`; `failed` if it was an error of the service or a refusal to work.
    pub(crate) fn answered(&self, latency: Duration, failed: bool) {
        self.sample(if failed { latency.max(FAILURE_LATENCY) } else { latency });
        if failed {
            self.count_failure();
        } else {
            self.failures.store(0, Relaxed);
            self.ejections.store(0, Relaxed);
        }
    }

    /// No answer: the connection failed or went silent. Out at once; gossip confirms later.
    pub(crate) fn unreachable(&self) {
        self.sample(FAILURE_LATENCY);
        self.eject();
    }

    pub(crate) fn is_ejected(&self) -> bool {
        self.now_ms() < self.ejected_until_ms.load(Relaxed)
    }

    fn count_failure(&self) {
        if self.failures.fetch_add(1, Relaxed) + 1 >= MAX_CONSECUTIVE_FAILURES {
            self.failures.store(0, Relaxed);
            self.eject();
        }
    }

    fn eject(&self) {
        if self.is_ejected() {
            return;
        }
        let times = self.ejections.fetch_add(1, Relaxed).min(6);
        let pause = (EJECT_MIN * 2u32.pow(times)).min(EJECT_MAX);
        self.ejected_until_ms.store(self.now_ms() + pause.as_millis() as u64, Relaxed);
    }

    fn sample(&self, latency: Duration) {
        let now = self.now_ms();
        let elapsed = now.saturating_sub(self.updated_ms.swap(now, Relaxed));
        let sample = latency.as_nanos() as f64;
        let old = self.latency_ns.load(Relaxed) as f64;
        // Peaks count at once, recovery takes its time.
        let new = if sample > old {
            sample
        } else {
            let keep = (-(elapsed as f64 + 1.0) / DECAY.as_millis() as f64).exp();
            old * keep + sample * (1.0 - keep)
        };
        self.latency_ns.store(new as u64, Relaxed);
    }

    fn cost(&self) -> f64 {
        let in_flight = self.in_flight.load(Relaxed).max(self.told.load(Relaxed));
        self.latency_ns.load(Relaxed) as f64 * f64::from(in_flight + 1)
    }

    fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64 + 1
    }
}

/// One call in flight at a peer.
pub(crate) struct InFlight(Arc<PeerLoad>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// An instance with what this node knows of its peer.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) instance: Arc<Instance>,
    pub(crate) load: Arc<PeerLoad>,
}

/// Picks among `candidates`, which are callable by the mesh's word; `tried` ones only if nothing else is left. Never lets
/// more than half be ejected: then our own view is the suspect. Same zone first.
pub(crate) fn pick<'a>(
    candidates: &'a [Candidate],
    zone: &str,
    tried: &[starling_protocol::NodeId],
    rng: &mut impl Rng,
) -> Option<&'a Candidate> {
    let ejected = candidates.iter().filter(|c| c.load.is_ejected()).count();
    let panic = ejected * 2 > candidates.len();
    let fresh = |c: &&Candidate| !tried.contains(&c.instance.node);
    let usable = |c: &&Candidate| panic || !c.load.is_ejected();
    let near = |c: &&Candidate| !zone.is_empty() && c.instance.zone == zone;
    let tiers: [&dyn Fn(&&Candidate) -> bool; 4] =
        [&|c| fresh(c) && usable(c) && near(c), &|c| fresh(c) && usable(c), &|c| fresh(c), &|_| true];
    tiers.iter().find_map(|tier| {
        let tier: Vec<&Candidate> = candidates.iter().filter(|c| tier(c)).collect();
        two_choices(&tier, rng)
    })
}

fn two_choices<'a>(candidates: &[&'a Candidate], rng: &mut impl Rng) -> Option<&'a Candidate> {
    match candidates {
        [] => None,
        [only] => Some(only),
        _ => {
            let a = weighted(candidates, None, rng);
            let b = weighted(candidates, Some(a), rng);
            let (a, b) = (candidates[a], candidates[b]);
            Some(if a.load.cost() <= b.load.cost() { a } else { b })
        }
    }
}

/// An index drawn by weight, not `except`.
fn weighted(candidates: &[&Candidate], except: Option<usize>, rng: &mut impl Rng) -> usize {
    let weight = |(i, c): (usize, &&Candidate)| if Some(i) == except { 0 } else { u32::from(c.instance.weight) };
    let total: u32 = candidates.iter().enumerate().map(weight).sum();
    let mut at = rng.random_range(0..total.max(1));
    for (i, c) in candidates.iter().enumerate() {
        let own = weight((i, c));
        if at < own {
            return i;
        }
        at -= own;
    }
    0
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};
    use starling_protocol::{NodeId, Protocol};

    use super::*;

    fn candidate(n: u8, zone: &str) -> Candidate {
        let instance = Instance {
            node: NodeId([n; 16]),
            generation: 1,
            service: "orders".parse().unwrap(),
            node_name: format!("n{n}").parse().unwrap(),
            addr: ([127, 0, 0, n], 7400).into(),
            zone: zone.into(),
            version: String::new(),
            protocol: Protocol::Http1,
            weight: 100,
        };
        Candidate { instance: Arc::new(instance), load: Arc::new(PeerLoad::new()) }
    }

    fn shares(candidates: &[Candidate], zone: &str, tried: &[NodeId]) -> Vec<usize> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut counts = vec![0; candidates.len()];
        for _ in 0..3000 {
            let picked = pick(candidates, zone, tried, &mut rng).unwrap();
            counts[candidates.iter().position(|c| c.instance.node == picked.instance.node).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn the_busy_and_the_slow_get_less() {
        let all = [candidate(1, ""), candidate(2, ""), candidate(3, "")];
        let _busy: Vec<_> = (0..10).map(|_| all[0].load.begin()).collect();
        let counts = shares(&all, "", &[]);
        assert!(counts[0] == 0 && counts[1] > 1000 && counts[2] > 1000, "{counts:?}");
    }

    #[test]
    fn a_node_that_fails_fast_does_not_look_fast() {
        let all = [candidate(1, ""), candidate(2, "")];
        all[0].load.answered(Duration::from_micros(50), true);
        all[1].load.answered(Duration::from_millis(20), false);
        assert_eq!(shares(&all, "", &[]), [0, 3000]);
    }

    #[test]
    fn the_unreachable_is_out_at_once_but_never_more_than_half() {
        let all = [candidate(1, ""), candidate(2, ""), candidate(3, "")];
        all[0].load.unreachable();
        assert_eq!(shares(&all, "", &[])[0], 0);
        all[1].load.unreachable();
        let counts = shares(&all, "", &[]);
        assert!(counts.iter().all(|n| *n > 0) || counts[2] == 3000, "{counts:?}");
        assert!(pick(&all, "", &[all[2].instance.node], &mut rand::rng()).is_some());
    }

    #[test]
    fn same_zone_first_and_tried_ones_last() {
        let all = [candidate(1, "a"), candidate(2, "b"), candidate(3, "a")];
        assert_eq!(shares(&all, "a", &[])[1], 0);
        assert_eq!(shares(&all, "a", &[all[0].instance.node])[0], 0);
        let everybody: Vec<NodeId> = all.iter().map(|c| c.instance.node).collect();
        assert!(shares(&all, "a", &everybody).iter().all(|n| *n > 0));
    }
}
