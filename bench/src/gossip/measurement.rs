//! One mesh from its start to its end, and all meshes of all systems.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::mesh::Mesh;

use super::report::Row;
use super::system::{SEED, System};
use crate::namespace;
use crate::process::{self, Process};

/// How long a mesh that has converged is left alone before it counts as at rest. A burst that follows the joining by half
/// a minute, when idle connections time out and the first full exchanges come, is over then.
const SETTLE: Duration = Duration::from_secs(45);
/// The same before an agent is killed.
const SETTLE_BEFORE_KILL: Duration = Duration::from_secs(3);

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// Meshes of each system and size.
    pub(crate) rounds: u32,
    /// Length of the measurement at rest.
    pub(crate) rest_seconds: u32,
    /// Agents killed in each round, one after the other.
    pub(crate) kills: u32,
}

/// What one mesh gave.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// From the start of the last agent until all saw all alive.
    pub(crate) converged_s: f64,
    /// From each SIGKILL until all others saw that agent down.
    pub(crate) kills_s: Vec<f64>,
    /// What an agent sent at rest, with the headers of IP, UDP and TCP.
    pub(crate) bytes_per_second: f64,
    /// User and system time of an agent at rest.
    pub(crate) cpu_ms_per_second: f64,
    /// Resident memory of each agent at the end of the rest.
    pub(crate) resident_mib: Vec<f64>,
    /// Share of the machine's CPU time that went to processes the bench knows nothing of, 0 to 1.
    pub(crate) elsewhere: f64,
    /// By how much at most a time above is too long.
    pub(crate) gap_s: f64,
}

/// Measures every system at every size, in turn, so that a slow spell of the machine meets all of them.
///
/// A round that fails is a problem of its row, not the end of the run.
pub(crate) fn run(systems: &[System], sizes: &[u16], schedule: Schedule, scratch: &Path) -> Result<Vec<Row>> {
    let ticks_per_second = process::ticks_per_second()?;
    let mut rows = Vec::new();
    for &nodes in sizes {
        let first = rows.len();
        for system in systems {
            let dir = scratch.join(format!("{}-{nodes}", system.name));
            std::fs::create_dir(&dir)?;
            eprintln!("{nodes} agents: prepare {}", system.name);
            system.prepare(nodes, &dir).with_context(|| format!("prepare {}", system.name))?;
            rows.push(Row::new(system, nodes));
        }
        for round in 1..=schedule.rounds {
            for (system, row) in systems.iter().zip(&mut rows[first..]) {
                eprintln!("{nodes} agents: round {round} of {}: {}", schedule.rounds, system.name);
                let dir = scratch.join(format!("{}-{nodes}", system.name));
                match sample(system, nodes, schedule, round, &dir, ticks_per_second) {
                    Ok(sample) => row.samples.push(sample),
                    Err(error) => {
                        eprintln!("{error:#}");
                        row.problems.push(format!("round {round}: {error:#}"));
                    }
                }
            }
        }
    }
    Ok(rows)
}

fn sample(
    system: &System,
    nodes: u16,
    schedule: Schedule,
    round: u32,
    dir: &Path,
    ticks_per_second: f64,
) -> Result<Sample> {
    system.forget_peers(nodes, dir)?;
    let (busy, total) = process::machine_cpu_ticks()?;
    let ours = process::own_cpu_ticks()?;

    let (mut mesh, last_started) = Mesh::start(system, nodes, dir)?;
    let converged = mesh.wait_all_alive()?;
    let mut gap = converged.gap;

    std::thread::sleep(SETTLE);
    let rest = Rest::measure(&mesh, schedule.rest_seconds)?;
    mesh.check_all_alive().context("after the rest")?;

    let mut kills_s = Vec::new();
    for kill in 0..schedule.kills {
        std::thread::sleep(SETTLE_BEFORE_KILL);
        let victim = victim((round - 1) * schedule.kills + kill, nodes);
        let (killed, known) = mesh.kill(victim)?;
        kills_s.push((known.at - killed).as_secs_f64());
        gap = gap.max(known.gap);
        mesh.restart(victim)?;
        mesh.wait_all_alive().context("after a restart")?;
    }

    let ours = process::own_cpu_ticks()? + cpu_ticks(&mesh)? - ours;
    let (busy_after, total_after) = process::machine_cpu_ticks()?;
    let elsewhere = (busy_after - busy).saturating_sub(ours) as f64 / (total_after - total).max(1) as f64;
    Ok(Sample {
        converged_s: (converged.at - last_started).as_secs_f64(),
        kills_s,
        bytes_per_second: rest.sent_bytes as f64 / rest.seconds / f64::from(nodes),
        cpu_ms_per_second: rest.ticks as f64 * 1000.0 / ticks_per_second / rest.seconds / f64::from(nodes),
        resident_mib: rest.resident_kib.iter().map(|kib| *kib as f64 / 1024.0).collect(),
        elsewhere,
        gap_s: gap.as_secs_f64(),
    })
}

/// What all agents together used while nobody asked them anything.
struct Rest {
    seconds: f64,
    sent_bytes: u64,
    ticks: u64,
    resident_kib: Vec<u64>,
}

impl Rest {
    fn measure(mesh: &Mesh<'_>, seconds: u32) -> Result<Self> {
        let (start, sent_bytes, ticks) = (Instant::now(), namespace::lo_sent_bytes()?, cpu_ticks(mesh)?);
        std::thread::sleep(Duration::from_secs(seconds.into()));
        let seconds = start.elapsed().as_secs_f64();
        let sent_bytes = namespace::lo_sent_bytes()? - sent_bytes;
        let ticks = cpu_ticks(mesh)? - ticks;
        let resident = mesh.processes().map(|process| Ok(process.memory()?.resident_kib));
        Ok(Self { seconds, sent_bytes, ticks, resident_kib: resident.collect::<Result<_>>()? })
    }
}

fn cpu_ticks(mesh: &Mesh<'_>) -> Result<u64> {
    mesh.processes().map(Process::cpu_ticks).sum()
}

/// The agent to kill as the `count`-th: never the seed, and the others far apart in their order.
fn victim(count: u32, nodes: u16) -> u16 {
    const STRIDE: u64 = 7919;
    SEED + 1 + (u64::from(count) * STRIDE % u64::from(nodes - 1)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn victims_take_turns_and_spare_the_seed() {
        for nodes in [3, 20, 50] {
            let victims: std::collections::BTreeSet<u16> =
                (0..u32::from(nodes) - 1).map(|n| victim(n, nodes)).collect();
            assert_eq!(victims, (1..nodes).collect(), "{nodes}");
            assert!((1..nodes).contains(&victim(u32::MAX, nodes)));
        }
    }
}
