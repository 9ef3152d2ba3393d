//! Meshes of Starling nodes, of which one takes the calls and the others serve `web`; an edge in front of a node; and a
//! tunnel from one node to another.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::certificates::Certificates;
use crate::http;
use crate::process::{self, Process};
use crate::scratch::{self, loopback};
use crate::target::{HOST, PUBLIC_HOST, START_LIMIT, Target};
use crate::template;

const EDGE: &str = include_str!("../starling/edge.toml");

/// `release/starling` in the target directory that this program was built into.
pub(crate) fn default_path() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own path")?;
    let target = own.ancestors().nth(2).context("this program is not in a target directory")?;
    Ok(target.join("release/starling"))
}

/// What the program says of its version; an error that names the remedy if there is no such program.
pub(crate) fn version(program: &Path) -> Result<String> {
    ensure!(
        program.is_file(),
        "no Starling at {}: build it with `cargo build --release`, or name it with --starling PATH",
        program.display()
    );
    Ok(run(program, "--version", ["--version"])?.trim().to_owned())
}

/// Makes a mesh of two nodes, with so many workers each, and waits until a call through them is answered.
pub(crate) fn start_pair(
    name: &'static str,
    program: &Path,
    workers: u32,
    backend: u16,
    scratch: &Path,
) -> Result<Target> {
    let dir = scratch.join(name.replace([',', ' '], "-"));
    std::fs::create_dir(&dir)?;
    start_mesh(name, program, Shape { workers, peers: 1 }, backend, &dir)
}

/// How large a mesh is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Workers of each node.
    pub(crate) workers: u32,
    /// Nodes that serve `web`, beside the one that takes the calls.
    pub(crate) peers: usize,
}

/// Makes a mesh in `dir` in which one node takes the calls and the others serve `web`, and waits until that node has
/// called each of them. The target's first proxy is the one that takes the calls.
pub(crate) fn start_mesh(name: &'static str, program: &Path, shape: Shape, backend: u16, dir: &Path) -> Result<Target> {
    let version = version(program)?;
    let nodes = Node::many(1 + shape.peers, shape.workers, dir)?;
    let (caller, peers) = nodes.split_first().context("a mesh without nodes")?;
    init(program, &caller.state)?;
    let mut caller_process = caller.start(program, dir, &[])?;
    caller.wait_until_ready(&mut caller_process)?;
    let mut processes = vec![caller_process];
    let seed = loopback(caller.listen);
    for peer in peers {
        // A service that it alone has leads to this peer and no other.
        let own = peer.own_service();
        let token = token(program, &caller.state, seed, ["--service", "web", "--service", &own, "--uses", "2"])?;
        let services = [format!("web=127.0.0.1:{backend}"), format!("{own}=127.0.0.1:{backend}")];
        let seed = seed.to_string();
        let flags = ["--seed", &seed, "--token", &token, "--service", &services[0], "--service", &services[1]];
        processes.push(peer.start(program, dir, &flags)?);
    }
    for (peer, process) in peers.iter().zip(&mut processes[1..]) {
        peer.wait_until_ready(process)?;
    }
    let entry = loopback(caller.outbound);
    let hop = nodes.iter().map(|node| node.listen).collect();
    let mut target = Target { name, version, entry, hop, proxies: processes };
    for peer in peers {
        target.wait_for_answer_at(entry, &format!("{}.mesh.internal", peer.own_service()))?;
    }
    target.wait_for_answer()?;
    Ok(target)
}

