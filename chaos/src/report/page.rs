//! The page: one file, nothing loaded from elsewhere, no script.

use std::fmt::Write as _;

use super::{escape, lanes, lanes::Span, step_name};
use crate::{
    history::{Begin, Call, Event, History},
    judge::{Acted, Check, FaultRow, Outcome, Verdict},
};

/// Calls and log lines that are shown of each kind.
const MOST_ROWS: usize = 20;
/// Around the first violation.
const AROUND: f64 = 2.5;

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Held => "held",
        Outcome::Violated => "violated",
        Outcome::Unknown => "unknown",
    }
}

pub(super) fn page(history: &History, begin: &Begin, verdict: &Verdict) -> String {
    let mut html = String::new();
    let title = format!("{}: {}", begin.name, word(verdict.outcome));
    let _ = write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{}</title><style>{}</style><main>",
        escape(&title),
        include_str!("page.css")
    );
    head(&mut html, history, begin, verdict);
    timeline(&mut html, history, begin);
    violation(&mut html, history, begin, verdict);
    faults(&mut html, verdict);
    checks(&mut html, begin, verdict);
    calls(&mut html, history);
    html + "</main></html>\n"
}

fn head(html: &mut String, history: &History, begin: &Begin, verdict: &Verdict) {
    let seconds = history.length().as_secs_f64();
    let _ = write!(
        html,
        "<h1>Chaos: {}</h1><p>{}</p><div class=\"verdict {}\">{}</div><p class=\"dim\">{} nodes on <b>{}</b>, seed {}, {:.0} s, \
         starling {}, {}, {}. The faults and their times replay; what the system's scheduler does in between \
         does not.</p><p>again: <code>{}</code></p>",
        escape(&begin.name),
        escape(&begin.plan.about),
        word(verdict.outcome),
        escape(&verdict.line),
        begin.nodes.len(),
        begin.backend,
        begin.plan.seed,
        seconds,
        escape(&begin.version),
        escape(&begin.host),
        humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + std::time::Duration::from_secs_f64(begin.started)),
        escape(&begin.replay)
    );
    for skipped in &begin.skipped {
        let _ = write!(html, "<p class=\"word unknown\">skipped: {}</p>", escape(skipped));
    }
}

fn seconds(value: Option<f64>) -> String {
    value.map_or("–".into(), |s| format!("{s:.2} s"))
}

/// Victims by name, or how many.
fn who(victims: &[String]) -> String {
    let names = escape(&victims.join(", "));
    match victims.len() {
        many if many > 6 => format!("<span title=\"{names}\">{many} nodes</span>"),
        _ => names,
    }
}

fn faults(html: &mut String, verdict: &Verdict) {
    html.push_str(
        "<h2>Faults, and what shows that they acted</h2><div class=\"scroll\"><table><tr><th>fault<th>victims<th>acted<th \
         class=n>answered<th class=n>p99<th class=n>seen<th class=n>by all<th class=n>healed<th class=n>lost<th \
         class=n>excused<th class=n>false downs",
    );
    for FaultRow {
        text,
        victims,
        acted,
        signs,
        detected,
        known,
        healed,
        owed,
        answered,
        p99_ms,
        lost,
        excused,
        false_downs,
        ..
    } in &verdict.faults
    {
        let (acted, class) = match acted {
            Acted::Acted => ("acted", "held"),
            Acted::Unproven => ("unproven", "unknown"),
        };
        let share = match owed {
            0 => "–".into(),
            owed => format!("{:.2} %", *answered as f64 / *owed as f64 * 100.0),
        };
        let signs: Vec<String> = signs.iter().map(|sign| escape(sign)).collect();
        let p99 = p99_ms.map_or("–".into(), |ms| format!("{ms:.0} ms"));
        let _ = write!(
            html,
            "<tr><td>{}<br><span class=\"dim\">{}</span><td>{}<td class=\"word {class}\">{acted}<td class=n>{share}<td \
             class=n>{p99}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{lost}<td class=n>{excused}<td \
             class=n>{false_downs}",
            escape(text),
            signs.join("<br>"),
            who(victims),
            seconds(*detected),
            seconds(*known),
            seconds(*healed)
        );
    }
    html.push_str("</table></div>");
}

