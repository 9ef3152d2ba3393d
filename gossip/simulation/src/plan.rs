//! A chaos plan on the simulated clock: the same steps, the same victims for the same seed, gossip only.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use anyhow::Result;
use rand::{SeedableRng, rngs::StdRng};
use starling_chaos::{
    History, Plan,
    history::{Begin, Entry, Event, Injected, Phase, STEADY, Side},
    plan::{Backend, Fault as Planned, Step},
};
use starling_protocol::{MemberHealth, admin::MemberStatus};

use crate::{
    MS, S,
    network::Fault,
    view::Seen,
    world::{Action, World},
};

/// Nodes whose views are noted: those of thousands would be millions of lines.
const MOST_OBSERVERS: usize = 40;
/// How often views are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How often a stranger forges something.
const FORGES: Duration = Duration::from_millis(500);
/// Longer than a mesh of any size takes to find itself.
const CONVERGED: Duration = Duration::from_secs(120);
/// Beyond the plan's own bound: then it has failed.
const HEAL_BEYOND: Duration = Duration::from_secs(60);

/// Carries out a plan. What a broken invariant says stands in the history; nothing panics.
///
/// # Errors
/// If a role cannot be filled.
pub fn run(name: &str, plan: &Plan, replay: String) -> Result<History> {
    let mut begin = Begin::new(name.into(), plan, Backend::Sim, replay);
    let stride = begin.nodes.len().div_ceil(MOST_OBSERVERS);
    begin.observers = begin.nodes.iter().step_by(stride).cloned().collect();
    let observers = (0..begin.nodes.len()).step_by(stride).collect();
    let names = begin.nodes.clone();
    let mut world = World::new(names.len(), plan.seed);
    world.seeds = plan.mesh.seeds.max(1);
    let entries = vec![Entry { at: 0.0, event: Event::Begin(Box::new(begin)) }];
    let mut run = Run {
        plan,
        world,
        names,
        observers,
        seen: BTreeMap::new(),
        entries,
        gone: BTreeSet::new(),
        hits: BTreeMap::new(),
        faults: 0,
    };
    // An invariant that does not hold is a panic of the world, with all it has to say.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let done = catch_unwind(AssertUnwindSafe(|| run.steps()));
    std::panic::set_hook(hook);
    let (broken, failed) = match done {
        Ok(Ok(())) => (None, None),
        Ok(Err(error)) => (None, Some(format!("{error:#}"))),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
            (Some(text), None)
        }
    };
    run.note(Event::Simulated {
        digest: format!("{:016x}", run.world.trace),
        events: run.world.events_done,
        false_downs: run.world.invariants.false_downs.clone(),
        broken,
    });
    run.note(Event::End { whole: failed.is_none(), why: failed });
    Ok(History { entries: run.entries })
}

struct Run<'a> {
    plan: &'a Plan,
    world: World,
    names: Vec<String>,
    observers: Vec<usize>,
    seen: BTreeMap<(usize, usize), (MemberStatus, u64)>,
    entries: Vec<Entry>,
    gone: BTreeSet<String>,
    hits: BTreeMap<String, usize>,
    faults: usize,
}

/// A fault that is on.
struct Active {
    id: usize,
    fault: Planned,
    victims: Vec<usize>,
    at: f64,
    network: Vec<Fault>,
    touched_before: u64,
}

