//! What nodes showed of each other: deaths without a cause, flapping, and how long they took to see and to mend.

use std::collections::{BTreeMap, BTreeSet};

use starling_protocol::admin::MemberStatus;

use super::{Check, FaultRow, Outcome, times::Times, words::and_more};
use crate::{
    history::{Begin, Event, History},
    plan::Expect,
};

/// A node shows another as something.
struct View<'a> {
    at: f64,
    observer: &'a str,
    subject: &'a str,
    status: Option<MemberStatus>,
}

/// What was seen, by fault.
pub(super) struct Watched {
    detected: BTreeMap<usize, f64>,
    known: BTreeMap<usize, f64>,
    false_downs: Vec<f64>,
    spans: BTreeMap<usize, (f64, f64)>,
}

pub(super) fn checks(history: &History, begin: &Begin, times: &Times, checks: &mut Vec<Check>) -> Watched {
    let views: Vec<View<'_>> = history
        .entries
        .iter()
        .filter_map(|entry| match &entry.event {
            Event::View { observer, subject, status, .. } => {
                Some(View { at: entry.at, observer, subject, status: *status })
            }
            _ => None,
        })
        .collect();
    let false_downs = false_downs(&views, times, checks);
    let mut watched = Watched {
        detected: BTreeMap::new(),
        known: BTreeMap::new(),
        false_downs,
        spans: times.faults.iter().map(|f| (f.injected.fault, (f.from, f.excuses_until))).collect(),
    };
    watched.times_to_see(&views, begin, times);
    for step in &times.steps {
        let Some(expect) = begin.plan.step(step.step).map(|step| &step.expect) else { continue };
        watched.bounds(step.step, expect, times, checks);
        flapping(&views, step.step, expect, times, checks);
    }
    watched
}

fn is_down(status: Option<MemberStatus>) -> bool {
    status == Some(MemberStatus::Down)
}

/// Nodes shown as down that no fault excuses. When.
fn false_downs(views: &[View<'_>], times: &Times, checks: &mut Vec<Check>) -> Vec<f64> {
    let mut found = Vec::new();
    for view in views.iter().filter(|view| is_down(view.status) && view.at >= times.baseline) {
        let excused = times.around(view.at, view.at).any(|fault| fault.excuses_view(view.observer, view.subject));
        if !excused {
            found.push((view.at, format!("{} shows {} as down", view.observer, view.subject)));
        }
    }
    let mut none = Check::of("nobody is shown as down who gave no cause for it", Outcome::Held, "");
    if let Some((at, what)) = found.first() {
        none.outcome = Outcome::Violated;
        none.detail = format!("{what} at {at:.1} s{}", and_more(found.len()));
        none.at = Some(*at);
    }
    checks.push(none);
    found.into_iter().map(|(at, _)| at).collect()
}

/// How often one saw another go down or come up in a step.
fn flapping(views: &[View<'_>], step: usize, expect: &Expect, times: &Times, checks: &mut Vec<Check>) {
    let Some(time) = times.steps.iter().find(|time| time.step == step) else { return };
    let mut down: BTreeMap<(&str, &str), bool> = BTreeMap::new();
    let mut turns: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for view in views.iter().filter(|view| view.at < time.end) {
        let pair = (view.observer, view.subject);
        let now = is_down(view.status);
        if down.insert(pair, now).unwrap_or(false) != now && view.at >= time.fault {
            *turns.entry(pair).or_default() += 1;
        }
    }
    let most = turns.iter().max_by_key(|(_, turns)| **turns);
    let mut few =
        Check::of(&format!("at most {} turns between up and down", expect.transitions), Outcome::Held, "none");
    few.step = Some(step);
    if let Some(((observer, subject), turns)) = most {
        few.detail = format!("{turns}, {subject} as {observer} shows it");
        if *turns > expect.transitions {
            few.outcome = Outcome::Violated;
            few.at = Some(time.fault);
        }
    }
    checks.push(few);
}

impl Watched {
    fn times_to_see(&mut self, views: &[View<'_>], begin: &Begin, times: &Times) {
        for fault in &times.faults {
            let others: BTreeSet<&str> =
                begin.observers.iter().map(String::as_str).filter(|node| !fault.is_victim(node)).collect();
            let about = views.iter().filter(|view| {
                view.at >= fault.from
                    && view.at <= fault.ended
                    && fault.is_victim(view.subject)
                    && others.contains(view.observer)
            });
            let first = about.clone().find(|view| view.status != Some(MemberStatus::Alive));
            if let Some(first) = first {
                self.detected.insert(fault.injected.fault, first.at - fault.from);
            }
            let mut told: BTreeSet<(&str, &str)> = BTreeSet::new();
            let gone = |status| matches!(status, Some(MemberStatus::Down | MemberStatus::Left) | None);
            for view in about.filter(|view| gone(view.status)) {
                told.insert((view.observer, view.subject));
                if told.len() == others.len() * fault.injected.victims.len() {
                    self.known.insert(fault.injected.fault, view.at - fault.from);
                    break;
                }
            }
        }
    }

    fn bounds(&self, step: usize, expect: &Expect, times: &Times, checks: &mut Vec<Check>) {
        let Some(time) = times.steps.iter().find(|time| time.step == step) else { return };
        let mut bound = |name: String, limit: f64, seen: Option<f64>, from: f64| {
            let mut check = Check::of(&name, Outcome::Held, "");
            check.step = Some(step);
            match seen {
                Some(seen) if seen <= limit => check.detail = format!("{seen:.2} s"),
                Some(seen) => (check.outcome, check.detail) = (Outcome::Violated, format!("{seen:.2} s")),
                None if !time.whole => {
                    (check.outcome, check.detail) = (Outcome::Unknown, "the step was not done".into())
                }
                None => (check.outcome, check.detail) = (Outcome::Violated, "never".into()),
            }
            check.at = (check.outcome == Outcome::Violated).then_some(from + limit);
            checks.push(check);
        };
        let heal = expect.heal.as_secs_f64();
        bound(format!("all is mended within {heal:.0} s"), heal, times.healed(step), time.healing);
        for fault in times.faults.iter().filter(|fault| fault.injected.step == step) {
            let id = fault.injected.fault;
            if let Some(limit) = expect.detect.map(|limit| limit.as_secs_f64()) {
                let name = format!("a node sees it within {limit:.1} s");
                bound(name, limit, self.detected.get(&id).copied(), fault.from);
            }
            if let Some(limit) = expect.known.map(|limit| limit.as_secs_f64()) {
                let name = format!("all nodes see it within {limit:.1} s");
                bound(name, limit, self.known.get(&id).copied(), fault.from);
            }
        }
    }

    /// A fault's row.
    pub(super) fn fill(&self, row: &mut FaultRow) {
        row.detected = self.detected.get(&row.fault).copied();
        row.known = self.known.get(&row.fault).copied();
        let Some((from, to)) = self.spans.get(&row.fault) else { return };
        row.false_downs = self.false_downs.iter().filter(|at| *at >= from && *at <= to).count();
    }
}
