//! What a run does: a mesh, a load, and steps of faults. A plan is a TOML file; [`Plan::parse`] says what is wrong with one
//! by line.

mod fault;
mod pick;
mod problems;
mod shipped;
mod victims;

use std::{fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use self::{
    fault::{Excuse, Fault, Misbehaviour},
    problems::Problem,
    shipped::{NAMES, shipped},
    victims::{CLIENTS, Role, Victims},
};

/// A plan file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What it shows, in a sentence.
    pub about: String,
    /// Where all choices come from: victims, losses, orders.
    #[serde(default = "one")]
    pub seed: u64,
    /// Backends that it is meant for; all that can do its faults, if absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<Backend>,
    /// How long to repeat the steps; once, if absent.
    #[serde(default, with = "text::option", skip_serializing_if = "Option::is_none")]
    pub duration: Option<Duration>,
    /// The mesh.
    #[serde(default)]
    pub mesh: MeshPlan,
    /// The load.
    #[serde(default)]
    pub load: LoadPlan,
    /// Faults, one step after the other.
    #[serde(rename = "step", default)]
    pub steps: Vec<Step>,
}

fn one() -> u64 {
    1
}

/// Where a plan runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// A network namespace for each node, and a switch in user space between them.
    Lab,
    /// Loopback, with a UDP relay in front of each node.
    Relay,
    /// The gossip state machines on a simulated clock.
    Sim,
}

impl Backend {
    /// All of them, the most capable of the real ones first.
    pub const ALL: [Self; 3] = [Self::Lab, Self::Relay, Self::Sim];
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lab => "lab",
            Self::Relay => "relay",
            Self::Sim => "sim",
        })
    }
}

/// `[mesh]`: nodes `n1` to `nN`, of which the first are issuers and seeds and the last serve, and edges `e1` to `eM`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MeshPlan {
    /// Nodes, edges apart.
    pub nodes: usize,
    /// Edges.
    pub edges: usize,
    /// How many of the nodes may admit others.
    pub issuers: usize,
    /// How many of the nodes all others start from.
    pub seeds: usize,
    /// Services. The load goes to all of them in turn.
    pub services: Vec<ServicePlan>,
}

impl Default for MeshPlan {
    fn default() -> Self {
        let services = vec![
            ServicePlan { name: "orders".into(), instances: 3 },
            ServicePlan { name: "stock".into(), instances: 2 },
        ];
        Self { nodes: 5, edges: 0, issuers: 1, seeds: 1, services }
    }
}

/// A service, and how many nodes serve it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePlan {
    /// Name.
    pub name: String,
    /// Instances, each on a node of its own.
    pub instances: usize,
}

/// `[load]`: open loop. A call starts when it is due, whatever became of those before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadPlan {
    /// Calls a second, all doors together.
    pub rate: u32,
    /// A call that has no whole answer by then has failed.
    #[serde(with = "text")]
    pub deadline: Duration,
    /// Through which doors, in turn.
    pub doors: Vec<DoorKind>,
    /// What is called, by weight.
    pub mix: Mix,
    /// Size of what is downloaded and uploaded, in bytes.
    pub bulk_bytes: usize,
    /// A quota for the counted calls of all clients together, which all edges keep together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<QuotaPlan>,
    /// How long the load runs before the first fault, and after the last.
    #[serde(with = "text")]
    pub calm: Duration,
}

impl Default for LoadPlan {
    fn default() -> Self {
        Self {
            rate: 120,
            deadline: Duration::from_secs(10),
            doors: vec![DoorKind::OutboundHttp1, DoorKind::OutboundHttp2, DoorKind::Upstream],
            mix: Mix::default(),
            bulk_bytes: 256 << 10,
            quota: None,
            calm: Duration::from_secs(5),
        }
    }
}

/// A quota, and how well it has to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuotaPlan {
    /// Calls a day.
    pub calls: u64,
    /// How many more may pass, for what edges forget that are killed or cut off.
    pub over: u64,
}

