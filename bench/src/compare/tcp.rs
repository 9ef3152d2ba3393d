//! Tunnels: plain TCP in, mutual TLS between the two, plain TCP out.

use anyhow::{Context, Result};

use super::Output;
use super::bench::{self, Bench};
use super::grid::Grid;
use crate::load::Load;
use crate::stream::{BLOCK, Server, Stream};
use crate::{haproxy, measurement, nginx, starling};

/// How many connections carry as much as they can, and what the rate, CPU and memory of that are called.
pub(super) const BULK: [(usize, [&str; 3]); 2] = [
    (1, ["1 connection: MiB/s", "1 connection: CPU ms/MiB", "1 connection: RSS MiB, both"]),
    (8, ["8 connections: MiB/s", "8 connections: CPU ms/MiB", "8 connections: RSS MiB, both"]),
];

/// Measures all tunnels in turn.
pub(super) fn run(bench: &Bench, output: &mut Output) -> Result<()> {
    let dir = bench.dir()?;
    let (certificates, dir) = (&bench.certificates, dir.path());
    let server = Server::start().context("start the server")?.address();
    let ours = starling::start_tunnel(&bench.starling, server, dir).context("Starling's tunnel")?;
    let haproxy = bench.haproxy().and_then(|program| haproxy::start_tunnel(&program, server, certificates, dir));
    let nginx = nginx::start_tunnel(server, certificates, dir);
    let mut tunnels = bench::with_peers(ours, [("HAProxy", haproxy), ("nginx", nginx)], output);
    let mut grid = Grid::of_peers("tcp", &tunnels);
    let mut measure =
        |stream| measurement::run_all(&mut tunnels, &bench.backend, &Load::stream(stream), bench.schedule);
    let mib_per_block = BLOCK as f64 / f64::from(1 << 20);
    for (connections, [rate, cpu, memory]) in BULK {
        let bulk = measure(Stream::Bulk { connections });
        grid.push_measured(rate, &bulk, |sample| sample.outcome.requests_per_second * mib_per_block);
        grid.push_measured(cpu, &bulk, |sample| sample.cpu_us.iter().sum::<f64>() / 1e3 / mib_per_block);
        grid.push_measured(memory, &bulk, |sample| {
            sample.memory.iter().map(|memory| memory.resident_kib as f64 / 1024.0).sum()
        });
    }
    let ping_pong = measure(Stream::PingPong);
    grid.push_measured("16 B to and fro: p50 us", &ping_pong, |sample| sample.outcome.p50_ms * 1e3);
    grid.push_measured("16 B to and fro: p99 us", &ping_pong, |sample| sample.outcome.p99_ms * 1e3);
    grid.push_measured("16 B to and fro: CPU us", &ping_pong, |sample| sample.cpu_us.iter().sum());
    output.grid(grid);
    Ok(())
}
