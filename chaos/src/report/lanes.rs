//! Drawings of a run over time: a lane for each node as the others show it, faults and mending as bands, calls by door.

use std::{collections::BTreeMap, fmt::Write as _};

use starling_protocol::admin::MemberStatus;

use super::escape;
use crate::{
    history::{Begin, Event, History, Phase},
    judge::by_second,
};

const WIDTH: f64 = 1140.0;
const LEFT: f64 = 92.0;
const RIGHT: f64 = 14.0;
const AXIS: f64 = 22.0;
const CHART: f64 = 74.0;

/// A part of a run, drawn on the page's width.
pub(super) struct Span {
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Span {
    fn x(&self, at: f64) -> f64 {
        let share = (at.clamp(self.from, self.to) - self.from) / (self.to - self.from).max(0.001);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }

    fn is_in(&self, from: f64, to: f64) -> bool {
        to >= self.from && from <= self.to
    }

    /// Round moments, a dozen at most.
    fn marks(&self) -> Vec<f64> {
        let long = self.to - self.from;
        let steps = [0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
        let step = steps.into_iter().find(|step| long / step <= 12.0).unwrap_or(7200.0);
        let mut at = (self.from / step).ceil() * step;
        let mut marks = Vec::new();
        while at <= self.to {
            marks.push(at);
            at += step;
        }
        marks
    }
}

/// Bands of faults and of mending: from, to, class, words.
fn bands(history: &History) -> Vec<(f64, f64, &'static str, String)> {
    let mut bands = Vec::new();
    let mut open: BTreeMap<usize, (f64, String)> = BTreeMap::new();
    let (mut healing, mut last) = (None, 0.0);
    for entry in &history.entries {
        last = entry.at;
        match &entry.event {
            Event::Inject(fault) => {
                let words = format!("{} {}", fault.text, fault.victims.join(" "));
                open.insert(fault.fault, (entry.at, words));
            }
            Event::Heal { fault } => {
                if let Some((from, words)) = open.remove(fault) {
                    bands.push((from, entry.at, "--fault", words));
                }
            }
            Event::Phase { phase: Phase::Healing, .. } => healing = Some(entry.at),
            Event::Phase { phase: Phase::Calm, .. } => {
                if let Some(from) = healing.take() {
                    bands.push((from, entry.at, "--healing", "healing".into()));
                }
            }
            _ => {}
        }
    }
    bands.extend(open.into_values().map(|(from, words)| (from, last, "--fault", words)));
    bands
}

fn draw_bands(svg: &mut String, history: &History, span: &Span, height: f64) {
    for (from, to, class, words) in bands(history) {
        if span.is_in(from, to) {
            let (x, width) = (span.x(from), (span.x(to) - span.x(from)).max(1.0));
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"0\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"var({class})\"><title>{} ({from:.1} \
                 to {to:.1} s)</title></rect>",
                escape(&words)
            );
        }
    }
}

fn draw_axis(svg: &mut String, span: &Span, top: f64) {
    for at in span.marks() {
        let x = span.x(at);
        let label = if at.fract() == 0.0 { format!("{at:.0} s") } else { format!("{at:.1} s") };
        let _ = write!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{top:.1}\" stroke=\"var(--line)\"/><text x=\"{x:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{label}</text>",
            top + 15.0
        );
    }
}

fn open(height: f64, label: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">", escape(label))
}

/// How the others show a node: by the worst that any of them, and by what all of them, show.
fn colour(views: &BTreeMap<&str, Option<MemberStatus>>) -> (&'static str, f64) {
    let all = views.len().max(1) as f64;
    let share = |want: &[Option<MemberStatus>]| views.values().filter(|s| want.contains(s)).count() as f64 / all;
    let down = share(&[Some(MemberStatus::Down)]);
    let gone = share(&[Some(MemberStatus::Left), None]);
    let suspect = share(&[Some(MemberStatus::Suspect)]);
    let alive = share(&[Some(MemberStatus::Alive)]);
    match () {
        () if views.is_empty() => ("--gone", 0.4),
        () if down > 0.0 => ("--down", 0.35 + 0.65 * down),
        () if suspect > 0.0 => ("--suspect", 0.35 + 0.65 * suspect),
        () if gone > 0.0 => ("--gone", 0.35 + 0.65 * gone),
        () => ("--alive", 0.35 + 0.65 * alive),
    }
}