/// Makes a mesh of two nodes, with one worker each, that carries TCP to `server`, and waits until it does.
pub(crate) fn start_tunnel(program: &Path, server: SocketAddr, scratch: &Path) -> Result<Target> {
    let version = version(program)?;
    let dir = scratch.join("starling-tunnel");
    std::fs::create_dir(&dir)?;
    let nodes = Node::many(2, 1, &dir)?;
    let [near, far] = &nodes[..] else { unreachable!("two were asked for") };
    let [entry] = scratch::free_ports()?.map(loopback);
    init(program, &near.state)?;
    let upstream = format!("stream={entry},protocol=tcp");
    let mut near_process = near.start(program, &dir, &["--upstream", &upstream])?;
    near.wait_until_ready(&mut near_process)?;
    let seed = loopback(near.listen);
    let token = token(program, &near.state, seed, ["--service", "stream"])?;
    let (seed, service) = (seed.to_string(), format!("stream={server},protocol=tcp"));
    let mut far_process = far.start(program, &dir, &["--seed", &seed, "--token", &token, "--service", &service])?;
    far.wait_until_ready(&mut far_process)?;
    let hop = nodes.iter().map(|node| node.listen).collect();
    let mut target = Target { name: "Starling", version, entry, hop, proxies: vec![near_process, far_process] };
    target.wait_for_echo()?;
    Ok(target)
}

/// What an edge looks at before it passes a call on.
#[derive(Clone, Copy)]
pub(crate) enum Rules {
    /// A key and a rate.
    KeyAndRate,
    /// Nothing.
    None,
    /// A key, a rate and a quota, which is kept on disk.
    KeyRateAndQuota,
    /// Nothing; and there are a thousand routes.
    ThousandRoutes,
}

impl Rules {
    fn sections(self) -> String {
        let (auth, plan) = match self {
            Self::None | Self::ThousandRoutes => ("", ""),
            Self::KeyAndRate | Self::KeyRateAndQuota => ("\"api-key\"", "plan = \"bench\""),
        };
        let quota = if let Self::KeyRateAndQuota = self { "quota = \"1000000000/day\"" } else { "" };
        let route = |path: &str, plan: &str| {
            format!(
                "[[route]]\nhost = \"{PUBLIC_HOST}\"\npath = \"{path}\"\nservice = \"web\"\nauth = [{auth}]\n{plan}\n"
            )
        };
        let more = if let Self::ThousandRoutes = self { 999 } else { 0 };
        let others: String = (0..more).map(|n| route(&format!("/api/v1/things-{n}"), "")).collect();
        let plans = format!("[[plan]]\nname = \"bench\"\nrate = \"1000000/s\"\n{quota}\n");
        [route("/", plan), others, plans].concat()
    }
}

/// Starts an edge and a node that serves `web`, which is the mesh's issuer too, and waits until the edge can call it.
///
/// Also gives the field that every call to the edge has to carry.
pub(crate) fn start_edge(
    name: &'static str,
    program: &Path,
    rules: Rules,
    backend: u16,
    certificates: &Certificates,
    scratch: &Path,
) -> Result<(Target, String)> {
    let version = version(program)?;
    let dir = scratch.join(format!("edge-{}", rules as u8));
    std::fs::create_dir(&dir)?;
    let nodes = Node::many(2, 1, &dir)?;
    let [node, edge] = &nodes[..] else { unreachable!("two were asked for") };
    let [public] = scratch::free_ports()?;
    init(program, &node.state)?;
    let mut node_process = node.start(program, &dir, &["--service", &format!("web=127.0.0.1:{backend}")])?;
    node.wait_until_ready(&mut node_process)?;
    let token = token(program, &node.state, loopback(node.listen), ["--edge"])?;
    let (state, certs) = (edge.state.display().to_string(), certificates.dir());
    let rules = rules.sections();
    let values: [(&str, &dyn ToString); 8] = [
        ("rules", &rules),
        ("state", &state),
        ("mesh_port", &edge.listen),
        ("seed_port", &node.listen),
        ("admin_port", &edge.admin),
        ("outbound_port", &edge.outbound),
        ("listen_port", &public),
        ("certs", &certs),
    ];
    let config = template::write(&dir, "edge.toml", EDGE, &values)?;
    // The shell becomes the edge. The access log stays on and goes where nothing has to keep it.
    let script = r#"exec "$0" edge --config "$1" --token "$2" >/dev/null"#;
    let args = ["-c".as_ref(), script.as_ref(), program.as_os_str(), config.as_os_str(), token.as_ref()];
    let mut edge_process = Process::start("starling-edge", Path::new("sh"), args, &dir)?;
    edge.wait_until_ready(&mut edge_process)?;
    let admin = format!("http://{}", loopback(edge.admin));
    let printed = run(program, "keys create", ["keys", "create", "--consumer", "bench", "--admin", &admin])?;
    let key = printed.split_whitespace().find(|word| word.starts_with("sk_")).map(str::to_owned);
    let key = key.with_context(|| format!("starling keys create printed no key: {printed:?}"))?;
    let mut target =
        Target { name, version, entry: loopback(public), hop: Vec::new(), proxies: vec![edge_process, node_process] };
    target.wait_for_answer_at(loopback(edge.outbound), HOST)?;
    Ok((target, format!("x-api-key: {key}")))
}

