//! The mesh of a run: nodes, edges and their services, as processes at their places.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use crate::{
    Client, Process,
    history::{Event, Recorder},
    load::Door,
    plan::{CLIENTS, DoorKind, Plan},
    stage::{Place, Slot, Stage},
};

/// Path and plan of what edges count.
pub(crate) const COUNTED: &str = "counted";
const AUTHORITY: &str = "edge-authority.pem";
/// Name of the public host.
const HOST: &str = "api.chaos.localhost";
/// How long a process may take until it is ready.
const READY: Duration = Duration::from_secs(90);
const ADMIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Doors stand at so many nodes at most: a connection each costs more than it shows.
const MOST_DOORS: usize = 8;

/// A service process beside a node.
pub(crate) struct Served {
    pub(crate) service: String,
    pub(crate) addr: SocketAddr,
    /// Where it takes what is no HTTP.
    raw: SocketAddr,
    pub(crate) ledger: PathBuf,
    pub(crate) process: Process,
}

/// A node or an edge.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) slot: Slot,
    pub(crate) place: Place,
    pub(crate) admin: SocketAddr,
    pub(crate) outbound: SocketAddr,
    /// Local ports by kind and service.
    pub(crate) upstreams: BTreeMap<(DoorKind, String), SocketAddr>,
    /// Its public address, and the key that calls go in with.
    pub(crate) public: Option<(SocketAddr, String)>,
    pub(crate) state: PathBuf,
    pub(crate) binary: PathBuf,
    pub(crate) process: Option<Process>,
    pub(crate) services: Vec<Served>,
    /// Flags that stay the same from start to start, and the join token for the first.
    args: Vec<String>,
    pub(crate) token: Option<String>,
    lifetime: Option<Duration>,
}

impl Node {
    /// Process id, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.as_ref().and_then(Process::pid)
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// What it has logged, over all its lives.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.state.with_extension("log")).unwrap_or_default()
    }

    pub(crate) fn is_edge(&self) -> bool {
        self.public.is_some()
    }
}

/// All processes of a run. They end when it is dropped.
pub(crate) struct Mesh {
    pub(crate) nodes: Vec<Node>,
    pub(crate) stage: Stage,
    pub(crate) dir: PathBuf,
    binary: PathBuf,
    recorder: Arc<Recorder>,
}

impl Mesh {
    /// Starts all of it, and waits until every node is ready.
    pub(crate) async fn start(
        plan: &Plan,
        stage: Stage,
        dir: &Path,
        binary: &Path,
        recorder: Arc<Recorder>,
    ) -> Result<Self> {
        let mut mesh = Self { nodes: Vec::new(), stage, dir: dir.into(), binary: binary.into(), recorder };
        let lifetime = plan.certificate_lifetime();
        for (slot, name) in plan.node_names().chain(plan.edge_names()).enumerate() {
            let node = mesh.cast(plan, slot, name, lifetime).await?;
            mesh.nodes.push(node);
        }
        let first = mesh.state("n1");
        mesh.command(&["init", "--mesh", "chaos", "--state", &first]).await?;
        mesh.spawn(0).await?;
        mesh.ready(0).await?;
        for at in 1..mesh.nodes.len() {
            mesh.admit(plan, at).await?;
            mesh.spawn(at).await?;
        }
        for at in 1..mesh.nodes.len() {
            mesh.ready(at).await?;
        }
        for at in 0..mesh.nodes.len() {
            if mesh.nodes[at].is_edge() {
                let key = mesh.key(at, "load").await?;
                if let Some((_, kept)) = &mut mesh.nodes[at].public {
                    *kept = key;
                }
            }
        }
        Ok(mesh)
    }