/// A lane for each node.
pub(super) fn lanes(history: &History, begin: &Begin, span: &Span) -> String {
    let nodes = &begin.nodes;
    let lane = if nodes.len() > 16 { 11.0 } else { 22.0 };
    let height = lane * nodes.len() as f64;
    let mut svg = open(height + AXIS, "Nodes over time, as the others show them");
    draw_axis(&mut svg, span, height);
    for (row, node) in nodes.iter().enumerate() {
        let y = row as f64 * lane;
        let mut views: BTreeMap<&str, Option<MemberStatus>> = BTreeMap::new();
        let mut since = (0.0, colour(&views));
        let mut piece = |from: f64, to: f64, (class, opacity): (&str, f64), say: &str| {
            if span.is_in(from, to) && to > from {
                let (x, width) = (span.x(from), span.x(to) - span.x(from));
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"var({class})\" \
                     opacity=\"{opacity:.2}\"><title>{say}</title></rect>",
                    y + 1.0,
                    lane - 2.0
                );
            }
        };
        let say = |views: &BTreeMap<&str, Option<MemberStatus>>, from: f64| {
            let odd: Vec<String> = views
                .iter()
                .filter(|(_, status)| **status != Some(MemberStatus::Alive))
                .take(6)
                .map(|(who, status)| format!("{who}: {}", status.map_or("absent".into(), |s| s.to_string())))
                .collect();
            let what = if odd.is_empty() { "alive for all".into() } else { odd.join(", ") };
            escape(&format!("{node} from {from:.1} s, {what}"))
        };
        for entry in &history.entries {
            let changed = match &entry.event {
                Event::View { observer, subject, status, .. } if subject == node && observer != node => {
                    views.insert(observer, *status);
                    true
                }
                // Whoever does not answer has no view.
                Event::Admin { node: silent, answers: false } => views.remove(silent.as_str()).is_some(),
                _ => false,
            };
            let now = colour(&views);
            if changed && now != since.1 {
                piece(since.0, entry.at, since.1, &say(&views, since.0));
                since = (entry.at, now);
            }
        }
        piece(since.0, history.length().as_secs_f64(), since.1, &say(&views, since.0));
        if lane > 12.0 || row % 2 == 0 {
            let (x, y) = (LEFT - 8.0, y + lane / 2.0 + 4.0);
            let _ =
                write!(svg, "<text class=\"name\" x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", escape(node));
        }
    }
    draw_bands(&mut svg, history, span, height);
    svg + "</svg>"
}

/// Answers, failures and latency of each door, by the second.
pub(super) fn doors(history: &History, span: &Span) -> String {
    let rows = by_second(history);
    let height = (CHART + 8.0) * rows.len() as f64;
    let mut svg = open(height + AXIS, "Calls over time, by door");
    draw_axis(&mut svg, span, height);
    draw_bands(&mut svg, history, span, height);
    for (row, (door, seconds)) in rows.iter().enumerate() {
        let top = row as f64 * (CHART + 8.0);
        let bottom = top + CHART;
        let most = seconds.iter().map(|s| s.good + s.bad).max().unwrap_or(1).max(1) as f64;
        let slowest = seconds.iter().map(|s| s.p99).fold(10.0, f64::max);
        // Latency spans orders of magnitude: a stall beside answers within a millisecond.
        let y_of = |ms: f64| bottom - (ms.max(0.1) / 0.1).ln() / (slowest / 0.1).ln() * (CHART - 14.0);
        let width = (span.x(span.from + 1.0) - LEFT).max(1.0);
        for second in seconds.iter().filter(|s| span.is_in(s.at, s.at + 1.0)) {
            let x = span.x(second.at);
            let (good, bad) = (second.good as f64 / most * CHART * 0.35, second.bad as f64 / most * CHART * 0.35);
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{good:.1}\" fill=\"var(--good)\" \
                 opacity=\"0.35\"/>",
                bottom - good
            );
            if second.bad > 0 {
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"var(--bad)\"><title>{} \
                     failed of {} at {:.0} s</title></rect>",
                    bottom - good - bad.max(3.0),
                    bad.max(3.0),
                    second.bad,
                    second.good + second.bad,
                    second.at
                );
            }
        }
        for (class, pick) in [("--p50", 0), ("--p99", 1)] {
            let points: Vec<String> = seconds
                .iter()
                .filter(|s| s.good > 0 && span.is_in(s.at, s.at + 1.0))
                .map(|s| format!("{:.1},{:.1}", span.x(s.at + 0.5), y_of(if pick == 0 { s.p50 } else { s.p99 })))
                .collect();
            let points = points.join(" ");
            let _ = write!(
                svg,
                "<polyline points=\"{points}\" fill=\"none\" stroke=\"var({class})\" stroke-width=\"1.4\"/>"
            );
        }
        let _ = write!(
            svg,
            "<text class=\"name\" x=\"{x}\" y=\"{:.1}\" text-anchor=\"end\">{}</text><text x=\"{x}\" y=\"{:.1}\" \
             text-anchor=\"end\">max {most:.0}/s</text><text x=\"{x}\" y=\"{:.1}\" text-anchor=\"end\">{slowest:.0} ms</text><line \
             x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{bottom:.1}\" y2=\"{bottom:.1}\" stroke=\"var(--line)\"/>",
            top + 28.0,
            escape(&door.to_string()),
            top + 44.0,
            top + 58.0,
            WIDTH - RIGHT,
            x = LEFT - 8.0,
        );
    }
    svg + "</svg>"
}
