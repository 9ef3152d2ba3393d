//! What a history amounts to. Only a history is looked at, so that an old one can be judged again by today's rules.

mod calls;
mod membership;
mod times;
mod words;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub(crate) use self::calls::by_second;
use self::times::Times;
use crate::{
    history::{Event, History, Side},
    plan::Backend,
};

/// How a check, or a whole run, came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It held.
    Held,
    /// It cannot be told.
    Unknown,
    /// It did not hold.
    Violated,
}

/// A promise, and whether it held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What was promised.
    pub name: String,
    /// In which step; `None` for the whole run.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub step: Option<usize>,
    /// Whether it held.
    pub outcome: Outcome,
    /// The figures, or what was against it.
    pub detail: String,
    /// When it was first violated, seconds since the start.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub at: Option<f64>,
}

/// Whether a fault acted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acted {
    /// Both sides show it.
    Acted,
    /// One of them does not.
    Unproven,
}

/// A fault, what shows that it acted, and how it was borne.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FaultRow {
    /// Its number.
    pub fault: usize,
    /// Of which step.
    pub step: usize,
    /// In words.
    pub text: String,
    /// Who was hit.
    pub victims: Vec<String>,
    /// Whether it acted.
    pub acted: Acted,
    /// What each side shows.
    pub signs: Vec<String>,
    /// Seconds until the first node saw a victim as not alive.
    pub detected: Option<f64>,
    /// Seconds until all others did.
    pub known: Option<f64>,
    /// Seconds from its end until all nodes saw all others as they are.
    pub healed: Option<f64>,
    /// Calls that were due meanwhile and owed, and how many of them were answered.
    pub owed: usize,
    /// See `owed`.
    pub answered: usize,
    /// 99th percentile of the small ones of those answers, in milliseconds.
    pub p99_ms: Option<f64>,
    /// Idempotent calls that were owed and failed.
    pub lost: usize,
    /// Calls that nobody owed: their door or every instance was gone.
    pub excused: usize,
    /// Nodes shown as down that gave no cause for it.
    pub false_downs: usize,
}

/// What a run amounts to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// All of it.
    pub outcome: Outcome,
    /// In one line.
    pub line: String,
    /// Every check.
    pub checks: Vec<Check>,
    /// Every fault.
    pub faults: Vec<FaultRow>,
    /// Calls made.
    pub calls: usize,
    /// Calls done twice that must not be.
    pub twice: usize,
}

impl Verdict {
    /// Exit code of a run: 0 all held, 1 something did not, 2 it cannot be told.
    pub fn code(&self) -> u8 {
        match self.outcome {
            Outcome::Held => 0,
            Outcome::Violated => 1,
            Outcome::Unknown => 2,
        }
    }

    /// The checks that did not hold, and those that cannot be told.
    pub fn complaints(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.outcome != Outcome::Held)
    }
}

/// Judges a history.
///
/// # Errors
/// If it has no beginning.
pub fn judge(history: &History) -> Result<Verdict> {
    let begin = history.begin()?;
    let times = Times::of(history);
    let mut checks = Vec::new();
    whole(history, &times, &mut checks);
    let tally = calls::Tally::of(history, begin, &times);
    let watched = membership::checks(history, begin, &times, &mut checks);
    match begin.backend {
        Backend::Sim => simulated(history, &mut checks),
        Backend::Lab | Backend::Relay => {
            tally.checks(history, begin, &mut checks);
            machines(history, begin, &times, &mut checks);
        }
    }
    let faults = times.faults.iter().map(|fault| {
        let id = fault.injected.fault;
        let mut row = FaultRow {
            fault: id,
            step: fault.injected.step,
            text: fault.injected.text.clone(),
            victims: fault.injected.victims.clone(),
            acted: if acted(history, id) { Acted::Acted } else { Acted::Unproven },
            signs: signs(history, id).map(|(side, found, what)| words::sign(side, found, what)).collect(),
            healed: times.healed(fault.injected.step),
            detected: None,
            known: None,
            owed: 0,
            answered: 0,
            p99_ms: None,
            lost: 0,
            excused: 0,
            false_downs: 0,
        };
        watched.fill(&mut row);
        tally.fill(&mut row);
        row
    });
    let faults: Vec<FaultRow> = faults.collect();
    let outcome = checks.iter().map(|check| check.outcome).max().unwrap_or(Outcome::Unknown);
    let calls = history.calls().count();
    let mut verdict =
        Verdict { outcome, line: String::new(), checks, faults, calls, twice: calls::twice(history).len() };
    verdict.line = words::line(&verdict);
    Ok(verdict)
}

fn signs(history: &History, id: usize) -> impl Iterator<Item = (Side, bool, &str)> {
    history.entries.iter().filter_map(move |entry| match &entry.event {
        Event::Sign { fault, side, found, what } if *fault == id => Some((*side, *found, what.as_str())),
        _ => None,
    })
}

fn acted(history: &History, id: usize) -> bool {
    let found: BTreeMap<_, _> = signs(history, id).map(|(side, found, _)| (side as u8, found)).collect();
    found.get(&(Side::Stage as u8)) == Some(&true) && found.get(&(Side::Product as u8)) == Some(&true)
}

impl Check {
    /// One of the whole run.
    fn of(name: &str, outcome: Outcome, detail: impl Into<String>) -> Self {
        Self { name: name.into(), step: None, outcome, detail: detail.into(), at: None }
    }
}

