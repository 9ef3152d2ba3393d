//! A node's configuration: plain structs as in the TOML file, and diagnostics with lines.

mod lifecycle;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use http::HeaderMap;
use serde::{Deserialize, Deserializer, de, de::DeserializeOwned};
use starling_gossip::Profile;
use starling_protocol::{ADMIN_PORT, MESH_PORT, Name, OUTBOUND_PORT, Protocol, ServiceRecord};
use toml::de::DeTable;

pub use self::lifecycle::{Date, Link};
use crate::{HedgeSettings, LimitSettings, RepeatSettings, RetrySettings, observe::otlp};

/// Everything that a node can be told.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node itself.
    pub node: NodeConfig,
    /// Its admin API.
    pub admin: AdminConfig,
    /// Its outbound listener.
    pub outbound: OutboundConfig,
    /// What it serves.
    pub service: Vec<ServiceConfig>,
    /// Local ports that lead to a service.
    pub upstream: Vec<UpstreamConfig>,
    /// How members watch each other.
    pub gossip: GossipConfig,
    /// Where traces and metrics go.
    pub telemetry: TelemetryConfig,
}

/// `[telemetry]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Base URL of a collector that takes OTLP over HTTP, like `http://127.0.0.1:4318`. Nothing is exported if absent.
    pub otlp: Option<String>,
    /// Share of the traces that begin here which are recorded, 0 to 1. Others are recorded as their beginner said. Default 0.01.
    pub sample: f64,
    /// How often metrics are exported. Default 60 s.
    #[serde(deserialize_with = "duration")]
    pub metrics_interval: Duration,
    /// Fields that the collector wants with everything, such as an authorization.
    pub headers: BTreeMap<String, Secret>,
    /// Certificates to trust the collector by, in PEM. Default: the system's.
    pub ca: Option<PathBuf>,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { otlp: None, sample: 0.01, metrics_interval: Duration::from_secs(60), headers: BTreeMap::new(), ca: None }
    }
}

impl TelemetryConfig {
    /// How to reach the collector, if there is one; else what is wrong, by key.
    pub(crate) fn collector(&self) -> Result<Option<otlp::Settings>, (String, String)> {
        let Some(url) = &self.otlp else { return Ok(None) };
        let wrong = |key: String, why: &str| (format!("telemetry.{key}"), why.to_string());
        let address = url.parse().map_err(|why: &str| wrong("otlp".into(), why))?;
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let (name, value) =
                otlp::field(name, value.expose()).map_err(|why| wrong(format!("headers.{name}"), why))?;
            headers.insert(name, value);
        }
        Ok(Some(otlp::Settings { address, headers, ca: self.ca.clone() }))
    }
}

/// `[gossip]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GossipConfig {
    /// What kind of network the mesh spans. All nodes of a mesh should have the same.
    pub profile: Profile,
}

/// `[node]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// Name in the mesh. Default: the first label of the host name.
    pub name: Option<Name>,
    /// State directory. Needed.
    pub state: Option<PathBuf>,
    /// UDP address of the mesh port.
    pub listen: SocketAddr,
    /// Address told to others. Default: `listen`, or this host's own address when that is `0.0.0.0`.
    pub advertise: Option<SocketAddr>,
    /// Where to look for the mesh, `host:port`.
    pub seeds: Vec<String>,
    /// Join token, for the first start.
    pub token: Option<Secret>,
    /// File with the join token, for the first start.
    pub token_file: Option<PathBuf>,
    /// Where this node stands; calls prefer instances in the same zone.
    pub zone: String,
    /// Threads that carry calls. Default: as many as this process may use cores, 8 at most.
    pub workers: usize,
    /// On issuers: how long the certificates they sign are good. Default 24 h.
    #[serde(deserialize_with = "duration")]
    pub cert_ttl: Duration,
    /// How long a drain waits for calls to finish.
    #[serde(deserialize_with = "duration")]
    pub drain_timeout: Duration,
    /// How long the process before may take to finish, when this one takes over from it.
    #[serde(deserialize_with = "duration")]
    pub upgrade_timeout: Duration,
}

