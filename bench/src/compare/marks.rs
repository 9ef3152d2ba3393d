//! What was aimed at, and whether it was reached.

use serde_json::{Value, json};

use super::grid::{Grid, dash, number};
use super::{east_west, edge, loss, tcp};
use crate::oha::Version;
use crate::table::Table;

const OURS: &str = "Starling";
const ENVOY: &str = "Envoy h2";
const HAPROXY: &str = "HAProxy h2";

/// One thing that was aimed at.
pub(super) struct Mark {
    what: String,
    bound: Bound,
    /// `None` where it was not measured, or not to be trusted.
    measured: Option<f64>,
}

/// On which side of a value the measured one should be; `None` where the value itself was not measured.
enum Bound {
    AtMost(Option<f64>),
    AtLeast(Option<f64>),
}

impl Mark {
    fn met(&self) -> Option<bool> {
        let measured = self.measured?;
        match self.bound {
            Bound::AtMost(bound) => bound.map(|bound| measured <= bound),
            Bound::AtLeast(bound) => bound.map(|bound| measured >= bound),
        }
    }

    fn bound(&self) -> (&'static str, Option<f64>) {
        match self.bound {
            Bound::AtMost(bound) => ("<=", bound),
            Bound::AtLeast(bound) => (">=", bound),
        }
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        let (side, bound) = self.bound();
        json!({"what": self.what, "side": side, "mark": bound, "measured": self.measured, "met": self.met()})
    }
}

/// Compares what was found with what was aimed at.
pub(super) fn judge(grids: &[Grid]) -> Vec<Mark> {
    let median = |what: &str, column: &str| grids.iter().find_map(|grid| grid.median(what, column));
    let ratio = |what: &str, peer: &str| grids.iter().find_map(|grid| grid.ratio(what, peer));
    let lowest = |what: &str| grids.iter().find_map(|grid| grid.lowest_of_peers(what));
    let at_most = |bound: f64| Bound::AtMost(Some(bound));
    let at_least = |bound: f64| Bound::AtLeast(Some(bound));
    let mut marks = Vec::new();
    let mut mark = |what: &str, bound, measured| marks.push(Mark { what: what.to_owned(), bound, measured });
    {
        use east_west::{CPU_MIDDLING, CPU_SMALL, MEMORY_BOTH, MEMORY_IDLE, MIB_LARGE, P99_FIXED, RATE_SMALL};
        mark("128 B: CPU, of HAProxy's", at_most(1.0), ratio(CPU_SMALL, HAPROXY));
        mark("128 B: CPU, of Envoy's", at_most(0.4), ratio(CPU_SMALL, ENVOY));
        mark("128 B: requests/s, of HAProxy's", at_least(1.0), ratio(RATE_SMALL, HAPROXY));
        mark("128 B: requests/s, of Envoy's", at_least(2.0), ratio(RATE_SMALL, ENVOY));
        mark("1500/s: p99 ms, the best peer's", Bound::AtMost(lowest(P99_FIXED)), median(P99_FIXED, OURS));
        mark("64 KiB: CPU, of Envoy's", at_most(1.0), ratio(CPU_MIDDLING, ENVOY));
        mark("1 MiB: MiB/s, of Envoy's", at_least(1.0), ratio(MIB_LARGE, ENVOY));
        mark(MEMORY_BOTH, at_most(60.0), median(MEMORY_BOTH, OURS));
        mark(MEMORY_IDLE, at_most(25.0), median(MEMORY_IDLE, OURS));
    }
    for ((_, what), bound) in loss::P99.into_iter().zip([5.0, 10.0]) {
        mark(what, at_most(bound), median(what, OURS));
    }
    for (version, bound) in Version::ALL.into_iter().zip([85.0, 85.0, 100.0]) {
        let [cpu, _] = edge::lines(version);
        mark(&format!("edge, {cpu}"), at_most(bound), median(cpu, OURS));
    }
    let rate = |version| median(edge::lines(version)[1], OURS);
    let h3_of_h2 = rate(Version::H3).zip(rate(Version::H2)).map(|(h3, h2)| h3 / h2);
    mark("edge, h3: requests/s, of our own h2", at_least(0.6), h3_of_h2);
    let ratios = |what: &str| grids.iter().flat_map(|grid| grid.ratios(what)).collect::<Vec<_>>();
    for [rate, cpu, _] in tcp::BULK.map(|(_, lines)| lines) {
        let least = ratios(rate).into_iter().min_by(f64::total_cmp);
        mark(&format!("TCP, {rate}, of the best peer's"), at_least(1.0), least);
        let most = ratios(cpu).into_iter().max_by(f64::total_cmp);
        mark(&format!("TCP, {cpu}, of the best peer's"), at_most(1.3), most);
    }
    marks
}

/// For people.
pub(super) fn table(marks: &[Mark]) -> String {
    let mut table = Table::new(&["targets", "mark", "measured", ""]);
    for mark in marks {
        let (side, bound) = mark.bound();
        let bound = bound.map_or_else(dash, number);
        let word = match mark.met() {
            Some(true) => "met",
            Some(false) => "missed",
            None => "not measured",
        };
        let measured = mark.measured.map_or_else(dash, number);
        table.push(vec![mark.what.clone(), format!("{side} {bound}"), measured, word.to_owned()]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::super::grid::Cell;
    use super::*;

    #[test]
    fn a_mark_is_met_missed_or_not_measured() {
        let mut grid = Grid::of_cases("t", [OURS, ENVOY, HAPROXY].map(str::to_owned).into());
        grid.push(east_west::CPU_SMALL, [30.0, 100.0, 25.0].map(|us| Cell::of(vec![us])).into());
        grid.push(east_west::P99_FIXED, [3.0, 4.0, 5.0].map(|ms| Cell::of(vec![ms])).into());
        grid.push(east_west::RATE_SMALL, [20.0, 10.0, 30.0].map(|rate| Cell::of(vec![rate])).into());
        let mut tunnels = Grid::of_cases("t", [OURS, "nginx", "HAProxy"].map(str::to_owned).into());
        let [(_, [rate, cpu, _]), _] = tcp::BULK;
        tunnels.push(rate, [15.0, 10.0, 20.0].map(|mib| Cell::of(vec![mib])).into());
        tunnels.push(cpu, [6.0, 5.0, 9.0].map(|ms| Cell::of(vec![ms])).into());
        let marks = judge(&[grid, tunnels]);
        let met = |what: &str| marks.iter().find(|mark| mark.what == what).unwrap().met();
        assert_eq!(met("128 B: CPU, of HAProxy's"), Some(false));
        assert_eq!(met("128 B: CPU, of Envoy's"), Some(true));
        assert_eq!(met("128 B: requests/s, of Envoy's"), Some(true));
        assert_eq!(met("128 B: requests/s, of HAProxy's"), Some(false));
        assert_eq!(met("1500/s: p99 ms, the best peer's"), Some(true));
        assert_eq!(met("1 MiB: MiB/s, of Envoy's"), None);
        assert_eq!(met("TCP, 1 connection: MiB/s, of the best peer's"), Some(false));
        assert_eq!(met("TCP, 1 connection: CPU ms/MiB, of the best peer's"), Some(true));
        assert_eq!(met("TCP, 8 connections: MiB/s, of the best peer's"), None);
        assert!(
            table(&marks)
                .contains("128 B: CPU, of HAProxy's                            <= 1.00      1.20        missed")
        );
    }
}