/// What the run itself is worth: whether it came to its end, its faults acted and ended, nothing is missing.
fn whole(history: &History, times: &Times, checks: &mut Vec<Check>) {
    let end = history.entries.iter().rev().find_map(|entry| match &entry.event {
        Event::End { whole, why } => Some((*whole, why.clone())),
        _ => None,
    });
    checks.push(match end {
        Some((true, _)) => Check::of("the plan was done to its end", Outcome::Held, ""),
        Some((false, why)) => Check::of("the plan was done to its end", Outcome::Unknown, why.unwrap_or_default()),
        None => Check::of("the plan was done to its end", Outcome::Unknown, "the history breaks off"),
    });
    if times.faults.is_empty() {
        checks.push(Check::of("something was done", Outcome::Unknown, "no fault was begun"));
    }
    for fault in &times.faults {
        let id = fault.injected.fault;
        let missing: Vec<&str> =
            signs(history, id).filter(|(side, found, _)| !found && *side != Side::Healed).map(|(_, _, w)| w).collect();
        let acted = acted(history, id);
        let outcome = if acted { Outcome::Held } else { Outcome::Unknown };
        let detail = match (acted, missing.is_empty()) {
            (true, _) => String::new(),
            (false, true) => "nobody looked for its signs".into(),
            (false, false) => missing.join("; "),
        };
        let mut acted = Check::of(&format!("the fault acted: {}", fault.injected.text), outcome, detail);
        acted.step = Some(fault.injected.step);
        checks.push(acted);
        let healed = signs(history, id).find(|(side, ..)| *side == Side::Healed);
        if let Some((_, false, what)) = healed {
            let mut ended = Check::of(&format!("the fault ended: {}", fault.injected.text), Outcome::Unknown, what);
            ended.step = Some(fault.injected.step);
            checks.push(ended);
        }
    }
}

/// What a simulation checked at each of its steps.
fn simulated(history: &History, checks: &mut Vec<Check>) {
    let said = history.entries.iter().find_map(|entry| match &entry.event {
        Event::Simulated { digest, events, false_downs, broken } => Some((digest, events, false_downs, broken)),
        _ => None,
    });
    let Some((digest, events, false_downs, broken)) = said else {
        checks.push(Check::of("no invariant was broken", Outcome::Unknown, "the simulation did not say"));
        return;
    };
    checks.push(match broken {
        Some(broken) => Check::of("no invariant was broken", Outcome::Violated, broken),
        None => Check::of("no invariant was broken", Outcome::Held, format!("{events} events, digest {digest}")),
    });
    checks.push(match false_downs.first() {
        Some(first) => {
            let detail = format!("{first}{}", words::and_more(false_downs.len()));
            Check::of("no healthy node is shown as down anywhere", Outcome::Violated, detail)
        }
        None => Check::of("no healthy node is shown as down anywhere", Outcome::Held, ""),
    });
}

/// What the nodes took of the machine, whether they lived, and what a fault's own calls came to.
fn machines(history: &History, begin: &crate::history::Begin, times: &Times, checks: &mut Vec<Check>) {
    let ended = history.entries.iter().filter_map(|entry| match &entry.event {
        Event::Process { name, what, wanted: false } => Some((entry.at, format!("{name} {what}"))),
        _ => None,
    });
    let panics = history.entries.iter().filter_map(|entry| match &entry.event {
        Event::Log { node, line } if line.contains("panicked at") => Some((entry.at, format!("{node}: {line}"))),
        _ => None,
    });
    let mut all: Vec<(f64, String)> = ended.chain(panics).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut lived = Check::of("no process ended or panicked by itself", Outcome::Held, "");
    if let Some((at, what)) = all.first() {
        lived.outcome = Outcome::Violated;
        lived.detail = format!("{what}{}", words::and_more(all.len()));
        lived.at = Some(*at);
    }
    checks.push(lived);

    let limit = begin.plan.steps.iter().map(|step| step.expect.memory_mib).max().unwrap_or(256);
    let most = history.entries.iter().filter_map(|entry| match &entry.event {
        Event::Sample { node, rss_kib, .. } => Some((*rss_kib / 1024, node.as_str(), entry.at)),
        _ => None,
    });
    let most = most.max_by_key(|(mib, ..)| *mib);
    let mut memory =
        Check::of(&format!("no node takes more than {limit} MiB"), Outcome::Unknown, "nothing was measured");
    if let Some((mib, node, at)) = most {
        memory.outcome = if mib <= limit { Outcome::Held } else { Outcome::Violated };
        memory.detail = format!("at most {mib} MiB, {node}");
        memory.at = (mib > limit).then_some(at);
    }
    checks.push(memory);

    for fault in &times.faults {
        let probes = history.entries.iter().filter_map(|entry| match &entry.event {
            Event::Probe { fault: id, what, good } if *id == fault.injected.fault => Some((entry.at, what, *good)),
            _ => None,
        });
        let probes: Vec<_> = probes.collect();
        if probes.is_empty() {
            continue;
        }
        let bad: Vec<_> = probes.iter().filter(|(_, _, good)| !good).collect();
        let mut refused =
            Check::of("what must be refused is refused", Outcome::Held, format!("{} attempts", probes.len()));
        refused.step = Some(fault.injected.step);
        if let Some((at, what, _)) = bad.first() {
            refused.outcome = Outcome::Violated;
            refused.detail = format!("{what}{}", words::and_more(bad.len()));
            refused.at = Some(*at);
        }
        checks.push(refused);
    }
}
