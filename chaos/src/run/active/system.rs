//! What is done to processes and files by the system's means.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};

use crate::process::send;

/// One round of a starved process.
const STARVE_ROUND: Duration = Duration::from_millis(200);

/// Lets a process go on: when told to, when dropped, or when its time is up.
pub(super) struct DeadMan {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl DeadMan {
    /// Stops the process for that share of the time, until `limit` at the latest.
    pub(super) fn stop(pid: u32, share: f64, limit: Duration) -> Result<Self> {
        send(pid, Signal::STOP)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, until) = (stop.clone(), Instant::now() + limit);
        let thread = std::thread::Builder::new().name("dead-man".into()).spawn(move || {
            while !stopped.load(Relaxed) && Instant::now() < until {
                if share >= 1.0 {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
                std::thread::sleep(STARVE_ROUND.mul_f64(share));
                let _ = send(pid, Signal::CONT);
                std::thread::sleep(STARVE_ROUND.mul_f64(1.0 - share));
                if !stopped.load(Relaxed) {
                    let _ = send(pid, Signal::STOP);
                }
            }
            let _ = send(pid, Signal::CONT);
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for DeadMan {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// State of a process as in /proc: `R`, `S`, `T`, …; a space if there is none.
pub(super) fn state_of(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or(' ')
}

pub(super) fn limit_descriptors(pid: u32, current: Option<u64>) -> Result<Rlimit> {
    // What is lowered for good cannot be raised again: the hard limit stays what it was, which is what this process has.
    let maximum = getrlimit(Resource::Nofile).maximum;
    set_descriptors(pid, Rlimit { current, maximum })
}

pub(super) fn set_descriptors(pid: u32, limit: Rlimit) -> Result<Rlimit> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
    Ok(prlimit(Some(pid), Resource::Nofile, limit)?)
}

/// Writes until no more fits.
pub(super) fn fill(path: &Path) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(path)?;
    let block = [0x5a; 64 << 10];
    for _ in 0..(64 << 20) / block.len() {
        file.write_all(&block)?;
    }
    Ok(())
}

/// The largest file of a state directory that is only a memory of the mesh, not an identity.
pub(super) fn largest_cache(state: &Path) -> Result<PathBuf> {
    let files = std::fs::read_dir(state)?.flatten().filter(|entry| entry.path().is_file());
    let caches = files.filter(|entry| entry.metadata().is_ok_and(|m| m.len() > 2));
    let largest = caches.max_by_key(|entry| entry.metadata().map_or(0, |m| m.len()));
    Ok(largest.context("there is no state file")?.path())
}

pub(super) fn clear_dir(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

pub(super) fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else if kind.is_file() {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    let mode = std::fs::metadata(from)?.permissions();
    Ok(std::fs::set_permissions(to, mode)?)
}