/// Kinds of calls, by weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mix {
    /// Small idempotent calls.
    pub get: u32,
    /// Small calls that must not be done twice.
    pub post: u32,
    /// Downloads, each byte checked.
    pub download: u32,
    /// Uploads, whose digest the service answers.
    pub upload: u32,
    /// Downloads that drip for seconds.
    pub stream: u32,
    /// gRPC calls with messages both ways in turn, through the doors that speak HTTP/2 or 3.
    pub talk: u32,
    /// WebSockets with messages both ways in turn, through the doors that speak HTTP/1.1.
    pub socket: u32,
    /// Small calls that count for the quota, through the doors of edges.
    pub counted: u32,
}

impl Default for Mix {
    fn default() -> Self {
        Self { get: 16, post: 4, download: 1, upload: 1, stream: 0, talk: 1, socket: 1, counted: 0 }
    }
}

/// Where a call goes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DoorKind {
    /// A node's outbound listener, HTTP/1.1.
    OutboundHttp1,
    /// A node's outbound listener, HTTP/2 with prior knowledge.
    OutboundHttp2,
    /// A node's local port for the service.
    Upstream,
    /// A node's local port for TCP to the service.
    UpstreamTcp,
    /// A node's local port for UDP to the service.
    UpstreamUdp,
    /// A public listener, HTTP/1.1 over TLS.
    EdgeHttp1,
    /// A public listener, HTTP/2.
    EdgeHttp2,
    /// A public listener, HTTP/3.
    EdgeHttp3,
}

impl DoorKind {
    /// Whether messages can go both ways in one call.
    pub fn has_streams(self) -> bool {
        matches!(self, Self::OutboundHttp2 | Self::EdgeHttp2 | Self::EdgeHttp3)
    }

    /// Whether a connection can become a WebSocket.
    pub fn has_sockets(self) -> bool {
        matches!(self, Self::OutboundHttp1 | Self::Upstream | Self::EdgeHttp1)
    }

    /// What a node's local port carries for it, if it is one.
    pub fn carried_by_upstream(self) -> Option<&'static str> {
        match self {
            Self::Upstream => Some("http"),
            Self::UpstreamTcp => Some("tcp"),
            Self::UpstreamUdp => Some("udp"),
            _ => None,
        }
    }

    /// Whether it is a public listener.
    pub fn is_public(self) -> bool {
        matches!(self, Self::EdgeHttp1 | Self::EdgeHttp2 | Self::EdgeHttp3)
    }
}

impl fmt::Display for DoorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutboundHttp1 => "outbound h1",
            Self::OutboundHttp2 => "outbound h2c",
            Self::Upstream => "upstream h1",
            Self::UpstreamTcp => "upstream tcp",
            Self::UpstreamUdp => "upstream udp",
            Self::EdgeHttp1 => "edge h1",
            Self::EdgeHttp2 => "edge h2",
            Self::EdgeHttp3 => "edge h3",
        })
    }
}

/// `[[step]]`: faults that begin together, or one after the other, are held, and end together; and what must hold meanwhile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What is tried, for the report.
    pub name: String,
    /// How long the faults last.
    #[serde(with = "text")]
    pub hold: Duration,
    /// How long after the one before each of the faults begins.
    #[serde(default, with = "text", skip_serializing_if = "Duration::is_zero")]
    pub stagger: Duration,
    /// The faults.
    pub faults: Vec<Fault>,
    /// What must hold.
    #[serde(default)]
    pub expect: Expect,
}

