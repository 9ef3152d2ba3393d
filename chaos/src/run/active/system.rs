//! What is done to processes and files by the system's means.

use std::{
    path::Path,
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};

use crate::process::send;

/// One round of a starved process.
const STARVE_ROUND: Duration = Duration::from_millis(200);

/// Lets a process go on: when dropped, or when its time is up.
pub(super) struct DeadMan {
    /// Its end is the word.
    alive: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl DeadMan {
    /// Stops the process for that share of the time, until `limit` at the latest.
    pub(super) fn stop(pid: u32, share: f64, limit: Duration) -> Result<Self> {
        send(pid, Signal::STOP)?;
        let (alive, ended) = mpsc::channel();
        let until = Instant::now() + limit;
        let thread = std::thread::Builder::new().name("dead-man".into()).spawn(move || {
            let goes_on = |long: Duration| ended.recv_timeout(long) == Err(RecvTimeoutError::Timeout);
            if share >= 1.0 {
                goes_on(limit);
            }
            while share < 1.0 && Instant::now() < until && goes_on(STARVE_ROUND.mul_f64(share)) {
                let _ = send(pid, Signal::CONT);
                if !goes_on(STARVE_ROUND.mul_f64(1.0 - share)) {
                    return;
                }
                let _ = send(pid, Signal::STOP);
            }
            let _ = send(pid, Signal::CONT);
        })?;
        Ok(Self { alive: Some(alive), thread: Some(thread) })
    }
}

impl Drop for DeadMan {
    fn drop(&mut self) {
        self.alive = None;
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

pub(in crate::run) fn copy_dir(from: &Path, to: &Path) -> Result<()> {
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
