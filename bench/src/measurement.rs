//! One target under load for one round, and all rounds of all targets.

use std::net::SocketAddr;

use anyhow::{Context, Result};

use crate::load::{Load, Outcome};
use crate::process::{self, Memory, Process};
use crate::target::Target;

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// Length of the measured load.
    pub(crate) seconds: u32,
    /// Length of the load before it that is thrown away.
    pub(crate) warmup_seconds: u32,
    /// Measurements of each target.
    pub(crate) rounds: u32,
}

/// What one round of one target gave.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// What the callers saw.
    pub(crate) outcome: Outcome,
    /// CPU time for each answered request in microseconds, of each proxy in the order of the target.
    pub(crate) cpu_us: Vec<f64>,
    /// Memory of each proxy, read last a moment before the load ended.
    pub(crate) memory: Vec<Memory>,
    /// Share of the machine's CPU time that went to processes the bench knows nothing of, 0 to 1.
    pub(crate) elsewhere: f64,
}

impl Sample {
    /// CPU time for each answered request in microseconds, over all proxies; `None` without proxies.
    pub(crate) fn cpu_us_total(&self) -> Option<f64> {
        (!self.cpu_us.is_empty()).then(|| self.cpu_us.iter().sum())
    }
}

/// All rounds of one target.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    /// A sample for each round that came to its end.
    pub(crate) samples: Vec<Sample>,
    /// What went wrong; with any, the samples are not to be trusted.
    pub(crate) problems: Vec<String>,
}

/// Measures every target in each round, in turn, so that a slow spell of the machine meets all of them.
///
/// The result has one list of samples for each target, a sample a round.
pub(crate) fn run(
    targets: &mut [Target],
    backend: &Process,
    load: &Load,
    schedule: Schedule,
) -> Result<Vec<Vec<Sample>>> {
    let mut samples = vec![Vec::new(); targets.len()];
    for round in 1..=schedule.rounds {
        for (index, samples) in samples.iter_mut().enumerate() {
            samples.push(once(targets, index, backend, load, schedule, round)?);
        }
    }
    Ok(samples)
}

/// The same, but a target that fails has a problem, and the others go on.
pub(crate) fn run_all(targets: &mut [Target], backend: &Process, load: &Load, schedule: Schedule) -> Vec<Measured> {
    let mut all = vec![Measured::default(); targets.len()];
    for round in 1..=schedule.rounds {
        for (index, measured) in all.iter_mut().enumerate() {
            measured.add(round, once(targets, index, backend, load, schedule, round));
        }
    }
    all
}

impl Measured {
    /// Adds what a round gave.
    pub(crate) fn add(&mut self, round: u32, result: Result<Sample>) {
        match result {
            Ok(sample) => {
                let of_round = |error: &String| format!("round {round}: {error}");
                self.problems.extend(sample.outcome.errors.iter().map(of_round));
                self.samples.push(sample);
            }
            Err(error) => self.problems.push(format!("round {round}: {error:#}")),
        }
    }
}

/// One round of one target: its warming up, then its load.
pub(crate) fn once(
    targets: &mut [Target],
    index: usize,
    backend: &Process,
    load: &Load,
    schedule: Schedule,
    round: u32,
) -> Result<Sample> {
    let (name, entry) = (targets[index].name, targets[index].entry);
    eprintln!("round {round} of {}: {name}", schedule.rounds);
    load.run(entry, schedule.warmup_seconds, || Ok(())).with_context(|| format!("warm up {name}"))?;
    let sample =
        sample(targets, index, backend, load, entry, schedule.seconds).with_context(|| format!("measure {name}"))?;
    targets[index].proxies.iter_mut().try_for_each(Process::check_alive)?;
    Ok(sample)
}

fn sample(
    targets: &[Target],
    index: usize,
    backend: &Process,
    load: &Load,
    entry: SocketAddr,
    seconds: u32,
) -> Result<Sample> {
    let proxies = &targets[index].proxies;
    let mut memory = vec![Memory::default(); proxies.len()];
    let before = Ticks::now(targets, index, backend)?;
    let outcome = load.run(entry, seconds, || {
        for (memory, proxy) in memory.iter_mut().zip(proxies) {
            *memory = proxy.memory()?;
        }
        Ok(())
    })?;
    let after = Ticks::now(targets, index, backend)?;
    let us_per_request = 1e6 / process::ticks_per_second()? / outcome.requests as f64;
    let cpu_us = after.proxies.iter().zip(&before.proxies).map(|(a, b)| (a - b) as f64 * us_per_request).collect();
    Ok(Sample { outcome, cpu_us, memory, elsewhere: after.elsewhere_since(&before) })
}

/// The clocks of everything at one moment.
struct Ticks {
    proxies: Vec<u64>,
    ours: u64,
    busy: u64,
    total: u64,
}

impl Ticks {
    fn now(targets: &[Target], index: usize, backend: &Process) -> Result<Self> {
        let proxies = targets[index].proxies.iter().map(Process::cpu_ticks).collect::<Result<Vec<_>>>()?;
        let mut ours = process::own_cpu_ticks()? + backend.cpu_ticks()?;
        for process in targets.iter().flat_map(|target| &target.proxies) {
            ours += process.cpu_ticks()?;
        }
        let (busy, total) = process::machine_cpu_ticks()?;
        Ok(Self { proxies, ours, busy, total })
    }

    fn elsewhere_since(&self, before: &Self) -> f64 {
        let others = (self.busy - before.busy).saturating_sub(self.ours - before.ours);
        others as f64 / (self.total - before.total).max(1) as f64
    }
}
