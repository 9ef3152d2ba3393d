//! The harness of the end-to-end tests: the real binary, real services and clients, and what to do when a part is missing.

pub mod applicant;
pub mod namespace;
pub mod raw_h3;
pub mod relay;
pub mod rogue;
pub mod service;
pub mod stuck;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use starling_chaos::{Client, Cluster, Process, free_port, self_signed, wait_for};
use starling_protocol::admin;

/// The binary, built if need be: `cargo test` alone does not build another package's binary.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let test = std::env::current_exe().expect("a test has a path");
        let profile = test.ancestors().nth(2).expect("tests live in target/PROFILE/deps").to_path_buf();
        let release = profile.file_name().is_some_and(|name| name == "release");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "starling"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if release {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "the binary does not build");
        profile.join("starling")
    })
}

/// How long a chaos run of a test may take.
const CHAOS_LIMIT: Duration = Duration::from_secs(240);

/// Says that a test cannot run here, and why; where everything is required, that is a failure.
pub fn skip(why: &str) {
    assert!(std::env::var_os("STARLING_REQUIRE_ALL").is_none(), "required here: {why}");
    eprintln!("skipped: {why}");
}

/// The Python that has the packages of `tests/clients/requirements.txt`; `None` skips.
pub fn python() -> Option<PathBuf> {
    let python = std::env::var_os("STARLING_TEST_PYTHON").map(PathBuf::from).filter(|p| p.exists());
    if python.is_none() {
        skip("STARLING_TEST_PYTHON does not name a Python with tests/clients/requirements.txt");
    }
    python
}

/// The unpacked npm package `grpc-web`; `None` skips.
pub fn grpc_web_package() -> Option<PathBuf> {
    let package = std::env::var_os("STARLING_TEST_GRPC_WEB").map(PathBuf::from).filter(|p| p.exists());
    if package.is_none() {
        skip("STARLING_TEST_GRPC_WEB does not name the npm package grpc-web");
    }
    package
}

/// A program of the system; `None` skips.
pub fn program(name: &str) -> Option<PathBuf> {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&dirs).chain(["/usr/sbin".into()]).map(|dir| dir.join(name)).find(|path| path.exists());
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

