//! What an idle connection takes of a node's memory: to a peer, and to an application.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Output;
use super::bench::Bench;
use super::grid::{Cell, Grid};
use crate::http;
use crate::starling::{self, Shape};
use crate::target::{HOST, Target};

/// The meshes that are compared.
const PEERS: [usize; 2] = [10, 50];
/// Connections of an application.
const CONNECTIONS: usize = 1000;
/// How long a node is left alone before its memory is read.
const SETTLE: Duration = Duration::from_secs(3);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Measures new nodes in each round, since memory once taken is seldom given back.
pub(super) fn run(bench: &Bench, output: &mut Output) -> Result<()> {
    let mut values: [Vec<f64>; 6] = Default::default();
    for round in 1..=bench.schedule.rounds {
        eprintln!("round {round} of {}", bench.schedule.rounds);
        let [few, many] = [of_peers(bench, PEERS[0])?, of_peers(bench, PEERS[1])?];
        let [none, all] = of_connections(bench)?;
        let per_peer = (many - few) / (PEERS[1] - PEERS[0]) as f64;
        let figures = [few, many, per_peer, none, all, (all - none) / CONNECTIONS as f64];
        for (values, figure) in values.iter_mut().zip(figures) {
            values.push(figure);
        }
    }
    let lines = [
        "10 peers, each called once: RSS KiB",
        "50 peers, each called once: RSS KiB",
        "a peer and its idle connection: KiB",
        "no application connections: RSS KiB",
        "1000 idle, each with one call made: RSS KiB",
        "an idle application connection: KiB",
    ];
    let mut grid = Grid::of_cases("memory of a node", vec!["Starling".to_owned()]);
    for (what, values) in lines.into_iter().zip(values) {
        grid.push(what, vec![Cell::of(values)]);
    }
    output.grid(grid);
    Ok(())
}

/// KiB of a node in a mesh with so many peers, each of which it has called.
fn of_peers(bench: &Bench, peers: usize) -> Result<f64> {
    let dir = bench.dir()?;
    let shape = Shape { workers: 1, peers };
    resident_kib(&starling::start_mesh("Starling", &bench.starling, shape, bench.backend_port, dir.path())?)
}

/// KiB of a node without and with idle connections of an application.
fn of_connections(bench: &Bench) -> Result<[f64; 2]> {
    let dir = bench.dir()?;
    let pair = starling::start_pair("Starling", &bench.starling, 1, bench.backend_port, dir.path())?;
    let none = resident_kib(&pair)?;
    let connections = (0..CONNECTIONS).map(|_| called(pair.entry)).collect::<Result<Vec<_>>>();
    let connections = connections.context("open connections (`ulimit -n` may be too low)")?;
    let all = resident_kib(&pair)?;
    drop(connections);
    Ok([none, all])
}

/// A connection on which one call was answered.
fn called(entry: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&entry, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes())?;
    http::read_kept(&mut BufReader::new(&stream))?;
    Ok(stream)
}

/// Of the node that takes the calls, when it has come to rest.
fn resident_kib(target: &Target) -> Result<f64> {
    std::thread::sleep(SETTLE);
    Ok(target.proxies[0].memory()?.resident_kib as f64)
}
