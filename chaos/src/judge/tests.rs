//! A history in which all holds, and what each thing that could be wrong with it turns the verdict into.

use starling_protocol::admin::MemberStatus;

use super::*;
use crate::{
    history::{Begin, Call, CallKind, Entry, Injected, Phase},
    plan::{DoorKind, Plan},
};

const PLAN: &str = r#"
about = "For tests."
[mesh]
nodes = 3
services = [{ name = "orders", instances = 2 }]
[load]
rate = 20
calm = "5s"
[[step]]
name = "a death"
hold = "10s"
faults = [{ kill = { victims = "node n3" } }]
expect = { detect = "2s", known = "5s", heal = "3s", goodput = 0.9, transitions = 2 }
"#;

fn call(nonce: u64, due: f64, node: &str, by: &str) -> Call {
    Call {
        nonce,
        kind: if nonce.is_multiple_of(4) { CallKind::Post } else { CallKind::Get },
        door: DoorKind::OutboundHttp1,
        node: node.into(),
        service: "orders".into(),
        due,
        ms: 4.0,
        status: 200,
        by: by.into(),
        error: None,
        wrong: false,
    }
}

/// Baseline until 5 s, n3 dead from 5 s to 15 s, mended at 16 s, calm until 21 s.
fn good() -> History {
    let plan = Plan::parse(PLAN).unwrap();
    let begin = Begin::new("test".into(), &plan, Backend::Lab, String::new());
    let nodes = begin.nodes.clone();
    let fault = &plan.steps[0].faults[0];
    let injected = Injected::new(0, 0, fault, &["n3".to_string()], &nodes);
    let view = |observer: &str, subject: &str, status| Event::View {
        observer: observer.into(),
        subject: subject.into(),
        status: Some(status),
        generation: 1,
    };
    let sign = |side, what: &str| Event::Sign { fault: 0, side, found: true, what: what.into() };
    let mut entries = vec![
        (0.0, Event::Begin(Box::new(begin))),
        (0.0, Event::Phase { step: 0, phase: Phase::Baseline }),
        (5.0, Event::Phase { step: 0, phase: Phase::Fault }),
        (5.0, Event::Inject(Box::new(injected))),
        (6.0, view("n1", "n3", MemberStatus::Suspect)),
        (7.0, view("n1", "n3", MemberStatus::Down)),
        (7.5, view("n2", "n3", MemberStatus::Down)),
        (14.9, sign(Side::Stage, "killed")),
        (14.9, sign(Side::Product, "shown")),
        (15.0, Event::Phase { step: 0, phase: Phase::Healing }),
        (15.0, Event::Heal { fault: 0 }),
        (15.1, sign(Side::Healed, "runs")),
        (15.8, view("n1", "n3", MemberStatus::Alive)),
        (16.0, view("n2", "n3", MemberStatus::Alive)),
        (16.0, Event::Recovered { step: 0, since: 16.0 }),
        (16.0, Event::Phase { step: 0, phase: Phase::Calm }),
        (21.2, Event::Open { of: "orders of n2".into(), calls: Vec::new() }),
        (21.2, Event::Ledger { of: "orders of n2".into(), lines: 1 }),
        (21.2, Event::Ledger { of: "orders of n3".into(), lines: 1 }),
        (21.3, Event::End { whole: true, why: None }),
    ];
    for second in 0..21_u32 {
        let at = f64::from(second);
        entries.push((at + 0.5, Event::Sample { node: "n1".into(), rss_kib: 40 << 10, descriptors: 30 }));
        entries.push((at + 0.9, Event::Behind { ms: 3.0 }));
        for tenth in 0..20 {
            let nonce = u64::from(second * 20 + tenth + 1);
            let due = at + f64::from(tenth) / 20.0;
            let dead = (5.0..16.0).contains(&due);
            let by = if dead || nonce % 2 == 0 { "n2" } else { "n3" };
            let mut made = call(nonce, due, if nonce % 3 == 0 { "n2" } else { "n1" }, by);
            if nonce == 150 {
                // Nobody owes an answer at the door of a dead node.
                (made.node, made.status, made.error) = ("n3".into(), 0, Some("connection refused".into()));
            } else {
                entries.push((due + 0.003, Event::Done { nonce, by: by.into() }));
            }
            entries.push((due + 0.004, Event::Call(made)));
        }
    }
    entries.sort_by(|a, b| a.0.total_cmp(&b.0));
    History { entries: entries.into_iter().map(|(at, event)| Entry { at, event }).collect() }
}

