//! Commands and flags: the contract with users.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use starling_protocol::{MeshName, Name, NamePattern, is_label};

/// A service mesh and API edge without a control plane: QUIC and HTTP/3 between nodes, gossip for discovery.
#[derive(Debug, Parser)]
#[command(name = "starling", version, about, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole mesh on this machine: nodes, services and an edge
    Demo(DemoArgs),
    /// A sample service for the demo
    #[command(hide = true)]
    Sample(SampleArgs),
    /// Make a mesh: its root and its first issuer
    Init(InitArgs),
    /// Join tokens
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Run a node beside a service
    Node(Box<NodeArgs>),
    /// Run an edge: a node with public listeners
    Edge(EdgeArgs),
    /// Members as a node sees them
    Members(MembersArgs),
    /// Services by version, with their instances
    Services(ClientArgs),
    /// One node's own state
    Status(ClientArgs),
    /// Mesh documents, and which edition of them each node has
    Documents(DocumentsArgs),
    /// Round trips to a member over the mesh
    Ping(PingArgs),
    /// Give a dead member up for good: shown as left, and not called on any more
    ForceLeave(ForceLeaveArgs),
    /// A new process takes over from the running one, connections kept
    Upgrade(UpgradeArgs),
    /// Finish what is under way and leave
    Drain(ClientArgs),
    /// Leave for good: the mesh will show the node as left, not down
    Leave(ClientArgs),
    /// Names of nodes, and the keys that they belong to, as an issuer has them
    Names(NamesArgs),
    /// Certificates of an edge
    Certificates(CertificatesArgs),
    /// What a caller has used of its quotas, on one edge
    Quota {
        #[command(subcommand)]
        command: QuotaCommand,
    },
    /// API keys of an edge
    Keys {
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// Validate a configuration without running it
    Check(CheckArgs),
    /// Kill peers and cut links of a mesh of its own, and prove what held
    Chaos {
        #[command(subcommand)]
        command: ChaosCommand,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Make the calls, kill a node under load, and print ok or FAIL a line
    #[arg(long)]
    pub(crate) check: bool,
    /// How many nodes serve the sample services
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=9))]
    pub(crate) nodes: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ChaosCommand {
    /// Carry out a plan: exit 0 if all held, 1 if something did not, 2 if it cannot be told
    Run(ChaosRunArgs),
    /// The plans that come with the binary
    Plans,
    /// Print a plan's file
    Show {
        /// Name of a plan
        plan: String,
    },
    /// Say what is wrong with a plan's file
    Check {
        /// The file
        file: PathBuf,
    },
    /// Judge an old run again, by today's rules
    Judge {
        /// Directory of its report
        dir: PathBuf,
    },
    /// Compare two runs
    Diff {
        /// Directory of one report
        one: PathBuf,
        /// Directory of the other
        other: PathBuf,
    },
    /// Sabotage the runner itself, in every way it knows, and see that every verdict turns
    SelfTest(ChaosSelfTestArgs),
    /// Look for a plan that breaks the gossip, on the simulated clock: many seeds, what fails made small
    Search(ChaosSearchArgs),
    /// Keep a plan that a search has found, so that it is tried on every change
    Promote {
        /// The plan's file, as `search` has written it
        file: PathBuf,
        /// Where such plans are kept
        #[arg(long, value_name = "DIR", default_value = "chaos/plans/found")]
        to: PathBuf,
    },
    /// The service behind the nodes of a run
    #[command(hide = true)]
    Service {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        raw: Option<SocketAddr>,
        #[arg(long)]
        name: String,
        #[arg(long)]
        ledger: PathBuf,
    },
    /// Whether a lab can be set up
    #[command(hide = true)]
    LabCheck,
}

