//! nginx as one process, and a pair of them: plaintext HTTP/1 in, HTTP/1 over mutual TLS 1.3 between them, and out.

use std::path::Path;

use anyhow::{Context, Result};

use crate::certificates::Certificates;
use crate::process::{self, Process};
use crate::scratch::{self, loopback};
use crate::target::{START_LIMIT, Target};
use crate::template;

/// How to get nginx where it is missing.
pub(crate) const INSTALL: &str = "apt-get install -y nginx-light";

const NEAR: &str = include_str!("../nginx/near.conf");
const FAR: &str = include_str!("../nginx/far.conf");

/// Starts one on that port, with these lines in its `http` section, and waits until it accepts connections.
pub(crate) fn start(name: &str, port: u16, http: &str, scratch: &Path) -> Result<Process> {
    let program = process::require("nginx", INSTALL)?;
    let dir = scratch.join(name);
    std::fs::create_dir(&dir)?;
    let config = dir.join("nginx.conf");
    std::fs::write(&config, configuration(&dir, http)).context("write nginx.conf")?;
    let args = ["-p".as_ref(), dir.as_os_str(), "-c".as_ref(), config.as_os_str(), "-e".as_ref(), "stderr".as_ref()];
    let mut nginx = Process::start(name, &program, args, scratch)?;
    process::wait_for_listener(loopback(port), START_LIMIT, &mut nginx)?;
    Ok(nginx)
}

/// Starts both and waits until a call through them is answered.
pub(crate) fn start_pair(backend: u16, certificates: &Certificates, scratch: &Path) -> Result<Target> {
    let [near_port, far_port] = scratch::free_ports()?;
    let part = |template, listen_port: u16, upstream_port: u16| {
        let certs = certificates.dir();
        let values: [(&str, &dyn ToString); 3] =
            [("listen_port", &listen_port), ("upstream_port", &upstream_port), ("certs", &certs)];
        template::fill(template, &values)
    };
    let far = start("nginx-b", far_port, &part(FAR, far_port, backend)?, scratch)?;
    let near = start("nginx-a", near_port, &part(NEAR, near_port, far_port)?, scratch)?;
    let mut target = Target {
        name: "nginx h1",
        version: version()?,
        entry: loopback(near_port),
        hop: vec![far_port],
        proxies: vec![near, far],
    };
    target.wait_for_answer()?;
    Ok(target)
}

/// What it says of its version, which it prints on standard error.
pub(crate) fn version() -> Result<String> {
    let program = process::require("nginx", INSTALL)?;
    let output = process::bound(&program).args(["-e", "stderr", "-v"]).output().context("start nginx -v")?;
    Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// One process, so that no worker can outlive a killed master; the event loop is the one a single worker runs. It stays who
/// it is: the user that nginx would take instead of root does not exist in a user namespace.
fn configuration(dir: &Path, http: &str) -> String {
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("    {name}_temp_path {}/{name};\n", dir.display()))
        .concat();
    format!(
        "daemon off;
user root;
master_process off;
worker_processes 1;
pid {dir}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
{temp}    access_log off;
    sendfile on;
    keepalive_timeout 1h;
    keepalive_requests 1000000000;
{http}
}}
",
        dir = dir.display(),
    )
}
