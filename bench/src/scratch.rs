//! The bench's only traces on the machine: one temporary directory and some loopback ports.

use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// A temporary directory that also goes away when the bench is killed.
///
/// A second process waits on a pipe held by this one and removes the directory when the pipe closes. It leads its own
/// process group, so that Ctrl-C does not reach it before it has swept.
pub(crate) struct Scratch {
    dir: Option<TempDir>,
    sweeper: Child,
}

impl Scratch {
    /// Makes the directory and starts its sweeper.
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("starling-bench-").tempdir().context("make a temporary directory")?;
        // The second try is for files that a dying child wrote during the first.
        let sweep = r#"cat >/dev/null; rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }"#;
        let sweeper = Command::new("sh")
            .args(["-c", sweep, "sh"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("start sh")?;
        Ok(Self { dir: Some(dir), sweeper })
    }

    /// Where everything is written.
    pub(crate) fn path(&self) -> &Path {
        self.dir.as_ref().expect("present until drop").path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.dir.take());
        let _ = self.sweeper.kill();
        let _ = self.sweeper.wait();
    }
}

/// Where ports are looked for: below those that the kernel gives to outgoing connections, one of which could take a port
/// between its choice here and its use.
const PORTS: RangeInclusive<u16> = 10_000..=19_999;

/// Ports on loopback that were free, for TCP and for UDP, a moment ago.
///
/// No two calls give the same until all have been given.
pub(crate) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    Ok(many_free_ports(N)?.try_into().expect("as many as asked for"))
}

/// The same, for a number that only the run knows.
pub(crate) fn many_free_ports(count: usize) -> Result<Vec<u16>> {
    // From a place of this run's own, so that two runs at a time seldom meet.
    static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(RandomState::new().hash_one(()) >> 1));
    let in_range = |n: u64| PORTS.start() + (n % PORTS.len() as u64) as u16;
    let candidates = PORTS.map(|_| in_range(NEXT.fetch_add(1, Ordering::Relaxed)));
    let is_free = |port: &u16| {
        let address = (Ipv4Addr::LOCALHOST, *port);
        TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok()
    };
    let ports: Vec<u16> = candidates.filter(is_free).take(count).collect();
    ensure!(ports.len() == count, "no {count} free ports on 127.0.0.1 among {PORTS:?}");
    Ok(ports)
}

/// That port on 127.0.0.1.
pub(crate) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_differ() {
        let ports = [free_ports::<8>().unwrap(), free_ports().unwrap()].concat();
        for (i, port) in ports.iter().enumerate() {
            assert!(!ports[..i].contains(port), "{ports:?}");
        }
    }

    #[test]
    fn dropping_removes_the_directory() {
        let scratch = Scratch::new().unwrap();
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }
}