/// More than machines have cores that would be of use.
const MAX_WORKERS: usize = 64;
/// Workers at most, where nobody says how many: a proxy is a guest on its machine.
const MAX_USUAL_WORKERS: usize = 8;

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            name: None,
            state: None,
            listen: ([0, 0, 0, 0], MESH_PORT).into(),
            advertise: None,
            seeds: Vec::new(),
            token: None,
            token_file: None,
            zone: String::new(),
            workers: std::thread::available_parallelism().map_or(1, usize::from).min(MAX_USUAL_WORKERS),
            cert_ttl: crate::identity::authority::DEFAULT_CERT_LIFE,
            drain_timeout: Duration::from_secs(15),
            upgrade_timeout: Duration::from_secs(600),
        }
    }
}

/// A text that is not to be seen in logs.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Secret(String);

impl Secret {
    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

/// `[admin]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// TCP address; loopback only.
    pub listen: SocketAddr,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: ([127, 0, 0, 1], ADMIN_PORT).into() }
    }
}

/// `[outbound]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutboundConfig {
    /// TCP address; `None` (in TOML: no way to say so) turns it off on edges.
    pub listen: Option<SocketAddr>,
    /// Time to the head of an answer. Default 15 s; for gRPC what the caller says, or none.
    #[serde(deserialize_with = "limit")]
    pub timeout: Option<Duration>,
    /// Silence that ends a call. Default 1 h.
    #[serde(deserialize_with = "limit")]
    pub idle_timeout: Option<Duration>,
    /// Time to the end of an answer. Default: none.
    #[serde(deserialize_with = "limit")]
    pub total_timeout: Option<Duration>,
    /// Attempts at a call.
    pub retry: RetrySettings,
    /// A second copy of a call that takes long. Default: none.
    pub hedge: Option<HedgeSettings>,
}

impl Default for OutboundConfig {
    fn default() -> Self {
        Self {
            listen: Some(([127, 0, 0, 1], OUTBOUND_PORT).into()),
            timeout: None,
            idle_timeout: None,
            total_timeout: None,
            retry: RetrySettings::default(),
            hedge: None,
        }
    }
}

/// `[[service]]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// What callers ask for.
    pub name: Name,
    /// Where it listens.
    pub addr: SocketAddr,
    /// How it speaks.
    #[serde(default)]
    pub protocol: CheckedProtocol,
    /// API version of this instance.
    #[serde(default)]
    pub version: String,
    /// Since when, or from when on, that version should not be used any more.
    #[serde(default)]
    pub deprecated: Option<Date>,
    /// From when on it is gone.
    #[serde(default)]
    pub sunset: Option<Date>,
    /// Where that is explained.
    #[serde(default)]
    pub link: Option<Link>,
    /// Share of calls; 100 is normal.
    #[serde(default = "normal_weight")]
    pub weight: u16,
    /// Health check.
    #[serde(default)]
    pub health: Option<HealthConfig>,
    /// Allows an address that is not loopback, which peers could reach without the mesh.
    #[serde(default)]
    pub allow_remote: bool,
    /// Time to the head of an answer, if the caller does not wait shorter. Default: as the caller says.
    #[serde(default, deserialize_with = "limit")]
    pub timeout: Option<Duration>,
    /// Silence that ends a call. Default: as the caller has it.
    #[serde(default, deserialize_with = "limit")]
    pub idle_timeout: Option<Duration>,
    /// Time to the end of an answer. Default: none.
    #[serde(default, deserialize_with = "limit")]
    pub total_timeout: Option<Duration>,
    /// How long a connection to the service is kept for the next call. Default 4 s: some servers close after 5.
    #[serde(default = "keep_idle", deserialize_with = "duration")]
    pub keep_idle: Duration,
    /// Connections to the service at most; what comes beyond is refused at once. Default 8192.
    #[serde(default = "max_connections")]
    pub max_connections: usize,
    /// Calls to it at a time.
    #[serde(default)]
    pub limits: LimitsConfig,
}

impl ServiceConfig {
    /// Says in a record what may change while the node runs.
    pub(crate) fn tell(&self, record: &mut ServiceRecord) {
        record.version.clone_from(&self.version);
        record.weight = self.weight;
        record.deprecated = self.deprecated.map_or(0, Date::unix);
        record.sunset = self.sunset.map_or(0, Date::unix);
        record.link = self.link.as_ref().map_or_else(String::new, |link| link.as_str().to_owned());
    }

    /// A service with everything else as usual.
    pub fn new(name: Name, addr: SocketAddr) -> Self {
        Self {
            name,
            addr,
            protocol: CheckedProtocol::default(),
            version: String::new(),
            deprecated: None,
            sunset: None,
            link: None,
            weight: normal_weight(),
            health: None,
            allow_remote: false,
            timeout: None,
            idle_timeout: None,
            total_timeout: None,
            keep_idle: keep_idle(),
            max_connections: max_connections(),
            limits: LimitsConfig::default(),
        }
    }