#[derive(Debug, Args)]
pub(crate) struct ChaosRunArgs {
    /// Name of a plan (see `starling chaos plans`), or a file
    pub(crate) plan: String,
    /// Where the report goes
    #[arg(long, value_name = "DIR", default_value = "chaos-report")]
    pub(crate) report: PathBuf,
    /// Where all choices come from, instead of the plan's own
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Nodes, instead of the plan's own
    #[arg(long, value_name = "N")]
    pub(crate) nodes: Option<usize>,
    /// Repeat the steps for so long
    #[arg(long, value_name = "T", value_parser = humantime::parse_duration)]
    pub(crate) duration: Option<Duration>,
    /// Where: `lab` (namespaces; root, or a system that lets users make them), `relay` (no privilege), `sim` (simulated
    /// clock, gossip only). Default: the first that works
    #[arg(long, value_name = "B")]
    pub(crate) backend: Option<BackendArg>,
    /// Run it so often, with seeds that follow
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: u32,
    /// Keep state directories and logs of all nodes in the report's directory
    #[arg(long)]
    pub(crate) keep: bool,
    /// The binary under test, instead of this one
    #[arg(long, value_name = "FILE")]
    pub(crate) binary: Option<PathBuf>,
    /// Another version of it, for plans that mix two
    #[arg(long, value_name = "FILE")]
    pub(crate) other: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ChaosSelfTestArgs {
    /// Where the reports go
    #[arg(long, value_name = "DIR", default_value = "chaos-report/self-test")]
    pub(crate) report: PathBuf,
    /// Where
    #[arg(long, value_name = "B")]
    pub(crate) backend: Option<BackendArg>,
}

#[derive(Debug, Args)]
pub(crate) struct ChaosSearchArgs {
    /// How many seeds
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) seeds: u64,
    /// The first of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) from: u64,
    /// Where plans that fail are written
    #[arg(long, value_name = "DIR", default_value = "chaos-report/search")]
    pub(crate) report: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    Lab,
    Relay,
    Sim,
}

#[derive(Debug, Args)]
pub(crate) struct SampleArgs {
    #[arg(long)]
    pub(crate) listen: SocketAddr,
    #[arg(long)]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Directory for the root and the issuer
    #[arg(long, env = "STARLING_STATE")]
    pub(crate) state: PathBuf,
    /// Name of the mesh
    #[arg(long)]
    pub(crate) mesh: MeshName,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a join token; whoever holds it can join
    Create(TokenArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// Directory of the issuer
    #[arg(long, env = "STARLING_STATE")]
    pub(crate) state: PathBuf,
    /// Service that the node may serve; may be repeated
    #[arg(long = "service", value_name = "NAME")]
    pub(crate) services: Vec<Name>,
    /// The node may be an edge
    #[arg(long)]
    pub(crate) edge: bool,
    /// The node may admit others
    #[arg(long)]
    pub(crate) issuer: bool,
    /// A name that the node may take, or the beginning of one with `*` behind it; may be repeated; any, if absent
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) names: Vec<NamePattern>,
    /// The zone that the node stands in, which it cannot change
    #[arg(long, default_value = "", hide_default_value = true, value_parser = zone)]
    pub(crate) zone: String,
    /// Where to join; may be repeated
    #[arg(long = "seed", value_name = "HOST:PORT")]
    pub(crate) seeds: Vec<String>,
    /// How long the token is good
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    pub(crate) ttl: Duration,
    /// How many nodes may join with it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) uses: u32,
}

