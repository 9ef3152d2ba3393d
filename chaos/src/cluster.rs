use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use starling_protocol::admin::{Member, MemberStatus};

use crate::{Client, Process, free_port, starling};

/// Checks again and again until `check` says yes; the last word is part of the error.
pub async fn wait_for<F>(what: &str, limit: Duration, mut check: impl FnMut() -> F) -> Result<()>
where
    F: Future<Output = Result<(), String>>,
{
    let deadline = Instant::now() + limit;
    loop {
        match check().await {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() > deadline => bail!("{what}: not within {limit:?}: {why}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(25)).await,
        }
    }
}

/// A node to start. Addresses are chosen by the system.
#[derive(Debug, Clone, Default)]
pub struct NodeSpec {
    /// Name.
    pub name: String,
    /// As on the command line: `NAME=IP:PORT[,…]`.
    pub services: Vec<String>,
    /// More flags.
    pub flags: Vec<String>,
}

impl NodeSpec {
    /// A node without services.
    pub fn named(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// With a service.
    pub fn serving(mut self, service: impl Into<String>) -> Self {
        self.services.push(service.into());
        self
    }

    /// With another flag.
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }
}

/// A running or dead node of a cluster.
#[derive(Debug)]
pub struct Running {
    /// Mesh port.
    pub mesh: SocketAddr,
    /// Admin API.
    pub admin: SocketAddr,
    /// Outbound listener.
    pub outbound: SocketAddr,
    /// State directory.
    pub state: PathBuf,
    /// The process.
    pub process: Process,
    args: Vec<String>,
}

/// A mesh of child processes on loopback, in a directory of its own. Everything goes when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    binary: PathBuf,
    /// Before the directory, because fields are dropped in this order.
    nodes: BTreeMap<String, Running>,
    dir: tempfile::TempDir,
    seed: SocketAddr,
}

impl Cluster {
    /// Makes the mesh `demo` and its first node, `seed`, which is the issuer.
    pub async fn start(binary: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("starling-").tempdir()?;
        let seed = free_port();
        let mut cluster = Self { binary: binary.into(), dir, nodes: BTreeMap::new(), seed };
        let state = cluster.state_of("seed");
        cluster.run(&["init", "--mesh", "demo", "--state", &state.to_string_lossy()]).await?;
        cluster.spawn("seed", seed, Vec::new(), &[])?;
        cluster.ready("seed").await?;
        Ok(cluster)
    }

    /// The directory of the cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Nodes that are started or restarted from now on, and commands, run that binary: another version of it.
    pub fn switch(&mut self, binary: &Path) {
        self.binary = binary.into();
    }

    /// Mesh address of the seed.
    pub fn seed(&self) -> SocketAddr {
        self.seed
    }