    /// Its limits of time.
    pub fn limits(&self) -> LimitSettings {
        LimitSettings { timeout: self.timeout, idle_timeout: self.idle_timeout, total_timeout: self.total_timeout }
    }
}

/// `limits = { calls = 10000, adaptive = true, late = "500ms" }`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Calls that may wait for an answer at a time. Default 10,000.
    pub calls: usize,
    /// Whether there are fewer when even the quickest answers are late. Default: yes.
    pub adaptive: bool,
    /// Answers that come so soon are never late; others are if they take twice as long as usual. Default 500 ms.
    #[serde(deserialize_with = "duration")]
    pub late: Duration,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { calls: 10_000, adaptive: true, late: Duration::from_millis(500) }
    }
}

/// `health = { path = "/healthz", interval = "2s" }`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthConfig {
    /// Asked with GET; any status below 500 is healthy. Without it, and over TCP, a service is healthy that takes connections.
    #[serde(default)]
    pub path: Option<String>,
    /// How often.
    #[serde(default = "health_interval", deserialize_with = "duration")]
    pub interval: Duration,
}

/// `[[upstream]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamConfig {
    /// The service that the port leads to.
    pub service: Name,
    /// The local port.
    pub listen: SocketAddr,
    /// What the application speaks.
    #[serde(default)]
    pub protocol: UpstreamProtocol,
    /// Time to the head of an answer. Default 15 s; for gRPC what the caller says, or none.
    #[serde(default, deserialize_with = "limit")]
    pub timeout: Option<Duration>,
    /// Silence that ends a call. Default 1 h.
    #[serde(default, deserialize_with = "limit")]
    pub idle_timeout: Option<Duration>,
    /// Time to the end of an answer. Default: none.
    #[serde(default, deserialize_with = "limit")]
    pub total_timeout: Option<Duration>,
    /// Attempts at a call.
    #[serde(default)]
    pub retry: RetrySettings,
    /// A second copy of a call that takes long. Default: none.
    #[serde(default)]
    pub hedge: Option<HedgeSettings>,
}

impl UpstreamConfig {
    /// A port with everything else as usual.
    pub fn new(service: Name, listen: SocketAddr) -> Self {
        let protocol = UpstreamProtocol::default();
        Self {
            service,
            listen,
            protocol,
            timeout: None,
            idle_timeout: None,
            total_timeout: None,
            retry: RetrySettings::default(),
            hedge: None,
        }
    }

    /// How often a call over it may be made.
    pub fn repeats(&self) -> RepeatSettings {
        RepeatSettings { retry: self.retry, hedge: self.hedge }
    }

    /// Its limits of time.
    pub fn limits(&self) -> LimitSettings {
        LimitSettings { timeout: self.timeout, idle_timeout: self.idle_timeout, total_timeout: self.total_timeout }
    }
}

impl OutboundConfig {
    /// How often a call over it may be made.
    pub fn repeats(&self) -> RepeatSettings {
        RepeatSettings { retry: self.retry, hedge: self.hedge }
    }

    /// Its limits of time.
    pub fn limits(&self) -> LimitSettings {
        LimitSettings { timeout: self.timeout, idle_timeout: self.idle_timeout, total_timeout: self.total_timeout }
    }
}

/// What the application speaks at an upstream port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UpstreamProtocol {
    /// HTTP/1.1 and h2c, told apart by themselves.
    #[default]
    Http,
    /// Anything over TCP.
    Tcp,
    /// Anything over UDP.
    Udp,
}

impl FromStr for UpstreamProtocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "http" | "http1" | "h2c" => Ok(Self::Http),
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(format!("unknown protocol {text:?}; use http, tcp or udp")),
        }
    }
}

impl<'de> Deserialize<'de> for UpstreamProtocol {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

/// A protocol of this version; others are refused with a plain word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckedProtocol(pub Protocol);

impl<'de> Deserialize<'de> for CheckedProtocol {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map(Self).map_err(de::Error::custom)
    }
}

fn normal_weight() -> u16 {
    100
}

fn health_interval() -> Duration {
    Duration::from_secs(2)
}