fn timeline(html: &mut String, history: &History, begin: &Begin) {
    let span = Span { from: 0.0, to: history.length().as_secs_f64() };
    let key = |name: &str, what: &str| format!("<span><i style=\"background:var({name})\"></i>{what}</span>");
    let _ = write!(
        html,
        "<h2>Nodes, as the others show them</h2><p class=\"key\">{}{}{}{}{}{}</p>{}<h2>Calls by door</h2><p \
         class=\"key\">{}{}{}{}</p>{}",
        key("--alive", "alive"),
        key("--suspect", "suspect for some"),
        key("--down", "down for some or all"),
        key("--gone", "left, or not asked"),
        key("--fault", "fault"),
        key("--healing", "healing"),
        lanes::lanes(history, begin, &span),
        key("--good", "answered"),
        key("--bad", "failed"),
        key("--p50", "median"),
        key("--p99", "99th percentile (logarithmic)"),
        lanes::doors(history, &span)
    );
}

/// The first violation, with what happened around it.
fn violation(html: &mut String, history: &History, begin: &Begin, verdict: &Verdict) {
    let violated = verdict.checks.iter().filter(|check| check.outcome == Outcome::Violated);
    let first = violated.filter_map(|check| Some((check.at?, check))).min_by(|a, b| a.0.total_cmp(&b.0));
    let Some((at, check)) = first else { return };
    let span = Span { from: (at - AROUND).max(0.0), to: at + AROUND };
    let _ = write!(
        html,
        "<h2>The first violation, at {at:.1} s</h2><p><b>{}</b>: {}</p>{}",
        escape(&check.name),
        escape(&check.detail),
        lanes::lanes(history, begin, &span)
    );
    let mut lines: Vec<(f64, String)> = Vec::new();
    for entry in &history.entries {
        let line = match &entry.event {
            Event::View { observer, subject, status, .. } => {
                let status = status.map_or("absent".into(), |status| status.to_string());
                (entry.at, format!("{observer} shows {subject} as {status}"))
            }
            Event::Process { name, what, .. } => (entry.at, format!("{name} {what}")),
            Event::Call(call) if !call.good() => {
                (call.over(), format!("call {} at {} fails: {}", call.nonce, call.node, error(call)))
            }
            Event::Log { node, line } => (log_time(line, begin).unwrap_or(entry.at), format!("{node} logs {line}")),
            _ => continue,
        };
        if line.0 >= span.from && line.0 <= span.to {
            lines.push(line);
        }
    }
    lines.sort_by(|a, b| a.0.total_cmp(&b.0));
    let lines: Vec<String> =
        lines.iter().take(MOST_ROWS * 4).map(|(at, line)| format!("{at:8.2}  {}", escape(line))).collect();
    let _ = write!(html, "<pre>{}</pre>", lines.join("\n"));
}

/// When a log line was written, seconds since the run's start.
fn log_time(line: &str, begin: &Begin) -> Option<f64> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let at = line.get("timestamp")?.as_str()?.parse::<humantime::Timestamp>().ok()?;
    let unix = at.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs_f64();
    Some(unix - begin.started)
}

fn checks(html: &mut String, begin: &Begin, verdict: &Verdict) {
    html.push_str("<h2>Checks</h2><div class=\"scroll\"><table><tr><th>check<th>where<th>outcome<th>figures");
    for Check { name, step, outcome, detail, .. } in &verdict.checks {
        let word = word(*outcome);
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td class=\"word {word}\">{word}<td>{}",
            escape(name),
            escape(&step_name(begin, *step)),
            escape(detail)
        );
    }
    html.push_str("</table></div>");
}

fn error(call: &Call) -> &str {
    call.error.as_deref().unwrap_or("–")
}

fn calls(html: &mut String, history: &History) {
    let mut slow: Vec<&Call> = history.calls().filter(|call| call.good()).collect();
    slow.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let failed: Vec<&Call> = history.calls().filter(|call| !call.good()).collect();
    for (title, rows) in [("Slowest answers", slow), ("Calls that failed", failed)] {
        let _ = write!(
            html,
            "<h2>{title}</h2><div class=\"scroll\"><table><tr><th class=n>due<th class=n>took<th>call<th>door<th>to<th>answered \
             by<th>error",
        );
        for call in rows.iter().take(MOST_ROWS) {
            let _ = write!(
                html,
                "<tr><td class=n>{:.2} s<td class=n>{:.1} ms<td>{} {}<td>{} of {}<td>{}<td>{}<td>{}",
                call.due,
                call.ms,
                format!("{:?}", call.kind).to_lowercase(),
                call.nonce,
                call.door,
                escape(&call.node),
                escape(&call.service),
                escape(&call.by),
                escape(error(call))
            );
        }
        let _ = write!(html, "</table></div><p class=\"dim\">{} of {}</p>", rows.len().min(MOST_ROWS), rows.len());
    }
}
