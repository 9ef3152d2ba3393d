//! Everything in one run: pairs of proxies, loss between them, edges, tunnels, growth, memory; and what was aimed at.

mod bench;
mod drop_rule;
mod east_west;
mod edge;
mod grid;
mod growth;
mod loss;
mod marks;
mod memory;
mod policy;
mod tcp;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::measurement::Schedule;
use crate::namespace;
use crate::starling;
use bench::Bench;
use grid::Grid;

/// Names the network namespace that the bench was started in; given by the bench to itself only.
const OUTSIDE: &str = "--outside-namespace";

#[derive(Args)]
pub(crate) struct CompareArgs {
    /// Measure this alone; may be repeated.
    #[arg(long, value_enum, value_name = "SECTION")]
    only: Vec<Section>,
    /// One round of 3 s each: a look, not a measurement.
    #[arg(long)]
    quick: bool,
    /// Measurements of each target; the targets take turns [default: 3, or 1 with --quick].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Length of each measured load [default: 8, or 3 with --quick].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: Option<u32>,
    /// The Starling to measure [default: release/starling in the target directory].
    #[arg(long, value_name = "PATH")]
    starling: Option<PathBuf>,
    /// Where the peers and oha are: bin/oha, venv/bin/envoy, venv/bin/caddy [default: bench-peers in the target
    /// directory]. What is not there is looked for on PATH.
    #[arg(long, value_name = "DIR")]
    peers: Option<PathBuf>,
    /// One JSON document on standard output, and the tables on standard error.
    #[arg(long)]
    json: bool,
    #[arg(long = &OUTSIDE[2..], hide = true)]
    outside: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Section {
    EastWest,
    Loss,
    Edge,
    Policy,
    Tcp,
    Growth,
    Memory,
}

impl Section {
    fn name(self) -> String {
        self.to_possible_value().expect("no section is hidden").get_name().to_owned()
    }

    fn run(self, bench: &Bench, output: &mut Output) -> Result<()> {
        match self {
            Self::EastWest => east_west::run(bench, output),
            Self::Loss => loss::run(bench, output),
            Self::Edge => edge::run(bench, output),
            Self::Policy => policy::run(bench, output),
            Self::Tcp => tcp::run(bench, output),
            Self::Growth => growth::run(bench, output),
            Self::Memory => memory::run(bench, output),
        }
    }
}

/// Measures and prints; `false` when something could not be measured, or its row is not to be trusted.
pub(crate) fn run(args: &CompareArgs) -> Result<bool> {
    let without_namespace = match &args.outside {
        Some(outside) => namespace::set_up(outside).map(|()| None)?,
        None => {
            let Err(error) = namespace::enter([OUTSIDE, &namespace::current()?]);
            Some(format!("{error:#}"))
        }
    };
    let (rounds, seconds, warmup_seconds) = if args.quick { (1, 3, 1) } else { (3, 8, 2) };
    let schedule =
        Schedule { rounds: args.rounds.unwrap_or(rounds), seconds: args.seconds.unwrap_or(seconds), warmup_seconds };
    let program = args.starling.clone().map_or_else(starling::default_path, Ok)?;
    let peers = args.peers.clone().map_or_else(default_peers, Ok)?;
    let bench = Bench::new(program, peers, schedule, without_namespace)?;
    let mut output = Output { json: args.json, grids: Vec::new(), problems: Vec::new() };
    output.say(&format!("{} s a round, medians over rounds: {}", schedule.seconds, schedule.rounds));
    let all = Section::value_variants();
    for section in all.iter().filter(|section| args.only.is_empty() || args.only.contains(section)) {
        eprintln!("{} …", section.name());
        if let Err(error) = section.run(&bench, &mut output) {
            output.problem(format!("{}: {error:#}", section.name()));
        }
    }
    let marks = marks::judge(&output.grids);
    output.say(&marks::table(&marks));
    if args.json {
        let grids: Vec<Value> = output.grids.iter().map(Grid::json).collect();
        let marks: Vec<Value> = marks.iter().map(marks::Mark::json).collect();
        println!(
            "{:#}",
            json!({
                "rounds": schedule.rounds,
                "seconds": schedule.seconds,
                "tables": grids,
                "marks": marks,
                "problems": output.problems,
            })
        );
    }
    Ok(output.problems.is_empty() && output.grids.iter().all(Grid::is_valid))
}

/// `bench-peers` in the target directory that this program was built into.
fn default_peers() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own path")?;
    Ok(own.ancestors().nth(2).context("this program is not in a target directory")?.join("bench-peers"))
}

/// What the run has found so far; each table is printed as soon as there is one, so that a run cut short says something.
struct Output {
    json: bool,
    grids: Vec<Grid>,
    /// What could not be measured at all.
    problems: Vec<String>,
}

impl Output {
    fn grid(&mut self, grid: Grid) {
        self.say(&grid.text());
        self.grids.push(grid);
    }

    fn problem(&mut self, problem: String) {
        self.say(&format!("FAILED: {problem}"));
        self.problems.push(problem);
    }

    /// Prints where people read.
    fn say(&self, text: &str) {
        let text = text.trim_end();
        if self.json { eprintln!("{text}\n") } else { println!("{text}\n") }
    }
}
