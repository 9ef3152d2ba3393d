//! A pair of HAProxies: plaintext HTTP/1 in, HTTP/2 over mutual TLS 1.3 between them, plaintext HTTP/1 out.

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

/// Starts both, with one thread each, and waits until a call through them is answered.
pub(crate) fn start(program: &Path, backend: u16, certificates: &Certificates, scratch: &Path) -> Result<Target> {
    let version = process::run("haproxy -v", process::bound(program).arg("-v"))?;
    let version = version.lines().next().unwrap_or_default().to_owned();
    let dir = scratch.join("haproxy");
    std::fs::create_dir(&dir)?;
    for side in ["a", "b"] {
        std::fs::write(dir.join(format!("{side}.both")), certificates.both(side)?)?;
    }
    let [near_port, far_port] = scratch::free_ports()?;
    let start = |name: &str, template, listen_port: u16, upstream_port: u16| {
        let (certs, dir_text) = (certificates.dir(), dir.display().to_string());
        let values: [(&str, &dyn ToString); 4] =
            [("listen_port", &listen_port), ("upstream_port", &upstream_port), ("certs", &certs), ("dir", &dir_text)];
        let config = template::write(&dir, &format!("{name}.cfg"), template, &values)?;
        // Without a master process, so that this child is all there is.
        let args = ["-db".as_ref(), "-f".as_ref(), config.as_os_str()];
        let mut process = Process::start(name, program, args, &dir)?;
        process::wait_for_listener(loopback(listen_port), START_LIMIT, &mut process)?;
        anyhow::Ok(process)
    };
    let far = start("haproxy-b", FAR, far_port, backend)?;
    let near = start("haproxy-a", NEAR, near_port, far_port)?;
    let mut target = Target {
        name: "HAProxy h2",
        version,
        entry: loopback(near_port),
        hop: vec![far_port],
        proxies: vec![near, far],
    };
    target.wait_for_answer()?;
    Ok(target)
}
