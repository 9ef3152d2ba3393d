//! What is measured: Starling or serf, and how one of its agents is started.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::view::{Protocol, View};
use crate::http;
use crate::process::{self, Process};
use crate::starling;
use crate::target::START_LIMIT;

/// How to get serf where it is missing.
pub(crate) const SERF_INSTALL: &str = "apt-get install -y serf";

/// More than any agent's own number, so that no two ports meet, and all below the ports the kernel gives out.
const MESH_PORTS: u16 = 20_000;
const ADMIN_PORTS: u16 = 22_000;
const OUTBOUND_PORTS: u16 = 24_000;
/// The most agents in one mesh.
pub(crate) const MAX_NODES: u16 = 1000;

/// How long all nodes of a prepared mesh may take to leave it.
const LEAVE_LIMIT: Duration = Duration::from_secs(60);

/// The agent that the others join through, and the issuer of a Starling mesh.
pub(crate) const SEED: u16 = 0;

/// A program that agents are made of.
pub(crate) struct System {
    /// A word for the table.
    pub(crate) name: &'static str,
    /// What the program says of its version.
    pub(crate) version: String,
    program: PathBuf,
    kind: Kind,
}

enum Kind {
    Starling,
    Serf,
}

impl System {
    /// The Starling at that path.
    pub(crate) fn starling(program: PathBuf) -> Result<Self> {
        let version = starling::version(&program)?;
        Ok(Self { name: "Starling", version, program, kind: Kind::Starling })
    }

    /// The serf at that path.
    pub(crate) fn serf(program: PathBuf) -> Result<Self> {
        let output = process::run("serf version", process::bound(&program).arg("version"))?;
        let version = format!("serf {}", output.lines().next().unwrap_or_default().trim());
        Ok(Self { name: "serf", version, program, kind: Kind::Serf })
    }

    /// Makes `dir` ready for meshes of up to so many agents, all of which keep their state there.
    ///
    /// A Starling node joins once, to have its certificate, and leaves again. serf needs nothing.
    pub(crate) fn prepare(&self, nodes: u16, dir: &Path) -> Result<()> {
        match self.kind {
            Kind::Starling => self.enrol(nodes, dir),
            Kind::Serf => Ok(()),
        }
    }

    /// Makes every agent forget whom it knew in an earlier mesh, so that it starts with the seed alone.
    pub(crate) fn forget_peers(&self, nodes: u16, dir: &Path) -> Result<()> {
        for index in 0..nodes {
            let peers = state(dir, index).join("peers.json");
            match std::fs::remove_file(&peers) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", peers.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Starts an agent and returns at once.
    pub(crate) fn start(&self, index: u16, dir: &Path) -> Result<Process> {
        self.start_with(index, dir, &[])
    }

    /// A view of that agent's members.
    pub(crate) fn view(&self, index: u16) -> View {
        let protocol = match self.kind {
            Kind::Starling => Protocol::Http,
            Kind::Serf => Protocol::Rpc,
        };
        View::new(protocol, loopback(ADMIN_PORTS, index))
    }

    fn start_with(&self, index: u16, dir: &Path, more: &[&str]) -> Result<Process> {
        let name = name(index);
        let args = match self.kind {
            Kind::Starling => starling_args(index, dir),
            Kind::Serf => serf_args(index),
        };
        Process::start(&name, &self.program, args.into_iter().chain(more.iter().map(OsString::from)), dir)
    }

    fn enrol(&self, nodes: u16, dir: &Path) -> Result<()> {
        starling::init(&self.program, &state(dir, SEED))?;
        let seed = self.start(SEED, dir)?;
        let mut processes = vec![seed];
        wait_until_ready(SEED, &mut processes[0])?;
        // Twice as many uses as needed: a node whose first try was not answered in time has used one up.
        let uses = (2 * u32::from(nodes)).to_string();
        let token = starling::token(&self.program, &state(dir, SEED), loopback(MESH_PORTS, SEED), ["--uses", &uses])?;
        for index in SEED + 1..nodes {
            processes.push(self.start_with(index, dir, &["--token", &token])?);
        }
        for (index, process) in (0..).zip(&mut processes) {
            wait_until_ready(index, process)?;
        }
        processes.iter().try_for_each(Process::terminate)?;
        let end = Instant::now() + LEAVE_LIMIT;
        for process in &mut processes {
            while process.exit()?.is_none() {
                if Instant::now() >= end {
                    bail!("{} does not leave within {} s of SIGTERM", process.name(), LEAVE_LIMIT.as_secs());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

/// The name of an agent.
pub(crate) fn name(index: u16) -> String {
    format!("n{index}")
}

fn wait_until_ready(index: u16, process: &mut Process) -> Result<()> {
    let admin = loopback(ADMIN_PORTS, index);
    process::wait_until(&format!("{} ready", name(index)), START_LIMIT, &mut [process], || {
        http::get(admin, &admin.to_string(), "/readyz").map(drop)
    })
}

/// Nothing but addresses: everything else is at its default.
fn starling_args(index: u16, dir: &Path) -> Vec<OsString> {
    let address = |ports| OsString::from(loopback(ports, index).to_string());
    let mut args: Vec<OsString> = vec!["node".into(), "--name".into(), name(index).into()];
    args.extend(["--state".into(), state(dir, index).into_os_string()]);
    args.extend(["--listen".into(), address(MESH_PORTS), "--admin".into(), address(ADMIN_PORTS)]);
    // No call is made, but the listener cannot be left out, and its default port is one for all.
    args.extend(["--outbound".into(), address(OUTBOUND_PORTS)]);
    if index != SEED {
        args.extend(["--seed".into(), loopback(MESH_PORTS, SEED).to_string().into()]);
    }
    args
}

/// The profile is serf's default, for a local network.
fn serf_args(index: u16) -> Vec<OsString> {
    let mut args = vec![
        "agent".to_owned(),
        format!("-node={}", name(index)),
        format!("-bind={}", loopback(MESH_PORTS, index)),
        format!("-rpc-addr={}", loopback(ADMIN_PORTS, index)),
        "-profile=lan".to_owned(),
        "-log-level=err".to_owned(),
    ];
    if index != SEED {
        args.push(format!("-join={}", loopback(MESH_PORTS, SEED)));
    }
    args.into_iter().map(OsString::from).collect()
}

fn state(dir: &Path, index: u16) -> PathBuf {
    dir.join(name(index))
}

fn loopback(ports: u16, index: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, ports + index))
}
