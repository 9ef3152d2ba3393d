//! Calls: what was owed, what came, and what the services' ledgers say.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    Check, FaultRow, Outcome,
    times::{FaultTime, StepTime, Times},
    words::and_more,
};
use crate::{
    history::{Begin, Call, CallKind, Event, History},
    plan::{DoorKind, Expect},
};

/// Fewer calls than that in a fault's time show nothing.
const FEWEST: usize = 20;
/// Samples that a 99th percentile needs to be compared with another.
const FEWEST_FOR_P99: usize = 1000;
/// A load that is later than that with its calls measures itself.
const MOST_BEHIND_MS: f64 = 1000.0;
/// Share of the calls due that must have been made.
const LEAST_MADE: f64 = 0.9;
/// Before this share of an overload's time is over nothing is asked.
const GOODPUT_FROM: f64 = 2.0 / 3.0;

/// What calls came to.
pub(super) struct Tally<'a> {
    times: &'a Times,
    judged: Vec<(&'a Call, Owed)>,
}

/// Whether an answer was owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    Yes,
    /// Its door or every instance was out of reach.
    Excused,
    /// It may break, since it cannot be tried again.
    MayBreak,
}

impl<'a> Tally<'a> {
    /// Says of every call whether it was owed.
    pub(super) fn of(history: &'a History, begin: &Begin, times: &'a Times) -> Self {
        Self { times, judged: history.calls().map(|call| (call, owed(call, begin, times))).collect() }
    }

    /// All that is promised of calls.
    pub(super) fn checks(&self, history: &History, begin: &Begin, checks: &mut Vec<Check>) {
        enough(history, begin, self.times, &self.judged, checks);
        let odd = self.judged.iter().filter(|(call, _)| call.ms < 0.0).count();
        if odd > 0 {
            // When clocks cannot be right, nothing that follows from times can be.
            let detail = format!("{odd} calls ended before they were due");
            checks.push(Check::of("the clients' clocks can be right", Outcome::Unknown, detail));
            return;
        }
        wrong(&self.judged, checks);
        ledgers(history, begin, checks);
        left_open(history, checks);
        self.fair(begin, checks);
        quota(history, begin, checks);
        for step in &self.times.steps {
            let Some(expect) = begin.plan.step(step.step).map(|step| &step.expect) else { continue };
            self.lost(step, expect, checks);
            if expect.others_fast {
                self.others(step, begin, checks);
            }
            if let Some(share) = expect.goodput {
                self.goodput(step, share, checks);
            }
        }
        self.calm(checks);
    }
}

/// Whether all edges together let pass what one would, and said so to the rest.
fn quota(history: &History, begin: &Begin, checks: &mut Vec<Check>) {
    let Some(quota) = begin.plan.load.quota else { return };
    let counted = || history.calls().filter(|call| call.kind == CallKind::Counted);
    let passed = counted().filter(|call| call.status == 200).count() as u64;
    let refused = counted().filter(|call| call.status == 429).count() as u64;
    let name = format!("all edges together let {} calls pass, and {} more at most", quota.calls, quota.over);
    let detail = format!("{passed} passed, {refused} were refused");
    let outcome = match passed {
        _ if passed > quota.calls + quota.over => Outcome::Violated,
        _ if refused == 0 => Outcome::Unknown,
        // Nobody is refused before the quota is used up, but for what lay in leases, and what was on its way, when a fault began.
        _ if passed < quota.calls * 90 / 100 => Outcome::Violated,
        _ => Outcome::Held,
    };
    checks.push(Check::of(&name, outcome, detail));
}

fn owed(call: &Call, begin: &Begin, times: &Times) -> Owed {
    let around: Vec<&FaultTime> = times.around(call.due, call.over()).collect();
    if around.is_empty() {
        return Owed::Yes;
    }
    let disabled = around.iter().any(|fault| fault.injected.disables && fault.is_victim(&call.node));
    if disabled || times.is_away(&call.node, call.due, call.over()) {
        return Owed::Excused;
    }
    // A service's own bad answer is passed on.
    let odd = |node: &String| around.iter().any(|fault| fault.injected.mute_services.contains(node));
    if !call.by.is_empty() && odd(&call.by) {
        return Owed::Excused;
    }
    let instances = begin.serving.iter().filter(|(_, service)| *service == call.service).map(|(node, _)| node);
    let reachable = instances.clone().any(|node| {
        around.iter().all(|fault| {
            let stopped = fault.injected.disables && fault.is_victim(node);
            let odd = fault.injected.mute_services.contains(node);
            !stopped && !odd && (*node == call.node || !fault.cuts(&call.node, node) && !fault.cuts(node, &call.node))
        })
    });
    let overload = around.iter().any(|fault| fault.injected.overload);
    if !reachable || overload {
        return Owed::Excused;
    }
    // Who is asked to end finishes what he has begun: nothing may break with him.
    let touched = around
        .iter()
        .filter(|fault| !fault.injected.graceful)
        .any(|fault| fault.is_victim(&call.node) || instances.clone().any(|node| fault.is_victim(node)));
    // Once its head is there, a download cannot be tried again either.
    match touched && call.kind != CallKind::Get {
        true => Owed::MayBreak,
        false => Owed::Yes,
    }
}