#[test]
fn a_good_history_holds_with_its_figures() {
    let verdict = judge(&good()).unwrap();
    assert_eq!(verdict.outcome, Outcome::Held, "{:#?}", verdict.complaints().collect::<Vec<_>>());
    let row = &verdict.faults[0];
    assert_eq!((row.detected, row.known, row.healed), (Some(1.0), Some(2.5), Some(1.0)));
    assert_eq!((row.lost, row.excused, row.false_downs, verdict.twice), (0, 1, 0, 0));
    assert_eq!(row.p99_ms, Some(4.0));
}

/// What becomes of the verdict when the history is changed, and which check says so.
fn turned(change: impl FnOnce(&mut Vec<Entry>)) -> (Outcome, String) {
    let mut history = good();
    change(&mut history.entries);
    let verdict = judge(&history).unwrap();
    let complaints: Vec<String> =
        verdict.complaints().map(|check| format!("{:?} {}: {}", check.outcome, check.name, check.detail)).collect();
    (verdict.outcome, complaints.join("\n"))
}

fn calls(entries: &mut [Entry]) -> impl Iterator<Item = &mut Call> {
    entries.iter_mut().filter_map(|entry| match &mut entry.event {
        Event::Call(call) => Some(call),
        _ => None,
    })
}

fn nth(entries: &mut [Entry], nonce: u64) -> &mut Call {
    calls(entries).find(|call| call.nonce == nonce).unwrap()
}

fn fail(call: &mut Call) {
    (call.status, call.error) = (503, Some("503: no".into()));
}

fn add(entries: &mut Vec<Entry>, at: f64, event: Event) {
    entries.push(Entry { at, event });
    entries.sort_by(|a, b| a.at.total_cmp(&b.at));
}

fn shown(observer: &str, subject: &str, status: MemberStatus) -> Event {
    Event::View { observer: observer.into(), subject: subject.into(), status: Some(status), generation: 1 }
}

type Change = Box<dyn FnOnce(&mut Vec<Entry>)>;

