//! Load on a target for a while, whichever program makes it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::oha::{self, Oha};
use crate::process::Process;
use crate::stream::Stream;
use crate::wrk::{self, Wrk};

/// How often a running load is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// How long after its time a load may end: calls under way are waited for, and a lossy hop may hold them up.
const OVERTIME: Duration = Duration::from_secs(60);

/// What makes load, set up for one kind of it.
pub(crate) struct Load(Kind);

enum Kind {
    /// A program, whose output goes to a directory.
    Program(Generator, PathBuf),
    /// The bench itself.
    Stream(Stream),
}

enum Generator {
    Wrk(Wrk),
    Oha(Oha),
}

impl Load {
    /// As much as the target takes over plain HTTP/1; the program's output is kept in `dir` while it runs.
    pub(crate) fn wrk(wrk: Wrk, dir: &Path) -> Self {
        Self(Kind::Program(Generator::Wrk(wrk), dir.to_owned()))
    }

    /// A fixed rate, or any version of HTTP over TLS; the program's output is kept in `dir` while it runs.
    pub(crate) fn oha(oha: Oha, dir: &Path) -> Self {
        Self(Kind::Program(Generator::Oha(oha), dir.to_owned()))
    }

    /// Plain TCP, made by the bench itself.
    pub(crate) fn stream(stream: Stream) -> Self {
        Self(Kind::Stream(stream))
    }

    /// Loads `entry` for `seconds`, calling `watch` a few times a second meanwhile.
    pub(crate) fn run(
        &self,
        entry: SocketAddr,
        seconds: u32,
        mut watch: impl FnMut() -> Result<()>,
    ) -> Result<Outcome> {
        let (generator, dir) = match &self.0 {
            Kind::Program(generator, dir) => (generator, dir),
            Kind::Stream(stream) => return run_stream(*stream, entry, seconds, watch),
        };
        let (name, (program, args)) = match generator {
            Generator::Wrk(wrk) => ("wrk", wrk.command(entry, seconds)),
            Generator::Oha(oha) => ("oha", oha.command(entry, seconds)),
        };
        let mut process = Process::start(name, &program, args, dir)?;
        let end = Instant::now() + Duration::from_secs(seconds.into());
        let mut to_interrupt = matches!(generator, Generator::Oha(oha) if oha.runs_until_interrupted());
        let status = loop {
            if let Some(status) = process.exit()? {
                break status;
            }
            if to_interrupt && Instant::now() >= end {
                process.interrupt()?;
                to_interrupt = false;
            }
            ensure!(Instant::now() < end + OVERTIME, "{name} does not end:\n{}", process.output()?);
            watch()?;
            std::thread::sleep(WATCH_INTERVAL);
        };
        let text = process.output()?;
        ensure!(status.success(), "{name} ended with {status}:\n{text}");
        let outcome = match generator {
            Generator::Wrk(_) => wrk::parse(&text),
            Generator::Oha(_) => oha::parse(&text),
        };
        outcome.with_context(|| format!("{name} printed what could not be read:\n{text}"))
    }
}

/// Needs no limit of time: no connection waits for ever.
fn run_stream(
    stream: Stream,
    entry: SocketAddr,
    seconds: u32,
    mut watch: impl FnMut() -> Result<()>,
) -> Result<Outcome> {
    let load = stream.start(entry, seconds);
    while !load.is_finished() {
        watch()?;
        std::thread::sleep(WATCH_INTERVAL);
    }
    Ok(load.join().expect("the load does not panic"))
}

/// What the callers saw.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Answers received, of any status.
    pub(crate) requests: u64,
    /// Answers a second.
    pub(crate) requests_per_second: f64,
    /// Median time to the answer.
    pub(crate) p50_ms: f64,
    /// Time to the answer that 99 of 100 calls kept within.
    pub(crate) p99_ms: f64,
    /// Answers that were not a success, and connections that failed, in the program's words; empty when all went well.
    pub(crate) errors: Vec<String>,
}