fn enough(history: &History, begin: &Begin, times: &Times, judged: &[(&Call, Owed)], checks: &mut Vec<Check>) {
    let behind = history.entries.iter().filter_map(|entry| match entry.event {
        Event::Behind { ms } => Some(ms),
        _ => None,
    });
    let behind = behind.fold(0.0, f64::max);
    let outcome = if behind <= MOST_BEHIND_MS { Outcome::Held } else { Outcome::Unknown };
    checks.push(Check::of("the load kept its schedule", outcome, format!("at most {behind:.0} ms behind")));

    let until = times.steps.last().map_or(times.baseline, |step| step.end);
    let due = (until - times.baseline) * f64::from(begin.plan.load.rate);
    let made = judged.iter().filter(|(call, _)| call.due >= times.baseline && call.due <= until).count();
    let outcome = if (made as f64) < due * LEAST_MADE { Outcome::Unknown } else { Outcome::Held };
    checks.push(Check::of("all calls that were due were made", outcome, format!("{made} of {due:.0}")));
    for step in &times.steps {
        let during = judged.iter().filter(|(call, _)| call.due >= step.fault && call.due < step.healing).count();
        let outcome = if during >= FEWEST { Outcome::Held } else { Outcome::Unknown };
        let mut enough = Check::of("enough calls were due while the fault was on", outcome, format!("{during}"));
        enough.step = Some(step.step);
        checks.push(enough);
    }
}

fn wrong(judged: &[(&Call, Owed)], checks: &mut Vec<Check>) {
    let wrong: Vec<&Call> = judged.iter().filter(|(call, _)| call.wrong).map(|(call, _)| *call).collect();
    let mut right = Check::of("every answer that came whole was right", Outcome::Held, "");
    if let Some(first) = wrong.first() {
        right.outcome = Outcome::Violated;
        right.detail = format!("{}{}", told(first), and_more(wrong.len()));
        right.at = Some(first.over());
    }
    checks.push(right);
}

/// How often each call was done.
fn times_done(history: &History) -> HashMap<u64, usize> {
    let mut done: HashMap<u64, usize> = HashMap::new();
    for entry in &history.entries {
        if let Event::Done { nonce, .. } = entry.event {
            *done.entry(nonce).or_default() += 1;
        }
    }
    done
}

/// Calls that were done twice and must not be, and how often.
pub(super) fn twice(history: &History) -> Vec<(&Call, usize)> {
    let done = times_done(history);
    let once = history.calls().filter(|call| !call.kind.is_idempotent());
    once.filter_map(|call| done.get(&call.nonce).filter(|times| **times > 1).map(|times| (call, *times))).collect()
}

/// For each call: acknowledged at most if done, done at most once where once is all that is allowed.
fn ledgers(history: &History, begin: &Begin, checks: &mut Vec<Check>) {
    let read: BTreeSet<&str> = history
        .entries
        .iter()
        .filter_map(|entry| match &entry.event {
            Event::Ledger { of, .. } => Some(of.as_str()),
            _ => None,
        })
        .collect();
    let wanted = begin.serving.iter().map(|(node, service)| format!("{service} of {node}"));
    let missing: Vec<String> = wanted.filter(|of| !read.contains(of.as_str())).collect();
    let outcome = if missing.is_empty() { Outcome::Held } else { Outcome::Unknown };
    checks.push(Check::of("every service's ledger is whole", outcome, missing.join(", ")));

    let twice = twice(history);
    let mut once = Check::of("no call that must not be was done twice", Outcome::Held, "");
    if let Some((first, times)) = twice.first() {
        once.outcome = Outcome::Violated;
        once.detail = format!("{}, done {times} times{}", told(first), and_more(twice.len()));
        once.at = Some(first.over());
    }
    checks.push(once);

    let done = times_done(history);
    let never: Vec<&Call> =
        history.calls().filter(|call| call.good() && call.status != 429 && !done.contains_key(&call.nonce)).collect();
    let mut acknowledged = Check::of("every call that was acknowledged was done", Outcome::Held, "");
    if let Some(first) = never.first() {
        acknowledged.outcome = if missing.is_empty() { Outcome::Violated } else { Outcome::Unknown };
        acknowledged.detail = format!("{}{}", told(first), and_more(never.len()));
        acknowledged.at = Some(first.over());
    }
    checks.push(acknowledged);
}

