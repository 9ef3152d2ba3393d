//! Caddy as an edge: public HTTP/1, 2 and 3 over TLS, plaintext HTTP/1 to the backend.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;

use crate::certificates::Certificates;
use crate::process::{self, Process};
use crate::scratch::{self, loopback};
use crate::target::{START_LIMIT, Target};
use crate::template;

const CADDYFILE: &str = include_str!("../caddy/Caddyfile");

/// Starts it, on one core's worth of threads, and waits until it accepts connections.
pub(crate) fn start(program: &Path, backend: u16, certificates: &Certificates, scratch: &Path) -> Result<Target> {
    let version = process::run("caddy version", process::bound(program).arg("version"))?.trim().to_owned();
    let dir = scratch.join("caddy");
    std::fs::create_dir(&dir)?;
    let [listen_port, http_port] = scratch::free_ports()?;
    let certs = certificates.dir();
    let values: [(&str, &dyn ToString); 4] =
        [("listen_port", &listen_port), ("http_port", &http_port), ("upstream_port", &backend), ("certs", &certs)];
    let config = template::write(&dir, "Caddyfile", CADDYFILE, &values)?;
    // `env` becomes Caddy, so that the process measured is Caddy's. Its files go where they are swept away.
    let mut args = vec![OsString::from("GOMAXPROCS=1")];
    for variable in ["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"] {
        args.push(format!("{variable}={}", dir.display()).into());
    }
    args.extend([program.into(), "run".into(), "--adapter".into(), "caddyfile".into(), "--config".into()]);
    args.push(config.into());
    let mut caddy = Process::start("caddy", Path::new("env"), args, &dir)?;
    process::wait_for_listener(loopback(listen_port), START_LIMIT, &mut caddy)?;
    Ok(Target { name: "Caddy", version, entry: loopback(listen_port), hop: Vec::new(), proxies: vec![caddy] })
}
