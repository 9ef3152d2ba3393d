//! What an edge's rules cost: a key, a rate and a quota, and a thousand routes, beside none.

use anyhow::Result;

use super::Output;
use super::bench::Bench;
use super::edge;
use super::grid::Grid;
use crate::oha::{Oha, Version};
use crate::starling::{self, Rules};
use crate::{measurement, target::Target};

/// The cases; the others are compared with the first.
pub(super) const BARE: &str = "no rules";
pub(super) const LIMITED: &str = "key, rate, quota";
pub(super) const ROUTES: &str = "1,000 routes";

/// Measures the edges in turn, one version of HTTP after the other.
pub(super) fn run(bench: &Bench, output: &mut Output) -> Result<()> {
    let dir = bench.dir()?;
    let cases = [(BARE, Rules::None), (LIMITED, Rules::KeyRateAndQuota), (ROUTES, Rules::ThousandRoutes)];
    let (mut edges, mut keys): (Vec<Target>, Vec<String>) = Default::default();
    for (name, rules) in cases {
        let started =
            starling::start_edge(name, &bench.starling, rules, bench.backend_port, &bench.certificates, dir.path())?;
        edges.push(started.0);
        keys.push(started.1);
    }
    let mut grid = Grid::of_cases("rules of an edge", edges.iter().map(|edge| edge.name.to_owned()).collect());
    for version in Version::ALL {
        // All get the key, so that all read as many bytes.
        let load = bench.oha(|program| Oha::public(program, version, vec![keys[1].clone()]))?;
        let measured = measurement::run_all(&mut edges, &bench.backend, &load, bench.schedule);
        let [cpu, rate] = edge::lines(version);
        grid.push_measured(cpu, &measured, |sample| sample.cpu_us.iter().sum());
        grid.push_measured(rate, &measured, |sample| sample.outcome.requests_per_second);
    }
    output.grid(grid);
    Ok(())
}
