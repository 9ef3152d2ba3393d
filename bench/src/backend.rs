//! The service behind every proxy: one nginx process that answers from its configuration.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};

use crate::process::{self, Process};
use crate::scratch;
use crate::target::{START_LIMIT, Target};

/// What every body starts with: 128 bytes, which a short one has alone and a longer one over and over.
pub(crate) const BODY: &str = "\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Starts nginx on a free port, whose answers have a body of that length; the target has no proxies, and nginx itself comes with it.
pub(crate) fn start(scratch: &Path, body_bytes: usize) -> Result<(Target, Process)> {
    let program = process::require("nginx", "apt-get install -y nginx-light")?;
    let dir = scratch.join("nginx");
    std::fs::create_dir(&dir)?;
    let [port] = scratch::free_ports()?;
    let config = dir.join("nginx.conf");
    let body: String = BODY.chars().cycle().take(body_bytes).collect();
    std::fs::write(dir.join("body"), &body).context("write the body")?;
    std::fs::write(&config, configuration(&dir, port, &body)).context("write nginx.conf")?;
    let args = ["-p".as_ref(), dir.as_os_str(), "-c".as_ref(), config.as_os_str(), "-e".as_ref(), "stderr".as_ref()];
    let mut nginx = Process::start("nginx", &program, args, scratch)?;
    let entry = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    process::wait_until("nginx accepts connections", START_LIMIT, &mut [&mut nginx], || {
        std::net::TcpStream::connect(entry).map(drop).context("connect to nginx")
    })?;
    let version = nginx_version(&program)?;
    let mut target = Target { name: "nginx (no proxy)", version, entry, proxies: Vec::new() };
    target.wait_for_answer()?;
    Ok((target, nginx))
}

/// nginx prints its version on standard error.
fn nginx_version(program: &Path) -> Result<String> {
    let output = process::bound(program).args(["-e", "stderr", "-v"]).output().context("start nginx -v")?;
    Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// One process, so that no worker can outlive a killed master; the event loop is the one a single worker runs.
fn configuration(dir: &Path, port: u16, body: &str) -> String {
    // A short body is answered from the configuration, a long one from a file, as nginx would send it.
    let answer = if body.len() <= BODY.len() {
        format!("return 200 \"{body}\";")
    } else {
        format!("root {}; try_files /body =500;", dir.display())
    };
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("    {name}_temp_path {}/{name};\n", dir.display()))
        .concat();
    format!(
        "daemon off;
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
    server {{
        listen 127.0.0.1:{port};
        location = / {{ default_type text/plain; {answer} }}
    }}
}}
",
        dir = dir.display(),
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_body_has_128_bytes() {
        assert_eq!(super::BODY.len(), 128);
    }
}
