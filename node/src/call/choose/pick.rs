//! Which instance gets a call: by chance, the likelier the less it is expected to cost, which is its latency, a moving
//! average that peaks count in at once, times the calls that are in line, as in Finagle's and Linkerd's PeakEWMA.

use std::{sync::Arc, time::Instant};

use rand::{Rng, RngExt};
use starling_gossip::Instance;
use starling_protocol::NodeId;

use super::{
    super::Kind,
    experience::{Experience, PendingCall, Reach},
};

/// Instances that are compared for a call, at most: drawn at random where there are more.
const COMPARED: usize = 8;
/// The own zone is left when calls cost so many times as much there as in others.
const ZONE_IS_WORTH: f64 = 8.0;
/// Where so many calls are in line at an instance of the own zone, on average, one call in so many goes to look at others.
const ZONE_IS_BUSY: f64 = 4.0;
const LOOK_BEYOND: u32 = 50;

/// An instance with what this node knows of it and of its peer.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) instance: Arc<Instance>,
    pub(crate) peer: Arc<Reach>,
    pub(crate) experience: Arc<Experience>,
}

impl Candidate {
    /// Counts a call to it until the guard is dropped.
    pub(crate) fn begin(&self) -> PendingCall {
        self.experience.begin(&self.peer)
    }
}

/// What a call needs of an instance.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wish<'a> {
    /// That it takes this.
    pub(crate) kind: Kind,
    /// That it has this version.
    pub(crate) version: Option<&'a str>,
    /// Better in this zone; none if empty.
    pub(crate) zone: &'a str,
    /// Better not one of these.
    pub(crate) tried: &'a [NodeId],
    /// Not one of these, which could not be reached a moment ago.
    pub(crate) dead: &'a [NodeId],
}

/// How an instance stands at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It does not come into question.
    Unfit,
    Usable,
    /// Out for its answers.
    Ejected,
    /// Its peer is out of reach.
    Lost,
}

/// Picks among `candidates`, which are callable by the mesh's word; `tried` ones only if nothing else is left, and `dead`
/// ones not at all. One whose peer is out of reach is left until nobody else is there: it would not answer, and the call would
/// only wait for it. Of those within reach, never more than half are ejected for their answers: then our own view is the
/// suspect. Same zone first. `due` gets those whose peers are to be dialled again.
pub(crate) fn pick<'a>(
    candidates: &'a [Candidate],
    wish: Wish<'_>,
    now: Instant,
    rng: &mut impl Rng,
    mut due: impl FnMut(&'a Candidate),
) -> Option<&'a Candidate> {
    let Wish { kind, version, zone, tried, dead } = wish;
    let mut standing_of = |candidate: &'a Candidate| {
        let (instance, peer) = (&candidate.instance, &candidate.peer);
        let suits = Kind::of_service(&instance.protocol) == Some(kind);
        if !suits || version.is_some_and(|version| instance.version != version) {
            return Standing::Unfit;
        }
        let (is_lost, is_due) = peer.look(now);
        if is_due {
            due(candidate);
        }
        match () {
            () if is_lost => Standing::Lost,
            () if candidate.experience.is_ejected_at(now) => Standing::Ejected,
            () => Standing::Usable,
        }
    };
    let mut standings: Vec<Standing> = candidates.iter().map(&mut standing_of).collect();
    let count = |standing| standings.iter().filter(|s| **s == standing).count();
    let ejected = count(Standing::Ejected);
    let panic = ejected > count(Standing::Usable);
    if !dead.is_empty() {
        for (candidate, standing) in candidates.iter().zip(&mut standings) {
            if dead.contains(&candidate.instance.node) {
                *standing = Standing::Unfit;
            }
        }
    }
    let is_fresh = |c: &Candidate| !tried.contains(&c.instance.node);
    let is_near = |c: &Candidate| !zone.is_empty() && c.instance.zone == zone;
    // Whether one must be fresh, usable, near.
    let tiers = [(true, true, true), (true, true, false), (true, false, false), (false, false, false)];
    let is_tunnel = kind != Kind::Http;
    let mut from = usize::from(zone.is_empty());
    // Tunnels are long and idle, mostly: how many there are says nothing about room.
    if from == 0 && !is_tunnel {
        let usable = || candidates.iter().zip(&standings).filter(|(_, s)| **s == Standing::Usable).map(|(c, _)| c);
        match ZoneView::of(usable(), is_near, is_tunnel, now) {
            ZoneView::HasRoom => {}
            ZoneView::KnowsNoOther if rng.random_range(0..LOOK_BEYOND) == 0 => {
                if let Some(beyond) = draw(usable().filter(|c| !is_near(c) && is_fresh(c)), is_tunnel, now, rng) {
                    return Some(beyond);
                }
            }
            ZoneView::KnowsNoOther => {}
            ZoneView::IsFull => from = 1,
        }
    }
    tiers[from..].iter().find_map(|&(must_be_fresh, must_be_usable, must_be_near)| {
        let fits = |(candidate, standing): &(&Candidate, &Standing)| {
            let is_usable = match **standing {
                Standing::Unfit => return false,
                Standing::Usable => true,
                Standing::Ejected => panic,
                Standing::Lost => false,
            };
            (!must_be_usable || is_usable)
                && (!must_be_fresh || is_fresh(candidate))
                && (!must_be_near || is_near(candidate))
        };
        let fitting = candidates.iter().zip(&standings).filter(fits).map(|(candidate, _)| candidate);
        draw(fitting, is_tunnel, now, rng)
    })
}

