//! The bench's only traces on the machine: one temporary directory and some loopback ports.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
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

/// Ports on loopback that were free, for TCP and for UDP, a moment ago.
///
/// All of one call differ from each other; a later call may repeat one that nobody has bound by then.
pub(crate) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    Ok(many_free_ports(N)?.try_into().expect("as many as asked for"))
}

/// The same, for a number that only the run knows.
pub(crate) fn many_free_ports(count: usize) -> Result<Vec<u16>> {
    let tries = 100 + 2 * count;
    let mut held = Vec::new();
    for _ in 0..tries {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("bind a free TCP port on 127.0.0.1")?;
        let port = tcp.local_addr()?.port();
        let Ok(udp) = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)) else { continue };
        held.push((port, tcp, udp));
        if held.len() == count {
            return Ok(held.iter().map(|(port, ..)| *port).collect());
        }
    }
    bail!("no {count} free ports on 127.0.0.1 in {tries} tries")
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
        let ports = free_ports::<8>().unwrap();
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
