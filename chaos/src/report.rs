//! What is written of a run: `results.json` and `junit.xml` for machines, one self-contained page for people.

mod lanes;
mod page;

use std::{fmt::Write as _, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{
    history::{Begin, History},
    judge::{FaultRow, Outcome, Verdict, judge},
};

/// Name of the page in a report's directory.
pub const PAGE: &str = "report.html";
const RESULTS: &str = "results.json";
const JUNIT: &str = "junit.xml";

#[derive(Serialize)]
struct Results<'a> {
    /// `true`, `false` or `"unknown"`.
    valid: serde_json::Value,
    #[serde(flatten)]
    verdict: &'a Verdict,
    run: &'a Begin,
    seconds: f64,
}

/// Writes all of it beside the history.
///
/// # Errors
/// If a file cannot be written.
pub fn write(dir: &Path, history: &History, verdict: &Verdict) -> Result<()> {
    let begin = history.begin()?;
    let valid = match verdict.outcome {
        Outcome::Held => true.into(),
        Outcome::Violated => false.into(),
        Outcome::Unknown => "unknown".into(),
    };
    let results = Results { valid, verdict, run: begin, seconds: history.length().as_secs_f64() };
    let put = |name: &str, text: String| {
        std::fs::write(dir.join(name), text).with_context(|| format!("cannot write {name} in {}", dir.display()))
    };
    put(RESULTS, serde_json::to_string_pretty(&results)? + "\n")?;
    put(JUNIT, junit(begin, verdict))?;
    put(PAGE, page::page(history, begin, verdict))
}

/// A test case for each check. What cannot be told is an error, what did not hold a failure.
fn junit(begin: &Begin, verdict: &Verdict) -> String {
    let count = |outcome| verdict.checks.iter().filter(|check| check.outcome == outcome).count();
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"{}\">\n",
        escape(&begin.name),
        verdict.checks.len(),
        count(Outcome::Violated),
        count(Outcome::Unknown)
    );
    for check in &verdict.checks {
        let step = step_name(begin, check.step);
        let _ = write!(text, "  <testcase classname=\"{}\" name=\"{}\"", escape(&step), escape(&check.name));
        let detail = escape(&check.detail);
        let _ = match check.outcome {
            Outcome::Held => writeln!(text, "/>"),
            Outcome::Violated => writeln!(text, "><failure message=\"{detail}\"/></testcase>"),
            Outcome::Unknown => writeln!(text, "><error message=\"{detail}\"/></testcase>"),
        };
    }
    text + "</testsuite>\n"
}

/// Name of the step of that number.
fn step_name(begin: &Begin, step: Option<usize>) -> String {
    step.and_then(|step| begin.plan.step(step)).map_or("the whole run".into(), |step| step.name.clone())
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() && c != '\n' => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Two runs, fault by fault and check by check.
///
/// # Errors
/// If one of the histories has no beginning.
pub fn diff(one: &History, other: &History) -> Result<String> {
    let (a, b) = (judge(one)?, judge(other)?);
    let (begin_a, begin_b) = (one.begin()?, other.begin()?);
    let mut text = String::new();
    let about =
        |begin: &Begin| format!("{} on {}, seed {}, {}", begin.name, begin.backend, begin.plan.seed, begin.version);
    let _ = writeln!(text, "one    {}: {}\nother  {}: {}\n", about(begin_a), a.line, about(begin_b), b.line);
    let figures = |row: Option<&FaultRow>| {
        let seconds = |s: Option<f64>| s.map_or("-".into(), |s| format!("{s:.2}"));
        row.map_or("absent".into(), |row| {
            let share = row.answered as f64 / row.owed.max(1) as f64 * 100.0;
            let p99 = row.p99_ms.map_or("-".into(), |ms| format!("{ms:.0} ms"));
            let (seen, healed) = (seconds(row.detected), seconds(row.healed));
            format!("{share:.2} % answered, p99 {p99}, seen {seen} s, healed {healed} s, {} lost", row.lost)
        })
    };
    for number in 0..a.faults.len().max(b.faults.len()) {
        let (x, y) = (a.faults.get(number), b.faults.get(number));
        let name = x.or(y).map_or("", |row| row.text.as_str());
        let _ = writeln!(text, "{name}\n  one    {}\n  other  {}", figures(x), figures(y));
    }
    let turned: Vec<_> = a
        .checks
        .iter()
        .filter_map(|check| {
            let same = b.checks.iter().find(|c| c.name == check.name && c.step == check.step)?;
            (same.outcome != check.outcome).then(|| {
                format!(
                    "{} [{}]: {:?} -> {:?}",
                    check.name,
                    step_name(begin_a, check.step),
                    check.outcome,
                    same.outcome
                )
            })
        })
        .collect();
    let _ = match turned.is_empty() {
        true => writeln!(text, "\nevery check came out the same"),
        false => writeln!(text, "\n{}", turned.join("\n")),
    };
    Ok(text)
}