/// Whether there is one that may be asked, and is none of `but`. Nobody is dialled for that.
pub(crate) fn has_another(candidates: &[Candidate], wish: Wish<'_>, but: &[NodeId], now: Instant) -> bool {
    candidates.iter().any(|candidate| {
        let instance = &candidate.instance;
        Kind::of_service(&instance.protocol) == Some(wish.kind)
            && wish.version.is_none_or(|version| instance.version == version)
            && !but.contains(&instance.node)
            && !candidate.peer.is_out()
            && !candidate.experience.is_ejected_at(now)
    })
}

/// How the own zone stands beside the others.
enum ZoneView {
    HasRoom,
    /// It is busy, and nothing is known of others: they are to be looked at.
    KnowsNoOther,
    /// Others are so much better that they are worth the way.
    IsFull,
}

impl ZoneView {
    fn of<'a>(
        usable: impl Iterator<Item = &'a Candidate>,
        is_near: impl Fn(&Candidate) -> bool,
        is_tunnel: bool,
        now: Instant,
    ) -> Self {
        // Of those of whom something is known. The cheapest near one counts: one that fails is no reason to go far.
        let (mut near, mut in_line, mut cheapest) = (0.0, 0.0, f64::MAX);
        let (mut far, mut far_cost) = (0.0, 0.0);
        for candidate in usable {
            match candidate.experience.known_cost_at(is_tunnel, now) {
                Some((cost, line)) if is_near(candidate) => {
                    (near, in_line, cheapest) = (near + 1.0, in_line + f64::from(line), cost.min(cheapest));
                }
                Some((cost, _)) => (far, far_cost) = (far + 1.0, far_cost + cost),
                None => {}
            }
        }
        match () {
            () if near == 0.0 || in_line / near < ZONE_IS_BUSY => Self::HasRoom,
            () if far == 0.0 => Self::KnowsNoOther,
            () if cheapest > ZONE_IS_WORTH * far_cost / far => Self::IsFull,
            () => Self::HasRoom,
        }
    }
}

