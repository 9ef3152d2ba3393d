//! Edges: public TLS with each version of HTTP -> the proxies -> plaintext HTTP/1 to the service.

use anyhow::{Context, Result};

use super::Output;
use super::bench::{self, Bench};
use super::grid::Grid;
use crate::oha::{Oha, Version};
use crate::starling::Rules;
use crate::{caddy, envoy, measurement, starling};

/// CPU over every process on the way, and the rate, of each version.
pub(super) fn lines(version: Version) -> [&'static str; 2] {
    match version {
        Version::H1 => ["h1: CPU us/request", "h1: requests/s"],
        Version::H2 => ["h2: CPU us/request", "h2: requests/s"],
        Version::H3 => ["h3: CPU us/request", "h3: requests/s"],
    }
}

/// Measures all edges in turn, one version of HTTP after the other.
pub(super) fn run(bench: &Bench, output: &mut Output) -> Result<()> {
    let dir = bench.dir()?;
    let (backend, certificates, dir) = (bench.backend_port, &bench.certificates, dir.path());
    let ours = starling::start_edge("Starling", &bench.starling, Rules::KeyAndRate, backend, certificates, dir);
    let (ours, key) = ours.context("Starling's edge")?;
    let caddy = bench.caddy().and_then(|program| caddy::start(&program, backend, certificates, dir));
    let envoy =
        |sidecar| bench.envoy().and_then(|program| envoy::start_edge(&program, sidecar, backend, certificates, dir));
    let peers = [("Caddy", caddy), ("Envoy", envoy(false)), ("Envoy + sidecar", envoy(true))];
    let mut edges = bench::with_peers(ours, peers, output);
    let mut grid = Grid::of_peers("edge", &edges);
    for version in Version::ALL {
        // All get the key, so that all read as many bytes; only Starling looks at it.
        let load = bench.oha(|program| Oha::public(program, version, vec![key.clone()]))?;
        let measured = measurement::run_all(&mut edges, &bench.backend, &load, bench.schedule);
        let [cpu, rate] = lines(version);
        grid.push_measured(cpu, &measured, |sample| sample.cpu_us.iter().sum());
        grid.push_measured(rate, &measured, |sample| sample.outcome.requests_per_second);
        grid.push_measured("the same: RSS MiB, all", &measured, |sample| {
            sample.memory.iter().map(|memory| memory.resident_kib as f64 / 1024.0).sum()
        });
    }
    output.grid(grid);
    Ok(())
}
