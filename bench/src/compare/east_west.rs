//! Pairs of proxies: plaintext HTTP/1 in, mutual TLS between the two, plaintext HTTP/1 out.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Output;
use super::bench::{self, Bench, LARGE, MIDDLING};
use super::grid::{Cell, Grid};
use crate::load::Load;
use crate::measurement;
use crate::oha::Oha;
use crate::process::Process;
use crate::target::Target;
use crate::{envoy, haproxy, nginx, starling};

/// Connections of the load that is as much as the pair takes.
const CONNECTIONS: u32 = 64;
/// Calls a second at the fixed rate.
const RATE: u32 = 1500;
/// How long a pair that has answered one call is left alone before its memory at rest is read.
const SETTLE: Duration = Duration::from_secs(2);

pub(super) const CPU_SMALL: &str = "128 B: CPU us/request";
pub(super) const RATE_SMALL: &str = "128 B: requests/s";
pub(super) const MEMORY_BOTH: &str = "128 B: RSS MiB, both";
pub(super) const MEMORY_IDLE: &str = "idle: RSS MiB, the larger";
pub(super) const P99_FIXED: &str = "1500/s: p99 ms";
pub(super) const CPU_MIDDLING: &str = "64 KiB: CPU us/request";
pub(super) const MIB_LARGE: &str = "1 MiB: MiB/s";

/// Measures all pairs in turn.
pub(super) fn run(bench: &Bench, output: &mut Output) -> Result<()> {
    let dir = bench.dir()?;
    let mut pairs = start_pairs(bench, dir.path(), output)?;
    std::thread::sleep(SETTLE);
    let idle = pairs.iter().map(|pair| larger_mib(&pair.proxies)).collect::<Result<Vec<_>>>()?;
    let mut grid = Grid::of_peers("east-west", &pairs);
    let mut measure = |load: Load| measurement::run_all(&mut pairs, &bench.backend, &load, bench.schedule);

    let small = measure(bench.wrk(CONNECTIONS, "/")?);
    grid.push_measured(CPU_SMALL, &small, |sample| sample.cpu_us.iter().sum());
    grid.push_measured(RATE_SMALL, &small, |sample| sample.outcome.requests_per_second);
    grid.push_measured(MEMORY_BOTH, &small, |sample| {
        sample.memory.iter().map(|memory| memory.resident_kib as f64 / 1024.0).sum()
    });
    grid.push(MEMORY_IDLE, idle.into_iter().map(|mib| Cell::of(vec![mib])).collect());

    match bench.oha(|program| Oha::rate(program, RATE)) {
        Ok(load) => {
            let fixed = measure(load);
            grid.push_measured("1500/s: p50 ms", &fixed, |sample| sample.outcome.p50_ms);
            grid.push_measured(P99_FIXED, &fixed, |sample| sample.outcome.p99_ms);
        }
        Err(error) => output.say(&format!("the fixed rate is left out: {error:#}")),
    }

    let middling = measure(bench.wrk(CONNECTIONS, format!("/{MIDDLING}"))?);
    grid.push_measured(CPU_MIDDLING, &middling, |sample| sample.cpu_us.iter().sum());
    let large = measure(bench.wrk(CONNECTIONS, format!("/{LARGE}"))?);
    let mib_per_request = LARGE as f64 / f64::from(1 << 20);
    grid.push_measured(MIB_LARGE, &large, |sample| sample.outcome.requests_per_second * mib_per_request);
    output.grid(grid);
    Ok(())
}

/// Every pair that there is, Starling's first.
pub(super) fn start_pairs(bench: &Bench, dir: &Path, output: &Output) -> Result<Vec<Target>> {
    let (backend, certificates) = (bench.backend_port, &bench.certificates);
    let ours = starling::start_pair("Starling", &bench.starling, 1, backend, dir).context("the pair of Starlings")?;
    let envoy = bench.envoy().and_then(|program| envoy::start_pair(&program, backend, certificates, dir));
    let haproxy = bench.haproxy().and_then(|program| haproxy::start(&program, backend, certificates, dir));
    let nginx = nginx::start_pair(backend, certificates, dir);
    Ok(bench::with_peers(ours, [("Envoy", envoy), ("HAProxy", haproxy), ("nginx", nginx)], output))
}

fn larger_mib(proxies: &[Process]) -> Result<f64> {
    let resident = proxies.iter().map(|proxy| Ok(proxy.memory()?.resident_kib)).collect::<Result<Vec<_>>>()?;
    Ok(resident.into_iter().max().unwrap_or_default() as f64 / 1024.0)
}