/// A duration like `"10s"` or `"1h 30m"`.
pub fn duration<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(d)?;
    humantime::parse_duration(&text)
        .map_err(|e| de::Error::custom(format!("{text:?} is not a duration like \"10s\": {e}")))
}

fn keep_idle() -> Duration {
    Duration::from_secs(4)
}

fn max_connections() -> usize {
    8192
}

/// Longest limit of time: more is a slip of the pen.
const MAX_LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);
/// More often says no more.
const MIN_METRICS_INTERVAL: Duration = Duration::from_secs(1);
/// Most calls to a service at a time: a node takes no more of all.
const MAX_CALLS: usize = 10_000;
/// Most connections to a service: more than a host has ports.
const MAX_CONNECTIONS: usize = 65_536;

/// A limit of time: a duration above zero, 30 days at most.
pub fn limit<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
    let limit = duration(d)?;
    if limit.is_zero() {
        return Err(de::Error::custom("nothing could be done in no time; leave it out for the default"));
    }
    if limit > MAX_LIMIT {
        return Err(de::Error::custom("longer than 30 days; shorten it, or leave it out for the default"));
    }
    Ok(Some(limit))
}

impl Config {
    /// What is wrong with it although it parses: key path, and what to do.
    pub fn problems(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut problem = |key: String, what: String| found.push((key, what));
        if !(1..=MAX_WORKERS).contains(&self.node.workers) {
            let what = format!("from 1 to {MAX_WORKERS}; leave it out for one a core, 8 at most");
            problem("node.workers".into(), what);
        }
        if self.node.zone.len() > 64 {
            problem("node.zone".into(), "longer than 64 bytes; shorten it".into());
        }
        if self.node.advertise.is_some_and(|a| a.ip().is_unspecified() || a.port() == 0) {
            problem("node.advertise".into(), "not an address that others can dial; give this host's own".into());
        }
        for (i, seed) in self.node.seeds.iter().enumerate() {
            let port = seed.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none() {
                problem(
                    format!("node.seeds[{i}]"),
                    format!("{seed:?} is not HOST:PORT; the mesh port is {MESH_PORT} by default"),
                );
            }
        }
        if !self.admin.listen.ip().is_loopback() {
            problem(
                "admin.listen".into(),
                "the admin API is served on loopback only in this version; use 127.0.0.1".into(),
            );
        }
        for (i, service) in self.service.iter().enumerate() {
            if !service.addr.ip().is_loopback() && !service.allow_remote {
                let what = "not a loopback address, so peers could reach the service past the mesh; bind the service to \
                            127.0.0.1, or set allow_remote = true";
                problem(format!("service[{i}].addr"), what.into());
            }
            if self.service[..i].iter().any(|s| s.name == service.name) {
                problem(format!("service[{i}].name"), format!("{} is listed twice; keep one", service.name));
            }
            if !(1..=MAX_CONNECTIONS).contains(&service.max_connections) {
                problem(format!("service[{i}].max_connections"), format!("use 1 to {MAX_CONNECTIONS}"));
            }
            if !(1..=MAX_CALLS).contains(&service.limits.calls) {
                problem(format!("service[{i}].limits"), format!("use 1 to {MAX_CALLS} calls"));
            }
            if service.limits.late.is_zero() || service.limits.late > MAX_LIMIT {
                let what = "late is a time above zero, 30 days at most; adaptive = false switches it off";
                problem(format!("service[{i}].limits"), what.into());
            }
            if service.keep_idle > MAX_LIMIT {
                problem(format!("service[{i}].keep_idle"), "longer than 30 days; shorten it".into());
            }
            if service.version.len() > 32 {
                problem(format!("service[{i}].version"), "longer than 32 bytes; shorten it".into());
            }
            let has_end = service.deprecated.is_some() || service.sunset.is_some() || service.link.is_some();
            if service.version.is_empty() && has_end {
                let what = "only a version is deprecated, or gone some day: give it one";
                problem(format!("service[{i}].version"), what.into());
            }
            if let (Some(deprecated), Some(sunset)) = (service.deprecated, service.sunset)
                && sunset < deprecated
            {
                let what = "sunset is before deprecated (RFC 9745 §4); swap the dates";
                problem(format!("service[{i}].sunset"), what.into());
            }
            let is_http = matches!(service.protocol.0, Protocol::Http1 | Protocol::H2c);
            match service.health.as_ref().map(|health| health.path.as_deref()) {
                Some(_) if service.protocol.0 == Protocol::Udp => {
                    let what = "nothing tells whether a UDP service is there; leave it out";
                    problem(format!("service[{i}].health"), what.into());
                }
                Some(Some(_)) if !is_http => {
                    let what = "a service that speaks TCP has no paths; write health = {} to have it connected to";
                    problem(format!("service[{i}].health"), what.into());
                }
                Some(Some(path)) if !path.starts_with('/') => {
                    problem(format!("service[{i}].health"), "path must start with '/'".into());
                }
                _ => {}
            }
        }
        let telemetry = &self.telemetry;
        if let Err((key, what)) = telemetry.collector() {
            problem(key, what);
        }
        if !(0.0..=1.0).contains(&telemetry.sample) {
            problem("telemetry.sample".into(), "a share, from 0 to 1; 0.01 is one trace of a hundred".into());
        }
        if !(MIN_METRICS_INTERVAL..=MAX_LIMIT).contains(&telemetry.metrics_interval) {
            problem("telemetry.metrics_interval".into(), "from 1 s to 30 days; 60 s is usual".into());
        }
        if self.service.len() > starling_protocol::MAX_SERVICES {
            problem(
                "service".into(),
                format!("more than {} services; use several nodes", starling_protocol::MAX_SERVICES),
            );
        }
        found
    }
}

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Counted from 1; 0 if it belongs to no line.
    pub line: usize,
    /// What is wrong, and what to do.
    pub problem: String,
}