    /// A node.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn node(&self, name: &str) -> &Running {
        self.nodes.get(name).unwrap_or_else(|| panic!("no node {name}"))
    }

    /// The same, to do something to its process.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn node_mut(&mut self, name: &str) -> &mut Running {
        self.nodes.get_mut(name).unwrap_or_else(|| panic!("no node {name}"))
    }

    /// Names of all nodes, dead ones included.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// Runs a command of the binary; an error if it fails. Returns stdout.
    pub async fn run(&self, args: &[&str]) -> Result<String> {
        let (status, out, err) = starling(&self.binary, args).await?;
        if !status.success() {
            bail!("starling {}: {status}: {err}", args.join(" "));
        }
        Ok(out)
    }

    /// A join token with flags such as `--service orders` or `--edge`.
    pub async fn token(&self, grants: &[&str]) -> Result<String> {
        let state = self.state_of("seed");
        let state = state.to_string_lossy();
        let seed = self.seed.to_string();
        let fixed = ["token", "create", "--state", &state, "--seed", &seed];
        Ok(self.run(&[&fixed, grants].concat()).await?.trim().to_string())
    }

    /// Starts a node, with a token that grants its services, and waits until it is ready.
    pub async fn add(&mut self, spec: &NodeSpec) -> Result<()> {
        let names: Vec<&str> = spec.services.iter().filter_map(|s| s.split('=').next()).collect();
        let grants: Vec<&str> = names.iter().flat_map(|name| ["--service", name]).collect();
        let token = self.token(&grants).await?;
        self.add_with_token(spec, &token).await
    }

    /// The same with a token that is there already.
    pub async fn add_with_token(&mut self, spec: &NodeSpec, token: &str) -> Result<()> {
        let mut args = vec!["--token".to_string(), token.to_string()];
        args.extend(spec.services.iter().flat_map(|s| ["--service".to_string(), s.clone()]));
        args.extend(spec.flags.iter().cloned());
        self.spawn(&spec.name, free_port(), args, &[self.seed])?;
        self.ready(&spec.name).await
    }

    /// Starts an edge from the public part of its file, and waits until it is ready.
    pub async fn add_edge(&mut self, name: &str, sections: &str) -> Result<()> {
        let token = self.token(&["--edge"]).await?;
        let (mesh, admin, outbound) = (free_port(), free_port(), free_port());
        let state = self.state_of(name);
        let file = self.dir.path().join(format!("{name}.toml"));
        let node = format!(
            "[node]\nname = \"{name}\"\nstate = {state:?}\nlisten = \"{mesh}\"\nseeds = [\"{}\"]\n\n[admin]\nlisten = \
             \"{admin}\"\n\n[outbound]\nlisten = \"{outbound}\"\n\n{sections}",
            self.seed
        );
        std::fs::write(&file, node)?;
        let args = vec!["edge".into(), "--config".into(), file.to_string_lossy().into_owned(), "--token".into(), token];
        let process = Process::start(&self.binary, &args, &self.log_of(name))?;
        self.nodes.insert(name.into(), Running { mesh, admin, outbound, state, process, args });
        self.ready(name).await
    }

    /// SIGKILL.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        self.nodes.get_mut(name).with_context(|| format!("no node {name}"))?.process.kill().await
    }

    /// Starts a node again, on the same addresses and state.
    pub async fn restart(&mut self, name: &str) -> Result<()> {
        let log = self.log_of(name);
        let node = self.nodes.get_mut(name).with_context(|| format!("no node {name}"))?;
        node.process = Process::start(&self.binary, &node.args, &log)?;
        self.ready(name).await
    }

    /// Starts another process of a node, which takes over from the one that runs, and waits until it has; returns the one before.
    pub async fn take_over(&mut self, name: &str) -> Result<Process> {
        let before = self.start_beside(name, &["--take-over"])?;
        let node = self.node(name);
        let pid = before.pid().context("the process before has ended")?;
        let limit = Instant::now() + Duration::from_secs(60);
        while !node.process.log().contains(&format!("\"predecessor\":{pid}")) {
            if Instant::now() > limit {
                bail!("{name} does not take over: {}", node.process.log());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(before)
    }

    /// Starts another process of a node with the same arguments and more; returns the one before, which goes on as it will.
    pub fn start_beside(&mut self, name: &str, more: &[&str]) -> Result<Process> {
        let log = self.log_of(name);
        let node = self.nodes.get_mut(name).with_context(|| format!("no node {name}"))?;
        let args = node.args.iter().map(String::as_str).chain(more.iter().copied());
        let process = Process::start(&self.binary, args, &log)?;
        Ok(std::mem::replace(&mut node.process, process))
    }

    /// Takes another process for a node's; returns the one before.
    pub fn replace(&mut self, name: &str, process: Process) -> Result<Process> {
        let node = self.nodes.get_mut(name).with_context(|| format!("no node {name}"))?;
        Ok(std::mem::replace(&mut node.process, process))
    }

    /// SIGTERM, and waits for the end of the drain.
    pub async fn terminate(&mut self, name: &str) -> Result<std::process::ExitStatus> {
        let node = self.nodes.get_mut(name).with_context(|| format!("no node {name}"))?;
        node.process.signal("TERM").await?;
        node.process.wait(Duration::from_secs(60)).await
    }

    /// `GET` on a node's admin API.
    pub async fn admin<T: DeserializeOwned>(&self, name: &str, path: &str) -> Result<T> {
        let answer = Client::plain().get(self.node(name).admin, &self.node(name).admin.to_string(), path).await?;
        serde_json::from_slice(&answer.body).with_context(|| format!("{name}{path}: {}", answer.text()))
    }

    /// Members as that node sees them.
    pub async fn members(&self, name: &str) -> Result<Vec<Member>> {
        self.admin(name, "/v1/members").await
    }

    /// Waits until `observer` sees `subject` with that status.
    pub async fn wait_status(&self, observer: &str, subject: &str, status: MemberStatus) -> Result<()> {
        wait_for(&format!("{observer} sees {subject} {status:?}"), Duration::from_secs(60), || async {
            let members = self.members(observer).await.map_err(|e| e.to_string())?;
            match members.iter().find(|m| m.name == subject) {
                Some(m) if m.status == status => Ok(()),
                other => Err(format!("{:?}", other.map(|m| m.status))),
            }
        })
        .await
    }

    /// Waits until every running node sees every other alive.
    pub async fn converge(&mut self) -> Result<()> {
        let running: Vec<String> =
            self.nodes.iter_mut().filter_map(|(name, n)| n.process.is_running().then(|| name.clone())).collect();
        for observer in &running {
            for subject in &running {
                self.wait_status(observer, subject, MemberStatus::Alive).await?;
            }
        }
        Ok(())
    }

    fn spawn(&mut self, name: &str, mesh: SocketAddr, more: Vec<String>, seeds: &[SocketAddr]) -> Result<()> {
        let (admin, outbound) = (free_port(), free_port());
        let state = self.state_of(name);
        let mut args: Vec<String> =
            ["node", "--name", name, "--state", &state.to_string_lossy()].map(String::from).into();
        let addresses = [("--listen", mesh), ("--admin", admin), ("--outbound", outbound)];
        args.extend(addresses.iter().flat_map(|(flag, addr)| [flag.to_string(), addr.to_string()]));
        args.extend(seeds.iter().flat_map(|seed| ["--seed".to_string(), seed.to_string()]));
        args.extend(more);
        let process = Process::start(&self.binary, &args, &self.log_of(name))?;
        self.nodes.insert(name.into(), Running { mesh, admin, outbound, state, process, args });
        Ok(())
    }

    async fn ready(&mut self, name: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let node = self.nodes.get_mut(name).with_context(|| format!("no node {name}"))?;
            if !node.process.is_running() {
                bail!("{name} has ended: {}", node.process.log());
            }
            let admin = node.admin;
            if Client::plain().get(admin, &admin.to_string(), "/readyz").await.is_ok_and(|a| a.status == 200) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{name} does not get ready: {}", self.node(name).process.log());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    fn state_of(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log_of(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }
}
