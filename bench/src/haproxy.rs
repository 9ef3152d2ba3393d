//! A pair of HAProxies: plaintext HTTP/1 in, HTTP/2 over mutual TLS 1.3 between them, plaintext HTTP/1 out; or plain TCP
//! in and out, and mutual TLS between.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;

use crate::certificates::Certificates;
use crate::process::{self, Process};
use crate::scratch::{self, loopback};
use crate::target::{START_LIMIT, Target};
use crate::template;

/// How to get HAProxy where it is missing.
pub(crate) const INSTALL: &str = "apt-get install -y haproxy";

const NEAR: &str = include_str!("../haproxy/near.cfg");
const FAR: &str = include_str!("../haproxy/far.cfg");
const NEAR_TCP: &str = include_str!("../haproxy/near-tcp.cfg");
const FAR_TCP: &str = include_str!("../haproxy/far-tcp.cfg");

/// Starts both, with one thread each, and waits until a call through them is answered.
pub(crate) fn start(program: &Path, backend: u16, certificates: &Certificates, scratch: &Path) -> Result<Target> {
    let dir = scratch.join("haproxy");
    let mut target = start_both("HAProxy h2", program, [NEAR, FAR], backend, certificates, &dir)?;
    target.wait_for_answer()?;
    Ok(target)
}

/// Starts both, with one thread each, and waits until they carry TCP to `server`.
pub(crate) fn start_tunnel(
    program: &Path,
    server: SocketAddr,
    certificates: &Certificates,
    scratch: &Path,
) -> Result<Target> {
    let dir = scratch.join("haproxy-tcp");
    let mut target = start_both("HAProxy", program, [NEAR_TCP, FAR_TCP], server.port(), certificates, &dir)?;
    target.wait_for_echo()?;
    Ok(target)
}

/// Starts the near and the far one from these templates, in a new directory.
fn start_both(
    name: &'static str,
    program: &Path,
    [near, far]: [&str; 2],
    backend: u16,
    certificates: &Certificates,
    dir: &Path,
) -> Result<Target> {
    let version = process::run("haproxy -v", process::bound(program).arg("-v"))?;
    let version = version.lines().next().unwrap_or_default().to_owned();
    std::fs::create_dir(dir)?;
    for side in ["a", "b"] {
        std::fs::write(dir.join(format!("{side}.both")), certificates.both(side)?)?;
    }
    let [near_port, far_port] = scratch::free_ports()?;
    let start = |name: &str, template, listen_port: u16, upstream_port: u16| {
        let (certs, dir_text) = (certificates.dir(), dir.display().to_string());
        let values: [(&str, &dyn ToString); 4] =
            [("listen_port", &listen_port), ("upstream_port", &upstream_port), ("certs", &certs), ("dir", &dir_text)];
        let config = template::write(dir, &format!("{name}.cfg"), template, &values)?;
        // Without a master process, so that this child is all there is.
        let args = ["-db".as_ref(), "-f".as_ref(), config.as_os_str()];
        let mut process = Process::start(name, program, args, dir)?;
        process::wait_for_listener(loopback(listen_port), START_LIMIT, &mut process)?;
        anyhow::Ok(process)
    };
    let far = start("haproxy-b", far, far_port, backend)?;
    let near = start("haproxy-a", near, near_port, far_port)?;
    Ok(Target { name, version, entry: loopback(near_port), hop: vec![far_port], proxies: vec![near, far] })
}