/// Reads a TOML file and collects *every* error: after each one, the offending line is left out and the rest read again.
pub fn read<T: DeserializeOwned>(text: &str) -> (Option<T>, Vec<Diagnostic>) {
    read_part(text, |_| true)
}

/// The same for a part of a file that others have parts in, too: the tables on top whose names are this part's own.
pub fn read_part<T: DeserializeOwned>(text: &str, is_own: impl Fn(&str) -> bool) -> (Option<T>, Vec<Diagnostic>) {
    /// A file with more errors than this is not a configuration.
    const MAX_ERRORS: usize = 50;
    let mut lines: Vec<&str> = text.lines().collect();
    let mut found: Vec<Diagnostic> = Vec::new();
    while found.len() < MAX_ERRORS {
        let joined = lines.join("\n");
        let parsed = DeTable::parse(&joined).and_then(|mut table| {
            *table.get_mut() =
                std::mem::take(table.get_mut()).into_iter().filter(|(name, _)| is_own(name.get_ref())).collect();
            T::deserialize(toml::de::Deserializer::from(table))
        });
        let error = match parsed {
            Ok(value) => return (found.is_empty().then_some(value), found),
            Err(error) => error,
        };
        let line = error.span().map_or(0, |span| joined[..span.start.min(joined.len())].matches('\n').count() + 1);
        let problem = error.message().replace('\n', " ");
        let at = line.checked_sub(1).filter(|i| lines.get(*i).is_some_and(|l| !l.trim().is_empty()));
        let is_header = |l: &str| l.trim_start().starts_with('[');
        let missing = problem.starts_with("missing field");
        if missing && found.is_empty() {
            found.push(Diagnostic { line, problem });
            return (None, found);
        }
        // A field that is missing after a line was left out is most likely that line's: leave the rest of its table out too.
        if !missing {
            // Of a wrong type the text says nothing about which key it is of.
            let key = at.and_then(|at| lines[at].split_once('=')).map(|(key, _)| key.trim());
            let is_plain =
                |key: &&str| key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
            let problem = match key.filter(is_plain).filter(|_| problem.starts_with("invalid ")) {
                Some(key) => format!("{key}: {problem}"),
                None => problem,
            };
            found.push(Diagnostic { line, problem });
        }
        let Some(at) = at.filter(|at| !missing || is_header(lines[*at])) else { return (None, found) };
        let whole_table = is_header(lines[at]);
        lines[at] = "";
        if whole_table {
            lines[at + 1..].iter_mut().take_while(|l| !is_header(l)).for_each(|l| *l = "");
        }
    }
    (None, found)
}