/// A service must learn that its caller has gone: what nobody waits for any more is not worked on.
fn left_open(history: &History, checks: &mut Vec<Check>) {
    let open = history.entries.iter().filter_map(|entry| match &entry.event {
        Event::Open { of, calls } if !calls.is_empty() => Some((of, calls, entry.at)),
        _ => None,
    });
    let mut none = Check::of("no service works on a call whose client has gone", Outcome::Held, "");
    if let Some((of, calls, at)) = open.max_by_key(|(_, calls, _)| calls.len()) {
        none.outcome = Outcome::Violated;
        none.detail = format!("{} is open at {of}{}", calls[0], and_more(calls.len()));
        none.at = Some(at);
    }
    checks.push(none);
}

impl Tally<'_> {
    /// After the last step everybody serves again: no penalty may outlive its reason.
    fn fair(&self, begin: &Begin, checks: &mut Vec<Check>) {
        let Some(last) = self.times.steps.last().filter(|step| step.whole && step.recovered.is_some()) else { return };
        let gone = |node: &str| self.times.faults.iter().any(|f| f.injected.for_good && f.is_victim(node));
        let calls: Vec<&Call> = self.during(last.calm, last.end).map(|(call, _)| *call).filter(|c| c.good()).collect();
        let mut idle = Vec::new();
        for (node, service) in begin.serving.iter().filter(|(node, _)| !gone(node)) {
            // A node may well find itself where nobody else does.
            let to: Vec<&&Call> = calls.iter().filter(|c| c.service == *service && c.node != *node).collect();
            let instances = begin.serving.iter().filter(|(n, s)| s == service && !gone(n)).count();
            // By chance alone each has a share; that it has none of so many is no chance.
            if to.len() >= FEWEST * instances * 2 && to.iter().all(|call| call.by != *node) {
                idle.push(format!("{node} answers none of {} calls of others to {service}", to.len()));
            }
        }
        let mut fair = Check::of("after the last fault every instance serves again", Outcome::Held, "");
        if let Some(first) = idle.first() {
            fair.outcome = Outcome::Violated;
            fair.detail = format!("{first}{}", and_more(idle.len()));
            fair.at = Some(last.calm);
        }
        checks.push(fair);
    }

    fn during(&self, from: f64, to: f64) -> impl Iterator<Item = &(&Call, Owed)> {
        self.judged.iter().filter(move |(call, _)| call.due >= from && call.due < to)
    }

    /// Idempotent calls that were owed, from a step's fault until it had mended.
    fn lost(&self, step: &StepTime, expect: &Expect, checks: &mut Vec<Check>) {
        let until = step.recovered.unwrap_or(step.calm).max(step.healing);
        let lost: Vec<&Call> = self
            .during(step.fault, until)
            .filter(|(call, owed)| *owed == Owed::Yes && !call.good())
            .map(|(call, _)| *call)
            .collect();
        let name = match expect.lost {
            0 => "no call that could be answered was lost".to_string(),
            most => format!("at most {most} calls that could be answered were lost"),
        };
        let mut none = Check::of(&name, Outcome::Held, format!("{}", lost.len()));
        none.step = Some(step.step);
        if lost.len() > expect.lost {
            none.outcome = Outcome::Violated;
            none.detail = format!("{}{}", told(lost[0]), and_more(lost.len()));
            none.at = Some(lost[0].over());
        }
        checks.push(none);
    }

    /// Outside of faults every call is owed.
    fn calm(&self, checks: &mut Vec<Check>) {
        let failed: Vec<&Call> = self
            .judged
            .iter()
            .filter(|(call, owed)| {
                *owed == Owed::Yes && !call.good() && self.times.around(call.due, call.over()).next().is_none()
            })
            .map(|(call, _)| *call)
            .collect();
        let mut none = Check::of("no call failed while nothing was wrong", Outcome::Held, "");
        if let Some(first) = failed.first() {
            none.outcome = Outcome::Violated;
            none.detail = format!("{}{}", told(first), and_more(failed.len()));
            none.at = Some(first.over());
        }
        checks.push(none);
    }

    /// Calls that have nothing to do with the victims must be as fast as before.
    fn others(&self, step: &StepTime, begin: &Begin, checks: &mut Vec<Check>) {
        let victims: BTreeSet<&str> = self
            .times
            .faults
            .iter()
            .filter(|fault| fault.injected.step == step.step)
            .flat_map(|fault| fault.injected.victims.iter().map(String::as_str))
            .collect();
        let hit: BTreeSet<&str> = begin
            .serving
            .iter()
            .filter(|(node, _)| victims.contains(node.as_str()))
            .map(|(_, service)| service.as_str())
            .collect();
        let of = |from: f64, to: f64| {
            let calls = self.during(from, to).filter(|(call, _)| {
                call.kind == CallKind::Get
                    && !victims.contains(call.node.as_str())
                    && !hit.contains(call.service.as_str())
            });
            calls.map(|(call, _)| call.ms).collect::<Vec<f64>>()
        };
        let before = of(step.fault - (step.healing - step.fault).max(10.0), step.fault);
        let during = of(step.fault, step.healing);
        let mut fast = Check::of("calls that have nothing to do with it stay fast", Outcome::Unknown, "");
        fast.step = Some(step.step);
        if before.len() < FEWEST_FOR_P99 || during.len() < FEWEST_FOR_P99 {
            fast.detail =
                format!("{} calls before and {} during; {FEWEST_FOR_P99} are needed", before.len(), during.len());
        } else {
            let (b, d) = (percentile(before, 0.99), percentile(during, 0.99));
            fast.outcome = if d <= (b * 1.5).max(b + 5.0) { Outcome::Held } else { Outcome::Violated };
            fast.detail = format!("p99 {d:.1} ms, {b:.1} ms before");
            fast.at = (fast.outcome == Outcome::Violated).then_some(step.fault);
        }
        checks.push(fast);
    }

    fn goodput(&self, step: &StepTime, share: f64, checks: &mut Vec<Check>) {
        let from = step.fault + (step.healing - step.fault) * GOODPUT_FROM;
        let calls: Vec<_> = self.during(from, step.healing).collect();
        let good = calls.iter().filter(|(call, _)| call.good()).count();
        let got = good as f64 / calls.len().max(1) as f64;
        let outcome = match got >= share {
            _ if calls.len() < FEWEST => Outcome::Unknown,
            true => Outcome::Held,
            false => Outcome::Violated,
        };
        let name = format!("at least {:.0} % of the calls are answered in the end", share * 100.0);
        let mut goodput = Check::of(&name, outcome, format!("{:.1} % of {}", got * 100.0, calls.len()));
        goodput.step = Some(step.step);
        goodput.at = (outcome == Outcome::Violated).then_some(from);
        checks.push(goodput);
    }

    /// A fault's row.
    pub(super) fn fill(&self, row: &mut FaultRow) {
        let Some(fault) = self.times.faults.iter().find(|f| f.injected.fault == row.fault) else { return };
        let calls: Vec<_> = self.during(fault.from, fault.ended).collect();
        let owed = calls.iter().filter(|(_, owed)| *owed == Owed::Yes);
        row.owed = owed.clone().count();
        row.answered = owed.clone().filter(|(call, _)| call.good()).count();
        row.lost = row.owed - row.answered;
        row.excused = calls.iter().filter(|(_, owed)| *owed == Owed::Excused).count();
        // Of small calls: a download takes what it takes.
        let small = owed.filter(|(call, _)| call.good() && matches!(call.kind, CallKind::Get | CallKind::Post));
        let ms: Vec<f64> = small.map(|(call, _)| call.ms).collect();
        row.p99_ms = (!ms.is_empty()).then(|| percentile(ms, 0.99));
    }
}