/// One of a few, drawn by its weight over the square of what it costs. Equals get equal shares, however close their costs;
/// and one that is kept away from still gets a call now and then, by which it can show that it is better than its past. (Two
/// random choices, of which the cheaper one is taken, would leave the second of two nearly equal instances with nothing.)
fn draw<'a>(
    candidates: impl Iterator<Item = &'a Candidate>,
    is_tunnel: bool,
    now: Instant,
    rng: &mut impl Rng,
) -> Option<&'a Candidate> {
    // A sample of all (Vitter's algorithm R).
    let mut compared = [None; COMPARED];
    let mut seen = 0;
    for candidate in candidates {
        let at = if seen < COMPARED { seen } else { rng.random_range(0..=seen) };
        if let Some(place) = compared.get_mut(at) {
            *place = Some(candidate);
        }
        seen += 1;
    }
    if seen <= 1 {
        return compared[0];
    }
    let share = |c: &Candidate| f64::from(c.instance.weight.max(1)) / c.experience.cost_at(is_tunnel, now).powi(2);
    let shares = compared.map(|candidate| candidate.map_or(0.0, share));
    let mut at = rng.random::<f64>() * shares.iter().sum::<f64>();
    for (candidate, share) in compared.iter().zip(shares) {
        at -= share;
        if at < 0.0 {
            return *candidate;
        }
    }
    compared[seen.min(COMPARED) - 1]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::{SeedableRng, rngs::StdRng};
    use starling_protocol::Protocol;

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
        Candidate { instance: Arc::new(instance), peer: Arc::default(), experience: Arc::new(Experience::new()) }
    }

    fn pick<'a>(
        candidates: &'a [Candidate],
        zone: &str,
        tried: &[NodeId],
        dead: &[NodeId],
        rng: &mut impl Rng,
    ) -> Option<&'a Candidate> {
        super::pick(candidates, Wish { zone, tried, dead, ..Wish::default() }, Instant::now(), rng, |_| {})
    }

    fn shares(candidates: &[Candidate], zone: &str, tried: &[NodeId]) -> Vec<usize> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut counts = vec![0; candidates.len()];
        for _ in 0..3000 {
            let picked = pick(candidates, zone, tried, &[], &mut rng).unwrap();
            counts[candidates.iter().position(|c| c.instance.node == picked.instance.node).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn equals_get_equal_shares() {
        let all = [candidate(1, ""), candidate(2, ""), candidate(3, "")];
        // As alike as two machines ever are.
        all[0].experience.answered_at(Duration::from_micros(1100), false, Instant::now());
        let counts = shares(&all, "", &[]);
        assert!(counts.iter().all(|n| (800..1200).contains(n)), "{counts:?}");
    }

    #[test]
    fn weights_are_shares() {
        for n in [2, 3, 7] {
            let mut all: Vec<Candidate> = (1..=n).map(|i| candidate(i, "")).collect();
            let first = Arc::make_mut(&mut all[0].instance);
            first.weight = 900;
            let wanted = 3000 * 9 / (9 + usize::from(n) - 1);
            let counts = shares(&all, "", &[]);
            assert!(counts[0].abs_diff(wanted) < 150, "{counts:?}, wanted {wanted}");
        }
    }

    #[test]
    fn the_busy_and_the_slow_get_less() {
        let all = [candidate(1, ""), candidate(2, ""), candidate(3, "")];
        let _busy: Vec<_> = (0..10).map(|_| all[0].begin()).collect();
        let counts = shares(&all, "", &[]);
        assert!(counts[0] < 60 && counts[1] > 1200 && counts[2] > 1200, "{counts:?}");
    }

    #[test]
    fn an_instance_that_fails_fast_does_not_look_fast() {
        let all = [candidate(1, ""), candidate(2, "")];
        all[0].experience.answered_at(Duration::from_micros(50), true, Instant::now());
        all[1].experience.answered_at(Duration::from_millis(20), false, Instant::now());
        let counts = shares(&all, "", &[]);
        assert!(counts[0] < 30, "{counts:?}");
    }

    #[test]
    fn the_unreachable_is_out_at_once_until_nobody_else_is_there() {
        let all = [candidate(1, ""), candidate(2, ""), candidate(3, "")];
        all[0].peer.unreachable();
        assert_eq!(shares(&all, "", &[])[0], 0);
        all[1].peer.unreachable();
        assert_eq!(shares(&all, "", &[]), [0, 0, 3000]);
        all[2].peer.unreachable();
        let counts = shares(&all, "", &[]);
        assert!(counts.iter().all(|n| *n > 0), "{counts:?}");
        let (last, rng) = (all[2].instance.node, &mut rand::rng());
        assert!(pick(&all, "", &[last], &[], rng).is_some(), "better one that was tried than none");
        let nobody: Vec<NodeId> = all.iter().map(|c| c.instance.node).collect();
        assert!(pick(&all, "", &[], &nobody, rng).is_none(), "a dead address is not dialled twice");
    }

    #[test]
    fn never_more_than_half_are_out_for_their_answers() {
        let all = [candidate(1, ""), candidate(2, ""), candidate(3, "")];
        let fail = |c: &Candidate| {
            (0..5).for_each(|_| c.experience.answered_at(Duration::from_millis(1), true, Instant::now()))
        };
        fail(&all[0]);
        assert_eq!(shares(&all, "", &[])[0], 0);
        fail(&all[1]);
        all[2].peer.unreachable();
        let counts = shares(&all, "", &[]);
        assert!(counts[0] > 0 && counts[1] > 0 && counts[2] == 0, "{counts:?}: both within reach");
    }

    #[test]
    fn same_zone_first_and_tried_ones_last() {
        let all = [candidate(1, "a"), candidate(2, "b"), candidate(3, "a")];
        assert_eq!(shares(&all, "a", &[])[1], 0);
        assert_eq!(shares(&all, "a", &[all[0].instance.node])[0], 0);
        let everybody: Vec<NodeId> = all.iter().map(|c| c.instance.node).collect();
        assert!(shares(&all, "a", &everybody).iter().all(|n| *n > 0));
    }

    #[test]
    fn of_many_each_has_its_share() {
        let all: Vec<Candidate> = (1..=40).map(|n| candidate(n, "")).collect();
        let counts = shares(&all, "", &[]);
        assert!(counts.iter().all(|n| (30..130).contains(n)), "{counts:?}");
        let wish = Wish { version: Some("v2"), ..Wish::default() };
        assert!(super::pick(&all, wish, Instant::now(), &mut rand::rng(), |_| {}).is_none());
    }

    #[test]
    fn a_peer_whose_time_has_come_is_due_once() {
        let all = [candidate(1, ""), candidate(2, "")];
        all[0].peer.unreachable();
        let later = Instant::now() + Duration::from_secs(2);
        let due = || {
            let mut due = Vec::new();
            super::pick(&all, Wish::default(), later, &mut rand::rng(), |c| due.push(c.instance.node));
            due
        };
        assert_eq!(due(), [all[0].instance.node]);
        assert!(due().is_empty());
    }
}
