//! When what was on: faults, steps and their phases.

use crate::{
    history::{Event, History, Injected, Phase},
    plan::Excuse,
};

/// A fault, and its time.
pub(super) struct FaultTime {
    pub(super) injected: Injected,
    pub(super) from: f64,
    /// When the runner ended it.
    pub(super) ended: f64,
    /// Until when it excuses: when the mesh was seen to have mended, or would have had to.
    pub(super) excuses_until: f64,
}

/// A step, and its time.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepTime {
    pub(super) step: usize,
    pub(super) fault: f64,
    pub(super) healing: f64,
    pub(super) calm: f64,
    pub(super) end: f64,
    /// Whether it came to its calm.
    pub(super) whole: bool,
    /// When it was certain that all saw all as they are.
    pub(super) recovered: Option<f64>,
    /// Since when they did.
    agreed: Option<f64>,
}

/// All of them.
pub(super) struct Times {
    pub(super) faults: Vec<FaultTime>,
    pub(super) steps: Vec<StepTime>,
    /// Nodes that were asked to end: who, from, until ready again.
    away: Vec<(String, f64, f64)>,
    /// Start of the load.
    pub(super) baseline: f64,
}

impl Times {
    pub(super) fn of(history: &History) -> Self {
        let last = history.entries.last().map_or(0.0, |entry| entry.at);
        let mut steps: Vec<StepTime> = Vec::new();
        let mut baseline = last;
        for entry in &history.entries {
            match &entry.event {
                Event::Phase { phase: Phase::Baseline, .. } => baseline = entry.at,
                Event::Phase { step, phase: Phase::Fault } => {
                    if let Some(before) = steps.last_mut() {
                        before.end = entry.at;
                    }
                    let (fault, late) = (entry.at, last);
                    let (whole, recovered, agreed) = (false, None, None);
                    let times =
                        StepTime { step: *step, fault, healing: late, calm: late, end: late, whole, recovered, agreed };
                    steps.push(times);
                }
                Event::Phase { phase, .. } => {
                    let Some(now) = steps.last_mut() else { continue };
                    match phase {
                        Phase::Healing => now.healing = entry.at,
                        Phase::Calm => (now.calm, now.whole) = (entry.at, true),
                        Phase::Baseline | Phase::Fault => {}
                    }
                }
                Event::Recovered { step, since } => {
                    if let Some(times) = steps.iter_mut().find(|times| times.step == *step) {
                        (times.recovered, times.agreed) = (Some(entry.at), Some(*since));
                    }
                }
                _ => {}
            }
        }
        let faults = history.entries.iter().filter_map(|entry| match &entry.event {
            Event::Inject(injected) => Some((entry.at, Injected::clone(injected))),
            _ => None,
        });
        let ended = |id: usize| {
            history.entries.iter().find(|e| matches!(e.event, Event::Heal { fault } if fault == id)).map(|e| e.at)
        };
        let faults = faults.map(|(from, injected)| {
            let step = steps.iter().find(|times| times.step == injected.step);
            // Recovered or not: in the calm nobody is excused any more.
            let until = step.map_or(last, |step| step.recovered.unwrap_or(step.calm));
            let excuses_until = if injected.for_good { f64::INFINITY } else { until };
            FaultTime { from, ended: ended(injected.fault).unwrap_or(last), excuses_until, injected }
        });
        let faults = faults.collect();
        let mut away: Vec<(String, f64, f64)> = Vec::new();
        for entry in &history.entries {
            match &entry.event {
                Event::Away { node, away: true } => away.push((node.clone(), entry.at, last)),
                Event::Away { node, away: false } => {
                    if let Some(open) = away.iter_mut().rev().find(|(who, ..)| who == node) {
                        open.2 = entry.at;
                    }
                }
                _ => {}
            }
        }
        Self { faults, steps, away, baseline }
    }

    /// Seconds from the end of a step's faults until all was mended.
    pub(super) fn healed(&self, step: usize) -> Option<f64> {
        let step = self.steps.iter().find(|times| times.step == step)?;
        step.agreed.map(|at| (at - step.healing).max(0.0))
    }

    /// Whether a node was away at any moment of that time.
    pub(super) fn is_away(&self, node: &str, from: f64, to: f64) -> bool {
        self.away.iter().any(|(who, since, until)| who == node && *since <= to && from <= *until)
    }

    /// Faults that are on, or from which the mesh still mends, at any moment of that time.
    pub(super) fn around(&self, from: f64, to: f64) -> impl Iterator<Item = &FaultTime> {
        self.faults.iter().filter(move |fault| fault.from <= to && from <= fault.excuses_until)
    }
}

impl FaultTime {
    pub(super) fn is_victim(&self, node: &str) -> bool {
        self.injected.victims.iter().any(|victim| victim == node)
    }

    /// Whether it excuses that one node shows another as down.
    pub(super) fn excuses_view(&self, observer: &str, subject: &str) -> bool {
        let (o, s) = (self.is_victim(observer), self.is_victim(subject));
        match self.injected.excuse {
            Excuse::Nobody => false,
            Excuse::Victims => o || s,
            Excuse::Across => o != s,
        }
    }

    /// Whether nothing gets from one node to the other.
    pub(super) fn cuts(&self, from: &str, to: &str) -> bool {
        self.injected.cut.iter().any(|(f, t)| f == from && t == to)
    }
}
