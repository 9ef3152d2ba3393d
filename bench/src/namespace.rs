//! A network namespace of the bench's own, in which all that `lo` carries is what is measured.

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// The name of the namespace that this process is in.
pub(crate) fn current() -> Result<String> {
    let name = std::fs::read_link("/proc/self/ns/net").context("read /proc/self/ns/net")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Runs this program again, with the same arguments and `more`, in a new namespace; returns only if that fails.
pub(crate) fn enter(more: [&str; 2]) -> Result<Infallible> {
    let unshare = process::require("unshare", "apt-get install -y util-linux")?;
    // Without root, a user namespace gives the right to make the other.
    let ways: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let works = |way: &&&[&str]| {
        let mut probe = Command::new(&unshare);
        probe.args(**way).args(["--", "true"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    };
    let Some(way) = ways.iter().find(works) else {
        bail!("may not make a network namespace: run it as root, or allow user namespaces");
    };
    let own = std::env::current_exe().context("find this program's own path")?;
    // In place of this process, so that it keeps its parent, its signals and its exit code.
    let error =
        Command::new(&unshare).args(*way).arg("--").arg(own).args(std::env::args_os().skip(1)).args(more).exec();
    Err(error).context("start unshare")
}

/// Brings up `lo` in the namespace that was just entered from the one called `outside`.
pub(crate) fn set_up(outside: &str) -> Result<()> {
    ensure!(current()? != outside, "still in the network namespace {outside}");
    let ip = process::require("ip", "apt-get install -y iproute2")?;
    process::run("ip link set lo up", Command::new(ip).args(["link", "set", "lo", "up"])).map(drop)
}

/// Bytes that `lo` of this namespace has sent so far, with their IP, UDP and TCP headers.
pub(crate) fn lo_sent_bytes() -> Result<u64> {
    let path = Path::new("/proc/self/net/dev");
    sent_bytes(&std::fs::read_to_string(path).context("read /proc/self/net/dev")?, "lo")
}

fn sent_bytes(dev: &str, device: &str) -> Result<u64> {
    let line = dev.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let sent = line.and_then(|line| line.split_whitespace().nth(8)?.parse().ok());
    sent.with_context(|| format!("no {device} in /proc/self/net/dev"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ninth_number_of_the_device_is_what_it_sent() {
        let dev = "Inter-|   Receive                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     128       1    0    0    0     0          0         0      256       2    0    0    0     0       0          0
   lo2:5 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0
";
        assert_eq!(sent_bytes(dev, "lo").unwrap(), 256);
        assert_eq!(sent_bytes(dev, "lo2").unwrap(), 7);
        assert!(sent_bytes(dev, "eth0").is_err());
        assert!(sent_bytes("lo: 1 2", "lo").is_err());
    }
}
