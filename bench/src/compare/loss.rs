//! The pairs again, with packets lost on the hop between the two.

use anyhow::Result;

use super::Output;
use super::bench::Bench;
use super::drop_rule::DropRule;
use super::east_west;
use super::grid::Grid;
use crate::measurement::{self, Measured};
use crate::oha::Oha;

/// Calls a second.
const RATE: u32 = 500;

pub(super) const P99: [(u32, &str); 2] = [(1, "500/s, 1 % lost: p99 ms"), (5, "500/s, 5 % lost: p99 ms")];

/// Measures all pairs in turn at a fixed rate, with nothing else lost than what the rule drops.
pub(super) fn run(bench: &Bench, output: &mut Output) -> Result<()> {
    if let Some(reason) = &bench.without_namespace {
        output.say(&format!("loss: skipped: {reason}"));
        return Ok(());
    }
    if let Err(error) = DropRule::new(1, &[1]) {
        output.say(&format!("loss: skipped: {error:#}"));
        return Ok(());
    }
    let load = bench.oha(|program| Oha::rate(program, RATE))?;
    let dir = bench.dir()?;
    let mut pairs = east_west::start_pairs(bench, dir.path(), output)?;
    let mut grid = Grid::of_peers("loss", &pairs);
    for (percent, what) in P99 {
        let mut measured = vec![Measured::default(); pairs.len()];
        for round in 1..=bench.schedule.rounds {
            for (index, measured) in measured.iter_mut().enumerate() {
                let rule = DropRule::new(percent, &pairs[index].hop)?;
                measured.add(round, measurement::once(&mut pairs, index, &bench.backend, &load, bench.schedule, round));
                drop(rule);
            }
        }
        grid.push_measured(what, &measured, |sample| sample.outcome.p99_ms);
        grid.push_measured("the same: p50 ms", &measured, |sample| sample.outcome.p50_ms);
        grid.push_measured("the same: answered/s", &measured, |sample| sample.outcome.requests_per_second);
    }
    output.grid(grid);
    Ok(())
}
