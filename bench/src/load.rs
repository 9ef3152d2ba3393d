//! Load on a target for a while, whichever program makes it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::oha::{self, Oha};
use crate::process::Process;
use crate::wrk::{self, Wrk};

/// How often a running load is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// How long after its time a load may end: calls under way are waited for, and a lossy hop may hold them up.
const OVERTIME: Duration = Duration::from_secs(60);

/// A program that makes load, set up for one kind of it.
pub(crate) struct Load {
    generator: Generator,
    dir: PathBuf,
}

enum Generator {
    Wrk(Wrk),
    Oha(Oha),
}

impl Load {
    /// As much as the target takes over plain HTTP/1; the program's output is kept in `dir` while it runs.
    pub(crate) fn wrk(wrk: Wrk, dir: &Path) -> Self {
        Self { generator: Generator::Wrk(wrk), dir: dir.to_owned() }
    }

    /// A fixed rate, or any version of HTTP over TLS; the program's output is kept in `dir` while it runs.
    pub(crate) fn oha(oha: Oha, dir: &Path) -> Self {
        Self { generator: Generator::Oha(oha), dir: dir.to_owned() }
    }

    /// Loads `entry` for `seconds`, calling `watch` a few times a second meanwhile.
    pub(crate) fn run(
        &self,
        entry: SocketAddr,
        seconds: u32,
        mut watch: impl FnMut() -> Result<()>,
    ) -> Result<Outcome> {
        let (name, (program, args)) = match &self.generator {
            Generator::Wrk(wrk) => ("wrk", wrk.command(entry, seconds)),
            Generator::Oha(oha) => ("oha", oha.command(entry, seconds)),
        };
        let mut process = Process::start(name, &program, args, &self.dir)?;
        let end = Instant::now() + Duration::from_secs(seconds.into());
        let mut to_interrupt = matches!(&self.generator, Generator::Oha(oha) if oha.runs_until_interrupted());
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
        let outcome = match self.generator {
            Generator::Wrk(_) => wrk::parse(&text),
            Generator::Oha(_) => oha::parse(&text),
        };
        outcome.with_context(|| format!("{name} printed what could not be read:\n{text}"))
    }
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
