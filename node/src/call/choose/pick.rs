//! Which instance gets a call: two random choices, the less loaded one wins (Mitzenmacher 2001), load being the
//! peak-sensitive moving average of latency times the calls in flight, as in Finagle's and Linkerd's PeakEWMA.

use std::sync::Arc;

use rand::{Rng, RngExt};
use starling_gossip::Instance;

use super::experience::PeerLoad;

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
    use std::time::Duration;

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