/// Where a node is.
struct Node {
    name: String,
    workers: u32,
    state: PathBuf,
    listen: u16,
    outbound: u16,
    admin: u16,
}

impl Node {
    /// So many of them, whose state will be in `dir`; they are called `a`, `b`, …
    fn many(count: usize, workers: u32, dir: &Path) -> Result<Vec<Self>> {
        let ports = scratch::many_free_ports(3 * count)?;
        let node = |(index, ports): (usize, &[u16])| {
            let name = if index == 0 { "a".to_owned() } else { format!("b{index}") };
            Self { state: dir.join(&name), name, workers, listen: ports[0], outbound: ports[1], admin: ports[2] }
        };
        Ok(ports.chunks(3).enumerate().map(node).collect())
    }

    fn own_service(&self) -> String {
        format!("web-{}", self.name)
    }

    fn start(&self, program: &Path, dir: &Path, more: &[&str]) -> Result<Process> {
        let addresses = [("--listen", self.listen), ("--outbound", self.outbound), ("--admin", self.admin)];
        let workers = self.workers.to_string();
        let args = ["node", "--name", &self.name, "--workers", &workers, "--state"]
            .map(OsString::from)
            .into_iter()
            .chain([self.state.as_os_str().to_owned()])
            .chain(addresses.into_iter().flat_map(|(flag, port)| [flag.into(), loopback(port).to_string().into()]))
            .chain(more.iter().map(OsString::from));
        Process::start(&format!("starling-{}", self.name), program, args, dir)
    }

    fn wait_until_ready(&self, process: &mut Process) -> Result<()> {
        let admin = loopback(self.admin);
        process::wait_until(&format!("{} ready", self.name), START_LIMIT, &mut [process], || {
            http::get(admin, &admin.to_string(), "/readyz").map(drop)
        })
    }
}

/// Makes a mesh, whose issuer is the node with this state.
pub(crate) fn init(program: &Path, state: &Path) -> Result<()> {
    let args = ["init".as_ref(), "--mesh".as_ref(), "bench".as_ref(), "--state".as_ref(), state.as_os_str()];
    run(program, "init", args).map(drop)
}

/// A token from the issuer with this state, which answers at `seed`.
pub(crate) fn token<const N: usize>(
    program: &Path,
    state: &Path,
    seed: SocketAddr,
    grant: [&str; N],
) -> Result<String> {
    let seed = seed.to_string();
    let args = ["token", "create", "--seed", &seed].into_iter().chain(grant).chain(["--state"]).map(OsString::from);
    let token = run(program, "token create", args.chain([state.into()]))?.trim().to_owned();
    ensure!(token.starts_with("stl1."), "starling token create printed {token:?}, not a token");
    Ok(token)
}

fn run<A: Into<OsString>>(program: &Path, what: &str, args: impl IntoIterator<Item = A>) -> Result<String> {
    let mut command: Command = process::bound(program);
    command.args(args.into_iter().map(Into::into));
    process::run(&format!("starling {what}"), &mut command)
}
