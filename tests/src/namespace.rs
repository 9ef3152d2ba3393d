//! A network namespace of a test's own, and what the network does in it.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{binary, program, run, skip};

/// Set in a test that runs in its own namespace.
const INSIDE: &str = "STARLING_TEST_NAMESPACE";

/// Runs the test of that name again in a network namespace of its own; whether that is where this is. Skips it where that
/// cannot be had.
pub fn is_inside(test: &str) -> bool {
    let programs = ["unshare", "ip", "nft", "ss"].map(program);
    let [Some(unshare), Some(ip), Some(nft), Some(_)] = programs else { return false };
    if std::env::var_os(INSIDE).is_some() {
        assert!(run(&ip, &["link", "set", "lo", "up"]).0, "lo comes up");
        return true;
    }
    if !run(&unshare, &["--net", &nft.to_string_lossy(), "add table ip probe"]).0 {
        skip("may not make a network namespace with nftables");
        return false;
    }
    // Built out here, where the registry can be reached if it is wanted.
    binary();
    let own = std::env::current_exe().expect("a test has a path");
    let inside = Command::new(unshare)
        .args(["--net", "--kill-child", "--"])
        .arg(own)
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare runs");
    let said = String::from_utf8_lossy(&inside.stdout) + String::from_utf8_lossy(&inside.stderr);
    assert!(inside.status.success() && said.contains("1 passed"), "{said}");
    print!("{said}");
    false
}

/// Runs a command of nftables.
pub fn nft(script: &str) {
    let (fine, _, err) = run(&known("nft"), &[script]);
    assert!(fine, "nft {script}: {err}");
}

/// UDP ports of a process.
pub fn udp_ports(pid: u32) -> BTreeSet<u16> {
    sockets(pid, "--udp").filter_map(|(own, _)| own).collect()
}

/// Ports from which a process has TCP connections to one of these.
pub fn tcp_ports(pid: u32, to: &[u16]) -> BTreeSet<u16> {
    sockets(pid, "--tcp")
        .filter(|(_, peer)| peer.is_some_and(|port| to.contains(&port)))
        .filter_map(|(own, _)| own)
        .collect()
}

/// Own and the peer's port of each socket.
fn sockets(pid: u32, kind: &str) -> impl Iterator<Item = (Option<u16>, Option<u16>)> {
    let (_, out, _) = run(&known("ss"), &["--no-header", kind, "--all", "--numeric", "--processes"]);
    let own = format!("pid={pid},");
    let lines: Vec<String> = out.lines().filter(|line| line.contains(&own)).map(str::to_owned).collect();
    lines.into_iter().map(|line| {
        let port = |at| line.split_whitespace().nth(at).and_then(|addr: &str| addr.rsplit(':').next()?.parse().ok());
        (port(3), port(4))
    })
}

fn known(name: &str) -> PathBuf {
    program(name).expect("it was there before")
}