/// A call in words.
fn told(call: &Call) -> String {
    let what = call.error.as_deref().unwrap_or("answered");
    format!("{:?} {} at {} of {} to {}: {what}", call.kind, call.nonce, call.door, call.node, call.service)
        .to_lowercase()
}

fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = ((values.len() as f64 * share).ceil() as usize).clamp(1, values.len().max(1)) - 1;
    values.get(at).copied().unwrap_or(0.0)
}

/// What one door's calls that were due in a second came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Second {
    /// Which second of the run.
    pub(crate) at: f64,
    pub(crate) good: usize,
    pub(crate) bad: usize,
    /// Milliseconds, of the small ones that were answered.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// All doors, second by second.
pub(crate) fn by_second(history: &History) -> BTreeMap<DoorKind, Vec<Second>> {
    let mut doors: BTreeMap<DoorKind, BTreeMap<u64, Vec<&Call>>> = BTreeMap::new();
    for call in history.calls() {
        doors.entry(call.door).or_default().entry(call.due.max(0.0) as u64).or_default().push(call);
    }
    let rows = doors.into_iter().map(|(door, seconds)| {
        let rows = seconds.into_iter().map(|(second, calls)| {
            let good: Vec<&&Call> = calls.iter().filter(|call| call.good()).collect();
            let small = good.iter().filter(|call| matches!(call.kind, CallKind::Get | CallKind::Post));
            let ms: Vec<f64> = small.map(|call| call.ms).collect();
            let (good, bad) = (good.len(), calls.len() - good.len());
            Second { at: second as f64, good, bad, p50: percentile(ms.clone(), 0.5), p99: percentile(ms, 0.99) }
        });
        (door, rows.collect())
    });
    rows.collect()
}
