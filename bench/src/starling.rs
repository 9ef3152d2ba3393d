//! A pair of Starling nodes: `a` takes the calls and is the mesh's issuer, `b` joins by token and serves `web`.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::http;
use crate::process::{self, Process};
use crate::scratch;
use crate::target::{START_LIMIT, Target};

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
pub(crate) fn start(
    name: &'static str,
    program: &Path,
    workers: u32,
    backend: SocketAddr,
    scratch: &Path,
) -> Result<Target> {
    let version = version(program)?;
    let dir = scratch.join(name.replace([',', ' '], "-"));
    std::fs::create_dir(&dir)?;
    let [a_listen, a_outbound, a_admin, b_listen, b_outbound, b_admin] = scratch::free_ports()?.map(loopback);
    let (a_state, b_state) = (dir.join("a"), dir.join("b"));

    init(program, &a_state)?;
    let a = Node { name: "a", workers, state: &a_state, listen: a_listen, outbound: a_outbound, admin: a_admin };
    let a = a.start(program, &dir, [])?;

    let token = token(program, &a_state, a_listen, ["--service", "web"])?;

    let b = Node { name: "b", workers, state: &b_state, listen: b_listen, outbound: b_outbound, admin: b_admin };
    let (seed, service) = (a_listen.to_string(), format!("web={backend}"));
    let b = b.start(program, &dir, ["--seed", &seed, "--token", &token, "--service", &service])?;

    let mut target = Target { name, version, entry: a_outbound, proxies: vec![a, b] };
    target.wait_for_answer()?;
    Ok(target)
}

struct Node<'a> {
    name: &'static str,
    workers: u32,
    state: &'a Path,
    listen: SocketAddr,
    outbound: SocketAddr,
    admin: SocketAddr,
}

impl Node<'_> {
    fn start<const N: usize>(self, program: &Path, dir: &Path, more: [&str; N]) -> Result<Process> {
        let addresses = [("--listen", self.listen), ("--outbound", self.outbound), ("--admin", self.admin)];
        let workers = self.workers.to_string();
        let args = ["node", "--name", self.name, "--workers", &workers, "--state"]
            .map(OsString::from)
            .into_iter()
            .chain([self.state.as_os_str().to_owned()])
            .chain(addresses.into_iter().flat_map(|(flag, address)| [flag.into(), address.to_string().into()]))
            .chain(more.map(OsString::from));
        let name = format!("starling-{}", self.name);
        let mut process = Process::start(&name, program, args, dir)?;
        let admin = self.admin;
        process::wait_until(&format!("{name} ready"), START_LIMIT, &mut [&mut process], || {
            http::get(admin, &admin.to_string(), "/readyz").map(drop)
        })?;
        Ok(process)
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

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}
