//! Meshes of many agents beside each other: how fast they agree, and what they cost at rest.

mod measurement;
mod mesh;
mod msgpack;
mod report;
mod system;
mod view;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::namespace;
use crate::process;
use crate::scratch::Scratch;
use crate::starling;
use measurement::Schedule;
use report::Report;
use system::{MAX_NODES, SERF_INSTALL, System};

/// Names the network namespace that the bench was started in; given by the bench to itself only.
const OUTSIDE: &str = "--outside-namespace";

#[derive(Args)]
pub(crate) struct GossipArgs {
    /// Agents in each mesh.
    #[arg(long, value_delimiter = ',', default_value = "20,50",
        value_parser = clap::value_parser!(u16).range(3..=i64::from(MAX_NODES)))]
    sizes: Vec<u16>,
    /// Meshes of each system and size; the systems take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of the measurement at rest.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    rest_seconds: u32,
    /// Agents killed in each round, one after the other.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    kills: u32,
    /// The Starling to measure, or `none` [default: release/starling in the target directory].
    #[arg(long, value_name = "PATH")]
    starling: Option<PathBuf>,
    /// The serf to compare with, or `none` [default: on PATH].
    #[arg(long, value_name = "PATH")]
    serf: Option<PathBuf>,
    /// One JSON document instead of the table.
    #[arg(long)]
    json: bool,
    #[arg(long = &OUTSIDE[2..], hide = true)]
    outside: Option<String>,
}

/// Measures and prints; `false` when some round failed.
pub(crate) fn run(args: &GossipArgs) -> Result<bool> {
    match &args.outside {
        Some(outside) => namespace::set_up(outside)?,
        None => match namespace::enter([OUTSIDE, &namespace::current()?])? {},
    }
    // First of all, so that it goes last: the children write into it until they are dropped.
    let scratch = Scratch::new()?;
    let systems = systems(args)?;
    let schedule = Schedule { rounds: args.rounds, rest_seconds: args.rest_seconds, kills: args.kills };
    let rows = measurement::run(&systems, &args.sizes, schedule, scratch.path())?;
    let report = Report::new(rows, schedule);
    if args.json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.text());
    }
    Ok(report.is_valid())
}

fn systems(args: &GossipArgs) -> Result<Vec<System>> {
    let mut systems = Vec::new();
    let is_none = |path: &Option<PathBuf>| path.as_deref() == Some(Path::new("none"));
    if !is_none(&args.starling) {
        let program = args.starling.clone().map_or_else(starling::default_path, Ok)?;
        systems.push(System::starling(program)?);
    }
    if !is_none(&args.serf) {
        match args.serf.clone().or_else(|| process::find("serf")) {
            Some(program) => systems.push(System::serf(program).context("serf")?),
            None => eprintln!("serf is not installed, going on without it: {SERF_INSTALL}"),
        }
    }
    ensure!(!systems.is_empty(), "nothing to measure");
    Ok(systems)
}