/// One of the clients beside the tests.
pub fn client_script(name: &str) -> String {
    format!("{}/clients/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs a program to its end, at most two minutes: success, stdout, stderr.
pub fn run(program: &Path, args: &[&str]) -> (bool, String, String) {
    let output = Command::new("timeout")
        .args(["-k", "5", "120"])
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// Waits, where a full hour is near: a day, or a month, may begin at any somewhere.
pub async fn away_from_the_hour() {
    let past = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() % 3600;
    if past > 3600 - 120 {
        tokio::time::sleep(Duration::from_secs(3601 - past)).await;
    }
}

/// A sample service of the binary itself.
pub async fn sample(dir: &Path, name: &str) -> (Process, SocketAddr) {
    let addr = free_port();
    let args = ["sample", "--listen", &addr.to_string(), "--name", name];
    let process = Process::start(binary(), args, &dir.join(format!("{name}.service.log"))).expect("the sample starts");
    listening(addr).await;
    (process, addr)
}

/// Where an edge is called: its public address, the certificate that it shows, and the part of its file that says so.
pub struct Front {
    /// A free port.
    pub listen: SocketAddr,
    /// For clients to trust.
    pub cert: PathBuf,
    /// `[edge]` and `[[certificate]]`; other sections come behind it.
    pub sections: String,
}

impl Front {
    /// For that host, with `more` in `[edge]`. The certificate is the same for all in a directory.
    pub fn new(dir: &Path, host: &str, more: &str) -> Self {
        let (listen, cert, key) = (free_port(), dir.join("edge.pem"), dir.join("edge.key"));
        if !cert.exists() {
            self_signed(&[host], &cert, &key).expect("a certificate");
        }
        let sections = format!(
            "[edge]\nlisten = \"{listen}\"\n{more}\n[[certificate]]\nhosts = [\"{host}\"]\ncert = {cert:?}\nkey = {key:?}\n"
        );
        Self { listen, cert, sections }
    }
}

/// A server that misbehaves in the given way, as `clients/broken_server.py` can. Needs a Python, any.
pub async fn broken_server(dir: &Path, mode: &str) -> Option<(Process, SocketAddr)> {
    let python = program("python3")?;
    let addr = free_port();
    let args =
        [client_script("broken_server.py"), "--port".into(), addr.port().to_string(), "--mode".into(), mode.into()];
    let process = Process::start(&python, args, &dir.join(format!("{mode}.log"))).expect("python starts");
    listening(addr).await;
    Some((process, addr))
}

/// nginx with one location: its answer tells the host and the caller that it was told.
pub async fn nginx(dir: &Path) -> Option<(Process, SocketAddr)> {
    let addr = free_port();
    let answer = "nginx $host caller=$http_starling_caller consumer=$http_starling_consumer\\n";
    let process = nginx_at(dir, addr, &format!("listen {addr}; location / {{ return 200 \"{answer}\"; }}")).await?;
    Some((process, addr))
}

/// nginx with one server, as it is told, and its files in that directory: `access.log`, too. `None` skips.
pub async fn nginx_at(dir: &Path, addr: SocketAddr, server: &str) -> Option<Process> {
    let nginx = program("nginx")?;
    std::fs::create_dir_all(dir).expect("the directory can be made");
    let own = dir.display();
    let config = format!(
        r#"daemon off; master_process off; pid {own}/nginx.pid; error_log {own}/nginx.err;
events {{}}
http {{
  access_log {own}/access.log; client_max_body_size 0; client_body_temp_path {own}/t1; proxy_temp_path {own}/t2;
  fastcgi_temp_path {own}/t3; uwsgi_temp_path {own}/t4; scgi_temp_path {own}/t5;
  server {{ {server} }}
}}
"#
    );
    let path = dir.join("nginx.conf");
    std::fs::write(&path, config).expect("the directory can be written");
    let process =
        Process::start(&nginx, ["-c", &path.to_string_lossy()], &dir.join("nginx.log")).expect("nginx starts");
    listening(addr).await;
    Some(process)
}

/// dnsmasq, which knows what it is told and nothing else. `None` skips.
pub async fn name_server(dir: &Path, addr: SocketAddr, knows: impl IntoIterator<Item = String>) -> Option<Process> {
    let dnsmasq = program("dnsmasq")?;
    let fixed = [
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--no-daemon",
        "--bind-interfaces",
        "--conf-file=/dev/null",
        "--pid-file=",
    ];
    let at = [format!("--listen-address={}", addr.ip()), format!("--port={}", addr.port())];
    let args = fixed.map(String::from).into_iter().chain(at).chain(knows);
    let process = Process::start(&dnsmasq, args, &dir.join("dnsmasq.log")).expect("dnsmasq starts");
    listening(addr).await;
    Some(process)
}

/// Memory of a running process in KiB, by a line of its status: `VmRSS:` now, `VmHWM:` the most so far.
pub fn memory_kib(process: &Process, line: &str) -> u64 {
    let pid = process.pid().expect("the process runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let text = status.lines().find_map(|text| text.strip_prefix(line)).expect("the system tells it");
    text.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Waits until somebody accepts connections there.
pub async fn listening(addr: SocketAddr) {
    wait_for("the server listens", Duration::from_secs(60), || async move {
        tokio::net::TcpStream::connect(addr).await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await
    .expect("the server listens");
}

/// A GET through an outbound listener.
pub async fn call(outbound: SocketAddr, service: &str, path: &str) -> starling_chaos::Answer {
    let host = format!("{service}.mesh.internal");
    Client::plain().get(outbound, &host, path).await.expect("the outbound listener answers")
}

/// Runs `starling chaos` in a directory, which also gets what is temporary: exit code, stdout, stderr.
pub async fn chaos(dir: &Path, args: &[&str]) -> (i32, String, String) {
    chaos_with(dir, args, &[]).await
}

/// The same, with variables.
pub async fn chaos_with(dir: &Path, args: &[&str], variables: &[(&str, &str)]) -> (i32, String, String) {
    let mut command = tokio::process::Command::new(binary());
    command.arg("chaos").args(args).current_dir(dir).env("TMPDIR", dir).envs(variables.iter().copied());
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(CHAOS_LIMIT, command.output()).await.expect("it ends").expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Waits until a node knows that many instances of a service.
pub async fn is_known(cluster: &Cluster, at: &str, service: &str, instances: usize) {
    wait_for(&format!("{at} knows {service}"), Duration::from_secs(60), || async {
        let services: Vec<admin::Service> = cluster.admin(at, "/v1/services").await.map_err(|e| e.to_string())?;
        match services.iter().find(|known| known.name.as_str() == service) {
            Some(known) if known.instances.len() == instances => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .expect("a service becomes known");
}