    fn state(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    /// Decides on a node's addresses, and starts its services.
    async fn cast(&self, plan: &Plan, slot: Slot, name: String, lifetime: Option<Duration>) -> Result<Node> {
        let place = self.stage.place(slot);
        let is_edge = plan.edge_names().any(|edge| edge == name);
        let mesh = self.stage.mesh(slot);
        let (outbound, admin) = (self.stage.local(7401), self.stage.local(7402));
        let state = self.dir.join(&name);
        if plan.fills_disks() && slot > 0 && matches!(place, Place::Namespace(_)) {
            mount_small(&state).await?;
        }
        let mut args: Vec<String> = Vec::new();
        let mut flag = |flag: &str, value: String| args.extend([flag.to_string(), value]);
        flag("--name", name.clone());
        flag("--state", state.to_string_lossy().into_owned());
        flag("--admin", admin.to_string());
        flag("--outbound", outbound.to_string());
        let seeds = (0..plan.mesh.seeds).filter(|seed| *seed != slot).map(|seed| self.stage.mesh(seed).advertise);
        let seeds: Vec<String> = seeds.map(|addr| addr.to_string()).collect();
        let mut upstreams = BTreeMap::new();
        let mut services = Vec::new();
        for (at, service) in plan.mesh.services.iter().enumerate() {
            let doors = plan.load.doors.iter().filter(|_| !is_edge);
            for (nth, (kind, carried)) in
                doors.filter_map(|kind| Some((*kind, kind.carried_by_upstream()?))).enumerate()
            {
                let addr = self.stage.local(9100 + (nth * plan.mesh.services.len() + at) as u16);
                flag("--upstream", format!("{}={addr},protocol={carried}", carried_name(&service.name, carried)));
                upstreams.insert((kind, service.name.clone()), addr);
            }
            if plan.serving().contains(&(name.clone(), service.name.clone())) {
                let addr = self.stage.local(8080 + at as u16);
                // Some are spoken to in HTTP/2, as gRPC's are.
                let protocol = if slot.is_multiple_of(2) { "http1" } else { "h2c" };
                flag("--service", format!("{}={addr},protocol={protocol}", service.name));
                let raw = self.stage.local(8180 + at as u16);
                for carried in raw_of(plan) {
                    let name = carried_name(&service.name, carried);
                    flag("--service", format!("{name}={raw},protocol={carried}"));
                }
                services.push(self.serve(&name, &service.name, (addr, raw), &place)?);
            }
        }
        let public = match is_edge {
            true => Some((self.stage.public(slot, 8443), String::new())),
            false => None,
        };
        if let Some((addr, _)) = &public {
            let (listen, advertise) = (mesh.listen, mesh.advertise);
            let sections = self.public_sections(plan, *addr)?;
            let file = format!(
                "[node]\nname = \"{name}\"\nstate = {state:?}\nlisten = \"{listen}\"\nadvertise = \"{advertise}\"\nseeds = \
                 {seeds:?}\n\n[admin]\nlisten = \"{admin}\"\n\n[outbound]\nlisten = \"{outbound}\"\n\n{sections}"
            );
            std::fs::write(state.with_extension("toml"), file)?;
            args = vec!["--config".into(), state.with_extension("toml").to_string_lossy().into_owned()];
        } else {
            args.extend(seeds.into_iter().flat_map(|seed| ["--seed".to_string(), seed]));
        }
        Ok(Node {
            name,
            slot,
            place,
            admin,
            outbound,
            upstreams,
            public,
            state,
            binary: self.binary.clone(),
            process: None,
            services,
            args,
            token: None,
            lifetime,
        })
    }

    /// Starts a service process.
    fn serve(&self, node: &str, service: &str, (addr, raw): (SocketAddr, SocketAddr), place: &Place) -> Result<Served> {
        let ledger = self.dir.join(format!("{node}-{service}.ledger"));
        let log = self.dir.join(format!("{node}-{service}.log"));
        let (http, other) = (addr.to_string(), raw.to_string());
        let args =
            ["chaos", "service", "--listen", &http, "--raw", &other, "--name", node, "--ledger"].map(String::from);
        let args: Vec<String> = args.into_iter().chain([ledger.to_string_lossy().into_owned()]).collect();
        // Not the binary under test: the service must stay the same when that one changes.
        let binary = std::env::current_exe()?;
        let process = place.within(move || Process::start_listening(&binary, args, &log))?;
        Ok(Served { service: service.into(), addr, raw, ledger, process })
    }

    /// Starts a service process again.
    pub(crate) fn serve_again(&mut self, at: usize) -> Result<()> {
        for which in 0..self.nodes[at].services.len() {
            let node = &self.nodes[at];
            let old = &node.services[which];
            let served = self.serve(&node.name, &old.service, (old.addr, old.raw), &node.place)?;
            self.nodes[at].services[which] = served;
        }
        Ok(())
    }

    /// The public part of an edge's file.
    fn public_sections(&self, plan: &Plan, addr: SocketAddr) -> Result<String> {
        let (cert, key) = (self.dir.join("edge.pem"), self.dir.join("edge.key"));
        if !cert.exists() {
            self.write_public_certificate()?;
        }
        let mut sections = format!(
            "[edge]\nlisten = \"{addr}\"\n\n[[certificate]]\nhosts = [\"{HOST}\"]\ncert = {cert:?}\nkey = {key:?}\n\n"
        );
        for service in &plan.mesh.services {
            let name = &service.name;
            sections.push_str(&format!(
                "[[route]]\nhost = \"{HOST}\"\npath = \"/{name}\"\nservice = \"{name}\"\nstrip_prefix = true\nauth = \
                 [\"api-key\"]\nplan = \"load\"\ntimeout = \"30s\"\n\n"
            ));
        }
        sections.push_str("[[plan]]\nname = \"load\"\nrate = \"100000/s\"\nburst = 100000\n");
        if let (Some(quota), Some(service)) = (plan.load.quota, plan.mesh.services.first()) {
            let (calls, service) = (quota.calls, &service.name);
            sections.push_str(&format!(
                "[[route]]\nhost = \"{HOST}\"\npath = \"/{COUNTED}\"\nservice = \"{service}\"\nstrip_prefix = true\nauth = \
                 []\nplan = \"{COUNTED}\"\ntimeout = \"30s\"\n\n[[plan]]\nname = \"{COUNTED}\"\nquota = \"{calls}/day\"\n"
            ));
        }
        Ok(sections)
    }

    /// A new certificate for the edges, of an authority that stays the same.
    pub(crate) fn write_public_certificate(&self) -> Result<()> {
        let (authority, secret) = (self.dir.join(AUTHORITY), self.dir.join("edge-authority.key"));
        if !authority.exists() {
            let mut params = rcgen::CertificateParams::default();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let key = rcgen::KeyPair::generate()?;
            std::fs::write(&authority, params.self_signed(&key)?.pem())?;
            std::fs::write(&secret, key.serialize_pem())?;
        }
        let key = rcgen::KeyPair::from_pem(&std::fs::read_to_string(&secret)?)?;
        let issuer = rcgen::Issuer::from_ca_cert_pem(&std::fs::read_to_string(&authority)?, key)?;
        let own = rcgen::KeyPair::generate()?;
        let certificate = rcgen::CertificateParams::new(vec![HOST.to_string()])?.signed_by(&own, &issuer)?;
        // The key first: an edge that loads in between finds two that do not fit, and keeps what it has.
        std::fs::write(self.dir.join("edge.key"), own.serialize_pem())?;
        std::fs::write(self.dir.join("edge.pem"), certificate.pem())?;
        Ok(())
    }

    /// Gives a node a join token that grants what it needs.
    async fn admit(&mut self, plan: &Plan, at: usize) -> Result<()> {
        let node = &self.nodes[at];
        let names = |served: &Served| {
            let raw = raw_of(plan).map(|carried| carried_name(&served.service, carried)).collect::<Vec<_>>();
            [vec![served.service.clone()], raw].concat()
        };
        let names: Vec<String> = node.services.iter().flat_map(names).collect();
        let mut grants: Vec<&str> = names.iter().flat_map(|name| ["--service", name]).collect();
        if node.is_edge() {
            grants.push("--edge");
        }
        if at < plan.mesh.issuers {
            grants.push("--issuer");
        }
        let token = self.token(&grants).await?;
        self.nodes[at].token = Some(token);
        Ok(())
    }

    /// A join token that grants so much.
    pub(crate) async fn token(&self, grants: &[&str]) -> Result<String> {
        let (seed, state) = (self.stage.mesh(0).advertise.to_string(), self.state("n1"));
        let mut args = vec!["token", "create", "--state", &state, "--seed", &seed];
        args.extend(grants);
        Ok(self.command(&args).await?.trim().to_string())
    }

    /// A new API key of an edge.
    pub(crate) async fn key(&self, at: usize, consumer: &str) -> Result<String> {
        let admin = format!("http://{}", self.nodes[at].admin);
        let args = ["keys", "create", "--consumer", consumer, "--plan", "load", "--admin", &admin];
        Ok(self.command_at(at, &args).await?.trim().to_string())
    }

    /// Runs a command of the binary on the host; an error if it fails.
    async fn command(&self, args: &[&str]) -> Result<String> {
        run_at(&Place::Host, &self.binary, args).await
    }

    /// The same where a node is.
    pub(crate) async fn command_at(&self, at: usize, args: &[&str]) -> Result<String> {
        run_at(&self.nodes[at].place, &self.nodes[at].binary, args).await
    }

    /// The flags of a node's process: its addresses can have changed since the last start.
    fn args(&self, at: usize) -> Vec<String> {
        let node = &self.nodes[at];
        let mut args = vec![if node.is_edge() { "edge" } else { "node" }.to_string()];
        args.extend(node.args.iter().cloned());
        if !node.is_edge() {
            let mesh = self.stage.mesh(node.slot);
            args.extend(["--listen".into(), mesh.listen.to_string(), "--advertise".into(), mesh.advertise.to_string()]);
        }
        if let Some(lifetime) = node.lifetime {
            let file = node.state.with_extension("toml");
            let text = format!("[node]\ncert_ttl = \"{}s\"\n", lifetime.as_secs());
            if !node.is_edge() && std::fs::write(&file, text).is_ok() {
                args.extend(["--config".into(), file.to_string_lossy().into_owned()]);
            }
        }
        if let Some(token) = &node.token {
            args.extend(["--token".into(), token.clone()]);
        }
        args
    }

    /// Starts a node's process, with a log line of its own.
    pub(crate) async fn spawn(&mut self, at: usize) -> Result<()> {
        let args = self.args(at);
        let node = &mut self.nodes[at];
        let (binary, log) = (node.binary.clone(), node.state.with_extension("log"));
        node.process = Some(node.place.within(move || Process::start(&binary, args, &log))?);
        self.stage.runs(node.slot, node.pid().unwrap_or_default());
        let (name, what) = (node.name.clone(), format!("started, pid {}", node.pid().unwrap_or_default()));
        self.recorder.note(Event::Process { name, what, wanted: true });
        Ok(())
    }

    /// Starts another process of a node, which takes over from the one that runs, and waits until it has; returns the one before.
    pub(crate) async fn take_over(&mut self, at: usize) -> Result<Process> {
        let before = self.nodes[at].process.take().context("the node does not run")?;
        let pid = before.pid().context("the node has ended")?;
        let mut args = self.args(at);
        args.push("--take-over".into());
        let node = &mut self.nodes[at];
        let (binary, log) = (node.binary.clone(), node.state.with_extension("log"));
        node.process = Some(node.place.within(move || Process::start(&binary, args, &log))?);
        self.stage.runs(node.slot, node.pid().unwrap_or_default());
        let (name, what) = (node.name.clone(), format!("started to take over, pid {}", node.pid().unwrap_or_default()));
        self.recorder.note(Event::Process { name, what, wanted: true });
        let deadline = Instant::now() + READY;
        loop {
            let node = &mut self.nodes[at];
            if node.log().contains(&format!("\"predecessor\":{pid}")) {
                return Ok(before);
            }
            if !node.is_running() || Instant::now() > deadline {
                bail!("{} does not take over; the end of its log:\n{}", node.name, tail(&node.log()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until a node is ready.
    pub(crate) async fn ready(&mut self, at: usize) -> Result<()> {
        let deadline = Instant::now() + READY;
        loop {
            let node = &mut self.nodes[at];
            if !node.is_running() {
                bail!("{} has ended; the end of its log:\n{}", node.name, tail(&node.log()));
            }
            let ready = get(&node.place, node.admin, "/readyz").await.is_ok_and(|(status, _)| status == 200);
            if ready {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} does not get ready; the end of its log:\n{}", node.name, tail(&node.log()));
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// SIGKILL, noted as wanted.
    pub(crate) async fn kill(&mut self, at: usize) -> Result<()> {
        let node = &mut self.nodes[at];
        let Some(mut process) = node.process.take() else { return Ok(()) };
        process.kill().await?;
        let how = process.ended().map(|status| status.to_string()).unwrap_or_default();
        let name = node.name.clone();
        self.recorder.note(Event::Process { name, what: format!("killed: {how}"), wanted: true });
        Ok(())
    }

    /// Doors of the load.
    pub(crate) fn doors(&self, plan: &Plan) -> Result<Vec<Door>> {
        let mut doors = Vec::new();
        let clients = self.stage.place(self.nodes.len());
        for node in self.nodes.iter().filter(|n| !n.is_edge()).take(MOST_DOORS) {
            for kind in &plan.load.doors {
                match kind {
                    DoorKind::OutboundHttp1 | DoorKind::OutboundHttp2 => {
                        doors.push(Door::new(*kind, &node.name, node.outbound, node.place.clone()));
                    }
                    DoorKind::Upstream | DoorKind::UpstreamTcp | DoorKind::UpstreamUdp => {
                        for ((_, service), addr) in node.upstreams.iter().filter(|((of, _), _)| of == kind) {
                            let mut door = Door::new(*kind, &node.name, *addr, node.place.clone());
                            door.only = Some(service.clone());
                            doors.push(door);
                        }
                    }
                    _ => {}
                }
            }
        }
        for node in &self.nodes {
            let Some((addr, key)) = &node.public else { continue };
            for kind in plan.load.doors.iter().filter(|kind| kind.is_public()) {
                doors.push(self.public_door(*kind, &node.name, *addr, key, &clients)?);
            }
        }
        Ok(doors)
    }

    /// A door of an edge, for calls with that key.
    pub(crate) fn public_door(
        &self,
        kind: DoorKind,
        node: &str,
        addr: SocketAddr,
        key: &str,
        from: &Place,
    ) -> Result<Door> {
        let mut door = Door::new(kind, node, addr, from.clone());
        door.host = Some(HOST.into());
        door.headers.insert(header::HeaderName::from_static("x-api-key"), key.parse()?);
        door.tls = Some(Arc::new(Client::trusting(&self.dir.join(AUTHORITY))?.tls(b"")?));
        Ok(door)
    }

    /// `GET` on a node's admin API.
    pub(crate) async fn admin(&self, at: usize, path: &str) -> Result<Bytes> {
        let node = &self.nodes[at];
        let (status, body) = get(&node.place, node.admin, path).await?;
        if status != 200 {
            bail!("{path}: {status}");
        }
        Ok(body)
    }

    /// The binary under test.
    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }

    /// Where somebody is on the stage: a node, or the clients, who come after all nodes.
    pub(crate) fn slot(&self, name: &str) -> Option<Slot> {
        match name {
            CLIENTS => Some(self.nodes.len()),
            name => self.nodes.iter().find(|node| node.name == name).map(|node| node.slot),
        }
    }

    pub(crate) fn at(&self, name: &str) -> Result<usize> {
        self.nodes.iter().position(|node| node.name == name).with_context(|| format!("no node {name}"))
    }
}

/// What the services of a plan carry beside HTTP.
fn raw_of(plan: &Plan) -> impl Iterator<Item = &'static str> {
    plan.load.doors.iter().filter_map(|kind| kind.carried_by_upstream()).filter(|carried| *carried != "http")
}

/// What a service is called in the mesh that carries that.
fn carried_name(service: &str, carried: &str) -> String {
    if carried == "http" { service.into() } else { format!("{service}-{carried}") }
}

/// A file system of its own for a state directory. It goes with the lab's mount namespace.
async fn mount_small(state: &Path) -> Result<()> {
    std::fs::create_dir_all(state)?;
    let mut mount = tokio::process::Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=4m,mode=700", "starling-chaos"]).arg(state);
    let output = mount.output().await.context("cannot run `mount`")?;
    if !output.status.success() {
        bail!("cannot mount a file system for a state directory: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// `GET` from a place, within the admin API's time: status and body.
pub(crate) async fn get(from: &Place, addr: SocketAddr, path: &str) -> Result<(u16, Bytes)> {
    let asked = async {
        let stream = from.connect(addr).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let driving = tokio::spawn(connection);
        let request = Request::builder().uri(path).header(header::HOST, addr.to_string());
        let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        driving.abort();
        Ok((status, body))
    };
    tokio::time::timeout(ADMIN_TIMEOUT, asked).await.map_err(|_| anyhow!("no answer in time"))?
}

async fn run_at(place: &Place, binary: &Path, args: &[&str]) -> Result<String> {
    let mut command = tokio::process::Command::new(binary);
    command.args(args).stdin(std::process::Stdio::null()).kill_on_drop(true);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = place.within(move || command.spawn()).context("cannot run the binary")?;
    let output = tokio::time::timeout(READY, child.wait_with_output()).await.context("the command does not end")??;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("starling {}: {}: {}", args.join(" "), output.status, error.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