/// The line of a key path like `service[1].addr` in a TOML text; 0 if it is not written there.
pub fn line_of(text: &str, key: &str) -> usize {
    let mut index_wanted = None;
    let (table, field) = key.split_once('.').unwrap_or((key, ""));
    let table = match table.split_once('[') {
        Some((name, index)) => {
            index_wanted = index.trim_end_matches(']').parse::<usize>().ok();
            name
        }
        None => table,
    };
    let field = field.split(['[', '.']).next().unwrap_or_default();
    let (mut seen, mut inside, mut header_line) = (0, false, 0);
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            let name = line.trim_start_matches('[').split(']').next().unwrap_or_default().trim();
            let same = name == table;
            inside = same && index_wanted.is_none_or(|wanted| wanted == seen);
            seen += usize::from(same);
            if inside {
                header_line = i + 1;
            }
        } else if inside && line.split('=').next().is_some_and(|k| k.trim() == field) {
            return i + 1;
        }
    }
    header_line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_is_found_with_its_line() {
        let text = "[node]\nnmae = \"a\"\nlisten = \"nowhere\"\nzone = \"z\"\n\n[[service]]\nname = \"Orders\"\naddr = \"127.0.0.1:1\"\n\n[wat]\nx = 1\n";
        let (config, found) = read::<Config>(text);
        assert!(config.is_none());
        let lines: Vec<usize> = found.iter().map(|d| d.line).collect();
        for line in [2, 3, 7, 10] {
            assert!(lines.contains(&line), "line {line} in {found:?}");
        }
    }

    #[test]
    fn a_syntax_error_has_its_line() {
        let (_, found) = read::<Config>("[node]\nname = \n");
        assert_eq!(found[0].line, 2, "{found:?}");
    }

    #[test]
    fn protocols_are_named_where_they_are_not_known() {
        let upstream = |protocol: &str| {
            format!("[[upstream]]\nservice = \"db\"\nlisten = \"127.0.0.1:1\"\nprotocol = \"{protocol}\"\n")
        };
        for protocol in ["http", "http1", "h2c", "tcp", "udp"] {
            assert!(read::<Config>(&upstream(protocol)).0.is_some(), "{protocol}");
        }
        let (_, found) = read::<Config>(&upstream("sctp"));
        assert!(found[0].line == 4 && found[0].problem.contains("use http, tcp or udp"), "{found:?}");
        let (_, found) =
            read::<Config>("[[service]]\nname = \"db\"\naddr = \"127.0.0.1:1\"\nprotocol = \"postgres\"\n");
        assert!(found[0].problem.contains("use http1, h2c, tcp or udp"), "{found:?}");
    }

    #[test]
    fn health_is_asked_as_the_protocol_lets() {
        let problems = |protocol: &str, health: &str| {
            let text = format!(
                "[[service]]\nname = \"db\"\naddr = \"127.0.0.1:1\"\nprotocol = \"{protocol}\"\nhealth = {health}\n"
            );
            read::<Config>(&text).0.expect("it parses").problems().len()
        };
        for (protocol, health, wrong) in [
            ("http1", "{ path = \"/healthz\" }", 0),
            ("http1", "{}", 0),
            ("http1", "{ path = \"healthz\" }", 1),
            ("tcp", "{}", 0),
            ("tcp", "{ path = \"/healthz\" }", 1),
            ("udp", "{}", 1),
        ] {
            assert_eq!(problems(protocol, health), wrong, "{protocol} {health}");
        }
    }

    #[test]
    fn a_key_path_leads_to_its_line() {
        let text =
            "[node]\nname = \"a\"\n[[service]]\nname = \"a\"\n[[service]]\nname = \"b\"\naddr = \"10.0.0.1:1\"\n";
        assert_eq!(line_of(text, "service[1].addr"), 7);
        assert_eq!(line_of(text, "node.name"), 2);
        assert_eq!(line_of(text, "node.zone"), 1);
        let (config, _) = read::<Config>("[[service]]\nname = \"b\"\naddr = \"10.0.0.1:1\"\n");
        assert_eq!(config.unwrap().problems()[0].0, "service[0].addr");
    }

    #[test]
    fn limits_that_no_clock_and_no_host_has_are_refused() {
        let service = |more: &str| format!("[[service]]\nname = \"a\"\naddr = \"127.0.0.1:1\"\n{more}\n");
        for more in ["timeout = \"0s\"", "idle_timeout = \"40days\"", "total_timeout = \"500000000000y\""] {
            assert!(read::<Config>(&service(more)).0.is_none(), "{more}");
        }
        for more in ["max_connections = 0", "max_connections = 9000000000000000000", "keep_idle = \"40days\""] {
            let config = read::<Config>(&service(more)).0.expect(more);
            assert_eq!(config.problems().len(), 1, "{more}");
        }
    }
}