/// Every one of these can stand in the file too; flags win over the environment, which wins over the file.
#[derive(Debug, Clone, Args)]
pub(crate) struct NodeArgs {
    /// Configuration file (TOML)
    #[arg(long, env = "STARLING_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// State directory
    #[arg(long, env = "STARLING_STATE")]
    pub(crate) state: Option<PathBuf>,
    /// Name in the mesh
    #[arg(long, env = "STARLING_NAME")]
    pub(crate) name: Option<Name>,
    /// UDP address of the mesh port
    #[arg(long, env = "STARLING_LISTEN", value_name = "IP:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Address told to others
    #[arg(long, env = "STARLING_ADVERTISE", value_name = "IP:PORT")]
    pub(crate) advertise: Option<SocketAddr>,
    /// Where to look for the mesh; may be repeated
    #[arg(long = "seed", env = "STARLING_SEED", value_name = "HOST:PORT", value_delimiter = ',')]
    pub(crate) seeds: Vec<String>,
    /// Join token, for the first start
    #[arg(long, env = "STARLING_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// File with the join token
    #[arg(long, env = "STARLING_TOKEN_FILE", value_name = "F")]
    pub(crate) token_file: Option<PathBuf>,
    /// Where this node stands
    #[arg(long, env = "STARLING_ZONE", value_name = "Z")]
    pub(crate) zone: Option<String>,
    /// A service to offer, as `NAME=IP:PORT[,version=V][,protocol=http1|h2c|tcp|udp]`; may be repeated. A version may also have
    /// `,deprecated=YYYY-MM-DD`, `,sunset=YYYY-MM-DD` and `,link=URL`
    #[arg(long = "service", value_name = "NAME=IP:PORT", value_parser = crate::commands::node::parse_service)]
    pub(crate) services: Vec<starling_node::config::ServiceConfig>,
    /// TCP address of the outbound listener
    #[arg(long, env = "STARLING_OUTBOUND", value_name = "IP:PORT")]
    pub(crate) outbound: Option<SocketAddr>,
    /// A local port that leads to a service, as `SERVICE=IP:PORT[,protocol=http|tcp|udp]`; may be repeated
    #[arg(long = "upstream", value_name = "SERVICE=IP:PORT", value_parser = crate::commands::node::parse_upstream)]
    pub(crate) upstreams: Vec<starling_node::config::UpstreamConfig>,
    /// TCP address of the admin API
    #[arg(long, env = "STARLING_ADMIN_LISTEN", value_name = "IP:PORT")]
    pub(crate) admin: Option<SocketAddr>,
    /// Threads that carry calls [default: one a core, 8 at most]
    #[arg(long, env = "STARLING_WORKERS", value_name = "N")]
    pub(crate) workers: Option<usize>,
    /// Base URL of a collector for traces and metrics (OTLP over HTTP), like `http://127.0.0.1:4318`
    #[arg(long, env = "STARLING_OTLP", value_name = "URL")]
    pub(crate) otlp: Option<String>,
    /// Take the place of the process that runs on the same state directory, without a break
    #[arg(long)]
    pub(crate) take_over: bool,
    /// Share of the traces that begin here which are recorded, 0 to 1 [default: 0.01]
    #[arg(long, env = "STARLING_SAMPLE", value_name = "SHARE")]
    pub(crate) sample: Option<f64>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct EdgeArgs {
    #[command(subcommand)]
    pub(crate) command: Option<EdgeCommand>,
    #[command(flatten)]
    pub(crate) run: RunEdgeArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EdgeCommand {
    /// Which route, version, plan and service a request would get, and why; nothing is sent
    Explain(ExplainArgs),
    /// Sign routes, plans, versions and the issuer of tokens of a file, and give them to all edges that follow the mesh
    Publish(PublishEdgeArgs),
    /// Publish again what was published before the last time
    Rollback(RollbackEdgeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PublishEdgeArgs {
    /// An edge's file; what is about one machine only stays there
    pub(crate) file: PathBuf,
    /// Directory with the mesh's admin key: where `starling init` was run
    #[arg(long, env = "STARLING_STATE")]
    pub(crate) state: PathBuf,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RollbackEdgeArgs {
    /// Directory with the mesh's admin key, from which it was published
    #[arg(long, env = "STARLING_STATE")]
    pub(crate) state: PathBuf,
    /// Which edition; the one before the last, if not given
    #[arg(long, value_name = "N")]
    pub(crate) to: Option<u64>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Method of the request
    pub(crate) method: String,
    /// Its whole URL
    pub(crate) url: String,
    /// A field of it; may be repeated
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    pub(crate) headers: Vec<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RunEdgeArgs {
    /// Configuration file (TOML)
    #[arg(long, env = "STARLING_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Join token, for the first start
    #[arg(long, env = "STARLING_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Take the place of the process that runs on the same state directory, without a break
    #[arg(long)]
    pub(crate) take_over: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UpgradeArgs {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    /// The program to run [default: the one that runs, by its path]
    #[arg(long, value_name = "FILE")]
    pub(crate) binary: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ClientArgs {
    /// The node to ask: URL or IP:PORT of its admin API, or path of its admin.sock
    #[arg(long, env = "STARLING_ADMIN", default_value = "http://127.0.0.1:7402", value_name = "URL|SOCKET")]
    pub(crate) admin: String,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Wide,
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct MembersArgs {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    /// Only members whose status matches this regular expression
    #[arg(long, value_name = "RE")]
    pub(crate) status: Option<regex::Regex>,
    /// Only members that serve this service
    #[arg(long, value_name = "NAME")]
    pub(crate) service: Option<Name>,
    /// Print again at each change
    #[arg(long, conflicts_with = "from")]
    pub(crate) watch: bool,
    /// Ask every live member how it sees the others, and show where they differ
    #[arg(long, value_name = "WHOM")]
    pub(crate) from: Option<From>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum From {
    All,
}

#[derive(Debug, Args)]
pub(crate) struct PingArgs {
    /// Name or id of the member
    pub(crate) node: String,
    /// How many pings
    #[arg(short, long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct NamesArgs {
    #[command(subcommand)]
    pub(crate) command: Option<NamesCommand>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NamesCommand {
    /// Free the name of a node that is gone for good, so that another key can have it
    Free(FreeNameArgs),
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct CertificatesArgs {
    #[command(subcommand)]
    pub(crate) command: Option<CertificatesCommand>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CertificatesCommand {
    /// Have the authority issue one now, whatever the last tries came to
    Renew(RenewArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum QuotaCommand {
    /// Show it
    Show(QuotaArgs),
    /// Let it begin anew
    Reset(QuotaArgs),
}

#[derive(Debug, Args)]
pub(crate) struct QuotaArgs {
    /// The consumer of an API key, or `jwt:` and the subject of a token
    #[arg(required_unless_present = "address")]
    pub(crate) consumer: Option<String>,
    /// The address of callers who are neither, in place of a consumer
    #[arg(long, conflicts_with = "consumer")]
    pub(crate) address: Option<std::net::IpAddr>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RenewArgs {
    /// A host of the certificate
    pub(crate) host: String,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FreeNameArgs {
    /// The name
    pub(crate) name: Name,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ForceLeaveArgs {
    /// Name or id of the member, which must be down
    pub(crate) node: String,
    /// Do not even show it any more
    #[arg(long)]
    pub(crate) prune: bool,
    /// Directory with the mesh's admin key; without it, the node that is asked must be an issuer
    #[arg(long, env = "STARLING_STATE")]
    pub(crate) state: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct DocumentsArgs {
    #[command(subcommand)]
    pub(crate) command: Option<DocumentsCommand>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DocumentsCommand {
    /// Sign a file as the next version of a document, and send it to the mesh
    Publish(PublishArgs),
    /// Delete a document, mesh-wide
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PublishArgs {
    /// What the document says
    pub(crate) file: PathBuf,
    /// How long it holds; for ever if not given
    #[arg(long, value_parser = humantime::parse_duration)]
    pub(crate) expires_in: Option<Duration>,
    #[command(flatten)]
    pub(crate) edition: EditionArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    pub(crate) edition: EditionArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EditionArgs {
    /// Which document
    #[arg(long)]
    pub(crate) kind: Name,
    /// Directory with the mesh's admin key: where `starling init` was run
    #[arg(long, env = "STARLING_STATE")]
    pub(crate) state: PathBuf,
    /// Number of this edition; the next one after what the node has, if not given
    #[arg(long, value_name = "N")]
    pub(crate) edition: Option<u64>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key; it is shown once
    Create {
        /// Whom it is for
        #[arg(long)]
        consumer: String,
        /// Plan, if not the route's
        #[arg(long)]
        plan: Option<String>,
        #[command(flatten)]
        target: KeysTarget,
    },
    /// List keys, without their secrets
    List {
        #[command(flatten)]
        target: KeysTarget,
    },
    /// Revoke a key, at once
    Revoke {
        /// Public part of the key
        id: String,
        #[command(flatten)]
        target: KeysTarget,
    },
}

/// A running edge by its admin API, the state directory of one that may be stopped, or that of the mesh's admin key: for all edges.
#[derive(Debug, Args)]
pub(crate) struct KeysTarget {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    /// State directory of the edge, instead of its admin API; or the one with the mesh's admin key, for keys that hold on all edges
    #[arg(long)]
    pub(crate) state: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The configuration file
    pub(crate) file: PathBuf,
}

fn zone(text: &str) -> Result<String, String> {
    match is_label(text) {
        true => Ok(text.into()),
        false => Err("a zone is at most 64 letters, digits and -._+/".into()),
    }
}