impl Run<'_> {
    fn note(&mut self, event: Event) {
        self.entries.push(Entry { at: self.world.now.as_secs_f64(), event });
    }

    fn steps(&mut self) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(self.plan.seed);
        let nodes = self.names.len();
        for node in 0..nodes {
            self.world.plan(S * node as u32 / nodes as u32, Action::Start(node));
        }
        self.world.run_until(S);
        let agreed = self.world.run_until_holds(CONVERGED, World::views_agree);
        assert!(agreed.is_some(), "no agreement after the start:\n{}", self.world.disagreement());
        self.look();
        self.phase(0, Phase::Baseline);
        self.until(self.world.now + self.plan.load.calm);
        let begun = self.world.now;
        let mut number = 0;
        loop {
            for step in &self.plan.steps {
                self.step(number, step, &mut rng)?;
                number += 1;
                if self.plan.duration.is_some_and(|limit| self.world.now - begun >= limit) {
                    return Ok(());
                }
            }
            if self.plan.duration.is_none() {
                return Ok(());
            }
        }
    }

    fn phase(&mut self, step: usize, phase: Phase) {
        self.note(Event::Phase { step, phase });
    }

    fn step(&mut self, number: usize, step: &Step, rng: &mut StdRng) -> Result<()> {
        self.phase(number, Phase::Fault);
        let mut taken = Vec::new();
        let mut active = Vec::new();
        for fault in step.faults.iter().filter(|fault| fault.cannot(Backend::Sim).is_none()) {
            let victims = match fault.victims() {
                Some(victims) => victims.pick(self.plan, &self.gone, &taken, &mut self.hits, rng)?,
                None => Vec::new(),
            };
            taken.extend(victims.iter().cloned());
            if !active.is_empty() {
                self.until(self.world.now + step.stagger);
            }
            active.push(self.begin(number, fault, victims, step.hold));
        }
        self.until(self.world.now + step.hold);
        active.iter().for_each(|active| self.signs(active));
        self.phase(number, Phase::Healing);
        for active in active {
            self.end(&active);
        }
        let limit = self.world.now + step.expect.heal + HEAL_BEYOND;
        let mut agreed = None;
        while self.world.now < limit {
            self.until(self.world.now + LOOK);
            agreed = if self.world.views_agree() { agreed.or(Some(self.world.now)) } else { None };
            if let Some(since) = agreed.filter(|since| self.world.now - *since >= STEADY) {
                self.note(Event::Recovered { step: number, since: since.as_secs_f64() });
                break;
            }
        }
        self.phase(number, Phase::Calm);
        self.until(self.world.now + self.plan.load.calm);
        Ok(())
    }

    fn begin(&mut self, step: usize, fault: &Planned, victims: Vec<String>, hold: Duration) -> Active {
        let id = self.faults;
        self.faults += 1;
        let injected = Injected::new(id, step, fault, &victims, &self.names);
        if injected.for_good {
            self.gone.extend(victims.iter().cloned());
        }
        self.note(Event::Inject(Box::new(injected)));
        let victims: Vec<usize> = victims.iter().filter_map(|v| self.names.iter().position(|name| name == v)).collect();
        let (now, end) = (self.world.now, self.world.now + hold);
        let mut network = Vec::new();
        let everybody = victims.len() == self.names.len();
        for node in victims.iter().copied() {
            match fault {
                Planned::Kill { back, .. } => {
                    self.world.plan(now, Action::Kill(node));
                    if let Some(back) = back {
                        self.world.plan(now + *back, Action::Start(node));
                    }
                }
                Planned::Herd { .. } => self.world.plan(now, Action::Kill(node)),
                Planned::Pause { .. } => self.world.plan(now, Action::Pause(node)),
                Planned::Clock { ahead, .. } => {
                    self.world.plan(now, Action::Kill(node));
                    self.world.plan(now, Action::Clock(node, ahead.as_secs()));
                    self.world.plan(now + 200 * MS, Action::Start(node));
                }
                Planned::Strangers { .. } => {
                    let mut at = now;
                    while at < end {
                        self.world.plan(at, Action::Forge(node));
                        at += FORGES;
                    }
                }
                Planned::Mute { .. } => network.push(Fault::Mute(node)),
                Planned::Deaf { .. } => network.push(Fault::Deaf(node)),
                Planned::Loss { share, .. } if !everybody => network.push(Fault::Lossy(node, *share)),
                Planned::Delay { by, jitter, .. } => network.push(Fault::Slow(node, *by, *jitter)),
                _ => {}
            }
        }
        match fault {
            Planned::Loss { share, .. } if everybody => network.push(Fault::Loss(*share)),
            Planned::Duplicate { share, .. } => network.push(Fault::Duplication(*share)),
            Planned::Cut { .. } => {
                for (at, a) in victims.iter().enumerate() {
                    network.extend(victims[at + 1..].iter().map(|b| Fault::Cut(*a, *b)));
                }
            }
            Planned::Partition { flip, .. } => {
                let apart = Fault::Apart(victims.clone());
                match flip {
                    None => network.push(apart),
                    Some(flip) => {
                        let mut at = now;
                        while at < end {
                            self.world.plan(at, Action::Begin(apart.clone()));
                            self.world.plan((at + *flip).min(end), Action::End(apart.clone()));
                            at += *flip * 2;
                        }
                    }
                }
            }
            _ => {}
        }
        let touched_before = self.touched();
        for fault in &network {
            self.world.plan(now, Action::Begin(fault.clone()));
        }
        self.world.run_until(now);
        Active { id, fault: fault.clone(), victims, at: now.as_secs_f64(), network, touched_before }
    }

    fn touched(&self) -> u64 {
        self.world.network.fired.values().sum()
    }

    fn end(&mut self, active: &Active) {
        let now = self.world.now;
        for fault in &active.network {
            self.world.plan(now, Action::End(fault.clone()));
        }
        for node in active.victims.iter().copied() {
            match active.fault {
                Planned::Kill { back: None, for_good: false, .. } | Planned::Herd { .. } => {
                    self.world.plan(now, Action::Start(node));
                }
                Planned::Pause { .. } => self.world.plan(now, Action::Resume(node)),
                Planned::Clock { .. } => {
                    self.world.plan(now, Action::Kill(node));
                    self.world.plan(now, Action::Clock(node, 0));
                    self.world.plan(now + 200 * MS, Action::Start(node));
                }
                _ => {}
            }
        }
        self.world.run_until(now);
        self.note(Event::Heal { fault: active.id });
        let what = "the simulation has ended it".into();
        self.note(Event::Sign { fault: active.id, side: Side::Healed, found: true, what });
    }

    /// What the world knows of a fault, and what the nodes show of it.
    fn signs(&mut self, active: &Active) {
        let is_of_network = !active.network.is_empty() || matches!(active.fault, Planned::Partition { .. });
        let touched = self.touched() - active.touched_before;
        let (found, what) = match is_of_network {
            true => (touched > 0, format!("{touched} packets were touched meanwhile")),
            false if matches!(active.fault, Planned::Strangers { .. }) => {
                (self.world.forged > 0, format!("{} bundles were forged", self.world.forged))
            }
            false => (true, "the nodes do not run, or run anew".into()),
        };
        self.note(Event::Sign { fault: active.id, side: Side::Stage, found, what });
        let names: Vec<&String> = active.victims.iter().map(|victim| &self.names[*victim]).collect();
        let sign = self.entries.iter().filter(|entry| entry.at >= active.at).find_map(|entry| match &entry.event {
            Event::View { observer, subject, status, generation } if names.contains(&subject) => {
                let status = status.map_or("absent".into(), |status| status.to_string());
                Some(format!("{observer} shows {subject} as {status}, life {generation}"))
            }
            _ => None,
        });
        let refused = self.world.records_refused();
        let sign = match active.fault {
            Planned::Strangers { .. } => (refused > 0).then(|| format!("{refused} records were refused")),
            _ => sign,
        };
        let shown = sign.is_some();
        let quiet = matches!(
            active.fault,
            Planned::Loss { .. } | Planned::Delay { .. } | Planned::Duplicate { .. } | Planned::Cut { .. }
        );
        let what = match sign {
            Some(sign) => sign,
            None if quiet => "nothing shows, as it should be".into(),
            None => "no observer shows anything of it".into(),
        };
        self.note(Event::Sign { fault: active.id, side: Side::Product, found: shown || quiet, what });
    }

    fn until(&mut self, end: Duration) {
        while self.world.now < end {
            self.world.run_until(end.min(self.world.now + LOOK));
            self.look();
        }
    }

    /// Notes what observers show differently from before.
    fn look(&mut self) {
        for observer in self.observers.clone() {
            let place = &self.world.nodes[observer];
            if place.gossip.is_none() || place.paused {
                continue;
            }
            for subject in 0..self.names.len() {
                let seen = self.world.view(observer).get(subject);
                let now = seen.map(|seen| (status(seen), seen.generation));
                let before = self.seen.get(&(observer, subject)).copied();
                if now == before {
                    continue;
                }
                match now {
                    Some(now) => drop(self.seen.insert((observer, subject), now)),
                    None => drop(self.seen.remove(&(observer, subject))),
                }
                // That a mesh of thousands finds itself is no news.
                let is_first = before.is_none() && now.is_some_and(|(status, _)| status == MemberStatus::Alive);
                if is_first && self.names.len() > MOST_OBSERVERS {
                    continue;
                }
                self.note(Event::View {
                    observer: self.names[observer].clone(),
                    subject: self.names[subject].clone(),
                    status: now.map(|(status, _)| status),
                    generation: now.or(before).map_or(0, |(_, generation)| generation),
                });
            }
        }
    }
}

fn status(seen: Seen) -> MemberStatus {
    match seen.health {
        _ if seen.left => MemberStatus::Left,
        MemberHealth::Alive => MemberStatus::Alive,
        MemberHealth::Suspect => MemberStatus::Suspect,
        MemberHealth::Down => MemberStatus::Down,
    }
}