/// `[step.expect]`: bounds. What is absent is not asked, or has the default that is written here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// Idempotent calls that may fail although an instance could be reached. Default 0.
    pub lost: usize,
    /// Until every node sees every other as it is, after the faults have ended. Default 30 s.
    #[serde(with = "text")]
    pub heal: Duration,
    /// Until the first node sees a victim as not alive; not asked if absent.
    #[serde(with = "text::option", skip_serializing_if = "Option::is_none")]
    pub detect: Option<Duration>,
    /// Until every node sees it down, or left; not asked if absent.
    #[serde(with = "text::option", skip_serializing_if = "Option::is_none")]
    pub known: Option<Duration>,
    /// How often a node may see another go down or come up. Default 2.
    pub transitions: usize,
    /// Whether calls that have nothing to do with the victims must stay fast: p99 at most 1.5 times that of the calm before,
    /// or 5 ms more, over a thousand calls each.
    pub others_fast: bool,
    /// Calls answered in the last third of the fault, as a share of those due; not asked if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goodput: Option<f64>,
    /// Resident memory that a node may grow to, in MiB. Default 256.
    pub memory_mib: u64,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            lost: 0,
            heal: Duration::from_secs(30),
            detect: None,
            known: None,
            transitions: 2,
            others_fast: false,
            goodput: None,
            memory_mib: 256,
        }
    }
}

impl Plan {
    /// Reads a plan file, and checks that it can be done at all.
    ///
    /// # Errors
    /// Everything that is wrong, each with its line.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let plan: Self = toml::from_str(text).map_err(|error| vec![Problem::of_toml(text, &error)])?;
        let problems = problems::of(&plan, text);
        if problems.is_empty() { Ok(plan) } else { Err(problems) }
    }

    /// The step of that number: in long runs they repeat.
    pub fn step(&self, number: usize) -> Option<&Step> {
        self.steps.get(number % self.steps.len().max(1))
    }

    /// Names of the nodes that are no edges.
    pub fn node_names(&self) -> impl Iterator<Item = String> {
        (1..=self.mesh.nodes).map(|n| format!("n{n}"))
    }

    /// Names of the edges.
    pub fn edge_names(&self) -> impl Iterator<Item = String> {
        (1..=self.mesh.edges).map(|n| format!("e{n}"))
    }

    /// Which node serves what: instances are dealt out from the last node backwards. The first node, which made the mesh,
    /// serves nothing.
    pub fn serving(&self) -> Vec<(String, String)> {
        let nodes: Vec<String> = self.node_names().skip(1).collect();
        let mut at = 0;
        let mut serving = Vec::new();
        for service in &self.mesh.services {
            for _ in 0..service.instances.min(nodes.len()) {
                serving.push((nodes[nodes.len() - 1 - at % nodes.len()].clone(), service.name.clone()));
                at += 1;
            }
        }
        serving
    }

    /// How long certificates are good, if a fault wants them short: that is a matter of the issuers' start.
    pub fn certificate_lifetime(&self) -> Option<Duration> {
        self.steps.iter().flat_map(|step| &step.faults).find_map(|fault| match fault {
            Fault::ShortCertificates { lifetime } => Some(*lifetime),
            _ => None,
        })
    }

    /// Whether state directories need file systems of their own.
    pub fn fills_disks(&self) -> bool {
        self.steps.iter().flat_map(|step| &step.faults).any(|fault| matches!(fault, Fault::DiskFull { .. }))
    }

    /// Why that backend cannot run it, fault by fault; empty if it can.
    pub fn cannot(&self, backend: Backend) -> Vec<String> {
        let faults = self.steps.iter().flat_map(|step| &step.faults);
        faults.filter_map(|fault| fault.cannot(backend).map(|why| format!("{}: {why}", fault.kind()))).collect()
    }
}

/// Durations as people write them: `1m 30s`, `500ms`.
pub(crate) mod text {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_duration(&text).map_err(|e| de::Error::custom(format!("{text:?} is no duration: {e}")))
    }

    pub(crate) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*duration))
    }

    pub(crate) mod option {
        use super::*;

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
            super::deserialize(from).map(Some)
        }

        pub(crate) fn serialize<S: Serializer>(duration: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
            match duration {
                Some(duration) => super::serialize(duration, to),
                None => to.serialize_none(),
            }
        }
    }
}

#[cfg(test)]
mod tests;
