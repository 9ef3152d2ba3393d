//! How the cost of a call grows with peers, connections and workers; Starling alone.

use std::time::Duration;

use anyhow::Result;

use super::Output;
use super::bench::Bench;
use super::grid::{Cell, Grid};
use crate::measurement::{self, Measured, Sample};
use crate::process::{self, Process};
use crate::starling::{self, Shape};
use crate::target::Target;

const PEERS: [usize; 3] = [2, 10, 50];
const CONNECTIONS: [u32; 3] = [1, 64, 1000];
const WORKERS: [u32; 2] = [1, 2];
/// Connections where their number is not what is looked at.
const USUAL_CONNECTIONS: u32 = 64;
/// How long a mesh whose last node has just joined is left alone before its rest is measured.
const SETTLE: Duration = Duration::from_secs(3);

/// Measures one kind of growth after the other, each case in turn.
pub(super) fn run(bench: &Bench, output: &mut Output) -> Result<()> {
    output.grid(connections(bench)?);
    output.grid(workers(bench)?);
    output.grid(peers(bench)?);
    Ok(())
}

fn connections(bench: &Bench) -> Result<Grid> {
    let dir = bench.dir()?;
    let mut pair = [starling::start_pair("Starling", &bench.starling, 1, bench.backend_port, dir.path())?];
    let mut measured = CONNECTIONS.map(|_| Measured::default());
    for round in 1..=bench.schedule.rounds {
        for (connections, measured) in CONNECTIONS.into_iter().zip(&mut measured) {
            let load = bench.wrk(connections, "/")?;
            measured.add(round, measurement::once(&mut pair, 0, &bench.backend, &load, bench.schedule, round));
        }
    }
    let mut grid = Grid::of_cases("growth: connections", CONNECTIONS.map(|count| count.to_string()).into());
    push_lines(&mut grid, &measured);
    Ok(grid)
}

fn workers(bench: &Bench) -> Result<Grid> {
    let dirs = [bench.dir()?, bench.dir()?];
    let start = |(workers, dir): (u32, &tempfile::TempDir)| {
        starling::start_pair("Starling", &bench.starling, workers, bench.backend_port, dir.path())
    };
    let mut pairs = WORKERS.into_iter().zip(&dirs).map(start).collect::<Result<Vec<Target>>>()?;
    let load = bench.wrk(USUAL_CONNECTIONS, "/")?;
    let measured = measurement::run_all(&mut pairs, &bench.backend, &load, bench.schedule);
    let mut grid = Grid::of_cases("growth: workers of each node", WORKERS.map(|count| count.to_string()).into());
    push_lines(&mut grid, &measured);
    Ok(grid)
}

/// Each mesh is alone on the machine: fifty idle nodes are not nothing.
fn peers(bench: &Bench) -> Result<Grid> {
    let load = bench.wrk(USUAL_CONNECTIONS, "/")?;
    let mut measured = PEERS.map(|_| Measured::default());
    let mut rest = PEERS.map(|_| Vec::new());
    for round in 1..=bench.schedule.rounds {
        for (index, peers) in PEERS.into_iter().enumerate() {
            let dir = bench.dir()?;
            let shape = Shape { workers: 1, peers };
            let mesh = starling::start_mesh("Starling", &bench.starling, shape, bench.backend_port, dir.path());
            let result = mesh.and_then(|mut mesh| {
                std::thread::sleep(SETTLE);
                eprintln!("{peers} peers");
                let at_rest = us_per_second_at_rest(&mesh.proxies, bench.schedule.seconds)?;
                let mesh = std::slice::from_mut(&mut mesh);
                let sample = measurement::once(mesh, 0, &bench.backend, &load, bench.schedule, round)?;
                rest[index].push(at_rest / sample.outcome.requests_per_second);
                Ok(sample)
            });
            measured[index].add(round, result);
        }
    }
    let mut grid = Grid::of_cases("growth: peers that serve", PEERS.map(|count| count.to_string()).into());
    push_lines(&mut grid, &measured);
    grid.push("of all nodes, what they use at rest", rest.map(Cell::of).into());
    Ok(grid)
}

fn push_lines(grid: &mut Grid, measured: &[Measured]) {
    grid.push_measured("CPU us/request, all nodes", measured, |sample| sample.cpu_us.iter().sum());
    grid.push_measured("CPU us/request, the caller's node", measured, |sample: &Sample| sample.cpu_us[0]);
    grid.push_measured("requests/s", measured, |sample| sample.outcome.requests_per_second);
    grid.push_measured("p99 ms", measured, |sample| sample.outcome.p99_ms);
    grid.push_measured("RSS MiB, the caller's node", measured, |sample| sample.memory[0].resident_kib as f64 / 1024.0);
}

fn us_per_second_at_rest(processes: &[Process], seconds: u32) -> Result<f64> {
    let ticks = || processes.iter().map(Process::cpu_ticks).sum::<Result<u64>>();
    let before = ticks()?;
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let used = (ticks()? - before) as f64;
    Ok(used / process::ticks_per_second()? * 1e6 / f64::from(seconds))
}
