//! nginx as one process, and a pair of them: plaintext HTTP/1 in, HTTP/1 over mutual TLS 1.3 between them, and out; or
//! plain TCP in and out, and mutual TLS between.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::certificates::Certificates;
use crate::process::{self, Process};
use crate::scratch::{self, loopback};
use crate::target::{START_LIMIT, Target};
use crate::template;

/// How to get nginx where it is missing.
pub(crate) const INSTALL: &str = "apt-get install -y nginx-light";

const INSTALL_STREAM: &str = "apt-get install -y libnginx-mod-stream";

const NEAR: &str = include_str!("../nginx/near.conf");
const FAR: &str = include_str!("../nginx/far.conf");
const NEAR_TCP: &str = include_str!("../nginx/near-tcp.conf");
const FAR_TCP: &str = include_str!("../nginx/far-tcp.conf");

/// Starts one on that port, with these lines in its `http` section, and waits until it accepts connections.
pub(crate) fn start(name: &str, port: u16, http: &str, scratch: &Path) -> Result<Process> {
    start_with(name, port, "", |dir| http_block(dir, http), scratch)
}

/// The same with another block, made for the directory that nginx will use, and what has to stand before all blocks.
fn start_with(
    name: &str,
    port: u16,
    before: &str,
    block: impl FnOnce(&Path) -> String,
    scratch: &Path,
) -> Result<Process> {
    let program = process::require("nginx", INSTALL)?;
    let dir = scratch.join(name);
    std::fs::create_dir(&dir)?;
    let config = dir.join("nginx.conf");
    std::fs::write(&config, configuration(&dir, before, &block(&dir))).context("write nginx.conf")?;
    let args = ["-p".as_ref(), dir.as_os_str(), "-c".as_ref(), config.as_os_str(), "-e".as_ref(), "stderr".as_ref()];
    let mut nginx = Process::start(name, &program, args, scratch)?;
    process::wait_for_listener(loopback(port), START_LIMIT, &mut nginx)?;
    Ok(nginx)
}

/// Starts both and waits until a call through them is answered.
pub(crate) fn start_pair(backend: u16, certificates: &Certificates, scratch: &Path) -> Result<Target> {
    let ports = scratch::free_ports()?;
    let [near, far] = fill_both([NEAR, FAR], ports, backend, certificates)?;
    let [near_port, far_port] = ports;
    let far = start("nginx-b", far_port, &far, scratch)?;
    let near = start("nginx-a", near_port, &near, scratch)?;
    let mut target = pair("nginx h1", ports, [near, far])?;
    target.wait_for_answer()?;
    Ok(target)
}

/// Starts both and waits until they carry TCP to `server`.
pub(crate) fn start_tunnel(server: SocketAddr, certificates: &Certificates, scratch: &Path) -> Result<Target> {
    let ports = scratch::free_ports()?;
    let [near, far] = fill_both([NEAR_TCP, FAR_TCP], ports, server.port(), certificates)?;
    let [near_port, far_port] = ports;
    let module = stream_module()?.map(|file| format!("load_module {};\n", file.display())).unwrap_or_default();
    let start =
        |name, port, servers: &str| start_with(name, port, &module, |_| format!("stream {{\n{servers}}}\n"), scratch);
    let far = start("nginx-tcp-b", far_port, &far)?;
    let near = start("nginx-tcp-a", near_port, &near)?;
    let mut target = pair("nginx", ports, [near, far])?;
    target.wait_for_echo()?;
    Ok(target)
}

/// The configurations of the near and the far one, whose ports are these.
fn fill_both(
    [near, far]: [&str; 2],
    [near_port, far_port]: [u16; 2],
    backend: u16,
    certificates: &Certificates,
) -> Result<[String; 2]> {
    let part = |template, listen_port: u16, upstream_port: u16| {
        let certs = certificates.dir();
        let values: [(&str, &dyn ToString); 3] =
            [("listen_port", &listen_port), ("upstream_port", &upstream_port), ("certs", &certs)];
        template::fill(template, &values)
    };
    Ok([part(near, near_port, far_port)?, part(far, far_port, backend)?])
}

fn pair(name: &'static str, [near_port, far_port]: [u16; 2], proxies: [Process; 2]) -> Result<Target> {
    let (version, entry) = (version()?, loopback(near_port));
    Ok(Target { name, version, entry, hop: vec![far_port], proxies: proxies.into() })
}

/// What it says of its version.
pub(crate) fn version() -> Result<String> {
    told("-v")
}

/// What it tells of itself when asked, which it prints on standard error.
fn told(flag: &str) -> Result<String> {
    let program = process::require("nginx", INSTALL)?;
    let output = process::bound(&program).args(["-e", "stderr", flag]).output();
    let output = output.with_context(|| format!("start nginx {flag}"))?;
    Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// The module that proxies TCP, or `None` where the program has it built in.
fn stream_module() -> Result<Option<PathBuf>> {
    let built = told("-V")?;
    let mut flags = built.split_whitespace();
    if flags.clone().any(|flag| flag == "--with-stream") {
        return Ok(None);
    }
    let Some(dir) = flags.find_map(|flag| flag.strip_prefix("--modules-path=")) else {
        bail!("nginx is built without the stream module");
    };
    let file = Path::new(dir).join("ngx_stream_module.so");
    ensure!(file.is_file(), "nginx's stream module is not installed: {INSTALL_STREAM}");
    Ok(Some(file))
}

/// One process, so that no worker can outlive a killed master; the event loop is the one a single worker runs. It stays who
/// it is: the user that nginx would take instead of root does not exist in a user namespace.
fn configuration(dir: &Path, before: &str, block: &str) -> String {
    format!(
        "{before}daemon off;
user root;
master_process off;
worker_processes 1;
pid {dir}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
{block}",
        dir = dir.display(),
    )
}

fn http_block(dir: &Path, http: &str) -> String {
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("    {name}_temp_path {}/{name};\n", dir.display()))
        .concat();
    format!(
        "http {{
{temp}    access_log off;
    sendfile on;
    keepalive_timeout 1h;
    keepalive_requests 1000000000;
{http}
}}
"
    )
}