#[test]
fn every_rule_can_be_turned() {
    use Outcome::{Unknown, Violated};
    let rows: Vec<(&str, Outcome, Change)> = vec![
        ("that could be answered was lost", Violated, Box::new(|e| fail(nth(e, 121)))),
        ("failed while nothing was wrong", Violated, Box::new(|e| fail(nth(e, 41)))),
        ("failed while nothing was wrong", Violated, Box::new(|e| fail(nth(e, 404)))),
        ("came whole was right", Violated, Box::new(|e| nth(e, 41).wrong = true)),
        ("done twice", Violated, Box::new(|e| add(e, 3.0, Event::Done { nonce: 40, by: "n2".into() }))),
        (
            "acknowledged was done",
            Violated,
            Box::new(|e| e.retain(|entry| !matches!(entry.event, Event::Done { nonce: 40, .. }))),
        ),
        (
            "ledger is whole",
            Unknown,
            Box::new(|e| e.retain(|entry| !matches!(&entry.event, Event::Ledger { of, .. } if of.ends_with("n3")))),
        ),
        ("shown as down who gave no cause", Violated, Box::new(|e| add(e, 3.0, shown("n1", "n2", MemberStatus::Down)))),
        (
            "shown as down who gave no cause",
            Violated,
            Box::new(|e| add(e, 18.0, shown("n1", "n3", MemberStatus::Down))),
        ),
        (
            "turns between up and down",
            Violated,
            Box::new(|e| {
                add(e, 9.0, shown("n1", "n3", MemberStatus::Alive));
                add(e, 10.0, shown("n1", "n3", MemberStatus::Down));
            }),
        ),
        (
            "a node sees it within",
            Violated,
            Box::new(|e| {
                e.retain(|entry| !(5.0..15.0).contains(&entry.at) || !matches!(entry.event, Event::View { .. }))
            }),
        ),
        (
            "all is mended within",
            Violated,
            Box::new(|e| e.retain(|entry| !matches!(entry.event, Event::Recovered { .. }))),
        ),
        (
            "the fault acted",
            Unknown,
            Box::new(|e| e.retain(|entry| !matches!(entry.event, Event::Sign { side: Side::Product, .. }))),
        ),
        (
            "the fault ended",
            Unknown,
            Box::new(|e| {
                for entry in e {
                    if let Event::Sign { side: Side::Healed, found, .. } = &mut entry.event {
                        *found = false;
                    }
                }
            }),
        ),
        (
            "enough calls were due",
            Unknown,
            Box::new(|e| e.retain(|x| !matches!(&x.event, Event::Call(c) if (5.5..15.0).contains(&c.due)))),
        ),
        (
            "all calls that were due were made",
            Unknown,
            Box::new(|e| e.retain(|entry| !matches!(&entry.event, Event::Call(call) if call.nonce % 4 == 1))),
        ),
        ("clocks can be right", Unknown, Box::new(|e| nth(e, 41).ms = -2000.0)),
        ("kept its schedule", Unknown, Box::new(|e| add(e, 9.0, Event::Behind { ms: 2500.0 }))),
        (
            "no node takes more than",
            Violated,
            Box::new(|e| add(e, 9.0, Event::Sample { node: "n1".into(), rss_kib: 999 << 10, descriptors: 9 })),
        ),
        (
            "ended or panicked",
            Violated,
            Box::new(|e| {
                add(e, 9.0, Event::Process { name: "n1".into(), what: "ended by itself".into(), wanted: false });
            }),
        ),
        (
            "ended or panicked",
            Violated,
            Box::new(|e| add(e, 9.0, Event::Log { node: "n1".into(), line: "thread panicked at x".into() })),
        ),
        (
            "must be refused is refused",
            Violated,
            Box::new(|e| add(e, 9.0, Event::Probe { fault: 0, what: "a stranger is let in".into(), good: false })),
        ),
        (
            "whose client has gone",
            Violated,
            Box::new(|e| add(e, 21.2, Event::Open { of: "orders of n3".into(), calls: vec!["GET /call/7".into()] })),
        ),
        (
            "every instance serves again",
            Violated,
            Box::new(|e| calls(e).filter(|call| call.due >= 16.0).for_each(|call| call.by = "n2".into())),
        ),
        (
            "are answered in the end",
            Violated,
            Box::new(|e| {
                calls(e).filter(|c| (12.0..15.0).contains(&c.due) && c.nonce % 3 == 0).for_each(fail);
            }),
        ),
        (
            "done to its end",
            Unknown,
            Box::new(|e| {
                for entry in e {
                    if let Event::End { whole, .. } = &mut entry.event {
                        *whole = false;
                    }
                }
            }),
        ),
        ("done to its end", Unknown, Box::new(|e| drop(e.pop()))),
    ];
    for (name, expected, change) in rows {
        let (outcome, said) = turned(change);
        assert_eq!(outcome, expected, "{name}: {said}");
        assert!(said.contains(name), "{name}: {said}");
    }
}

#[test]
fn what_is_owed_depends_on_who_is_hit() {
    // A POST that the victim was about to answer may break; one that has nothing to do with it may not.
    let (outcome, said) = turned(|e| fail(nth(e, 120)));
    assert_eq!(outcome, Outcome::Held, "{said}");
    // A call at a door that is cut off from every instance.
    let (outcome, said) = turned(|e| {
        for entry in e.iter_mut() {
            if let Event::Inject(fault) = &mut entry.event {
                fault.cut = vec![("n1".into(), "n2".into())];
            }
        }
        let call = nth(e, 121);
        assert_eq!(call.node, "n1");
        fail(call);
    });
    assert_eq!(outcome, Outcome::Held, "{said}");
}

#[test]
fn a_run_that_was_stopped_is_unknown_not_violated() {
    let (outcome, said) = turned(|e| {
        e.retain(|entry| entry.at < 14.0);
        let why = Some("stopped".into());
        for of in ["orders of n2", "orders of n3"] {
            add(e, 14.0, Event::Ledger { of: of.into(), lines: 1 });
        }
        add(e, 14.0, Event::End { whole: false, why });
    });
    assert_eq!(outcome, Outcome::Unknown, "{said}");
}

#[test]
fn a_history_survives_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let history = good();
    history.write(dir.path()).unwrap();
    let read = History::read(dir.path()).unwrap();
    assert_eq!(judge(&read).unwrap(), judge(&history).unwrap());
    std::fs::write(dir.path().join(crate::history::FILE), "{\"at\":0,\"event\":\"nothing\"}\n").unwrap();
    let error = format!("{:#}", History::read(dir.path()).unwrap_err());
    assert!(error.contains(":1: not an event"), "{error}");
}
