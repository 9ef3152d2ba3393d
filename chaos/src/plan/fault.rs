//! The faults that a plan can name.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Backend, Role, Victims, text};

/// A fault. In a plan: `{ kill = { victims = "any 1" } }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// SIGKILL. The victims are started again when the fault ends, or `back` after the kill.
    Kill {
        /// Who.
        victims: Victims,
        /// Start them again so long after the kill.
        #[serde(default, with = "text::option", skip_serializing_if = "Option::is_none")]
        back: Option<Duration>,
        /// Never start them again.
        #[serde(default)]
        for_good: bool,
    },
    /// SIGSTOP, and SIGCONT at the end.
    Pause {
        /// Who.
        victims: Victims,
    },
    /// SIGSTOP for a share of each 200 ms: a machine that has no CPU to give.
    Starve {
        /// Who.
        victims: Victims,
        /// Share of the time in which it does not run, 0 to 1.
        share: f64,
    },
    /// File descriptors taken away: the limit is lowered to what is open.
    Descriptors {
        /// Who.
        victims: Victims,
    },
    /// The file system of the state directory is full.
    DiskFull {
        /// Who.
        victims: Victims,
    },
    /// SIGKILL, a state file cut in half, and a start: what a power cut leaves behind.
    TruncatedState {
        /// Who.
        victims: Victims,
    },
    /// SIGTERM, wait for the end, start again; one after the other, again and again until the fault ends.
    Roll {
        /// Who.
        victims: Victims,
    },
    /// A new process takes over from the one that runs; one after the other, again and again until the fault ends.
    Upgrade {
        /// Who.
        victims: Victims,
    },
    /// All killed, and all started at once when the fault ends.
    Herd {
        /// Who.
        victims: Victims,
    },
    /// The victims on one side, everybody else on the other.
    Partition {
        /// Who.
        victims: Victims,
        /// Cut and mended in turn, each for so long.
        #[serde(default, with = "text::option", skip_serializing_if = "Option::is_none")]
        flip: Option<Duration>,
    },
    /// The victims do not reach each other; everybody else reaches them.
    Cut {
        /// Who; two or more.
        victims: Victims,
    },
    /// Nobody hears the victims.
    Mute {
        /// Who.
        victims: Victims,
    },
    /// The victims hear nobody.
    Deaf {
        /// Who.
        victims: Victims,
    },
    /// Packets from and to the victims get lost, in bursts (Gilbert-Elliott) if `burst` is above 1.
    Loss {
        /// Who.
        victims: Victims,
        /// Share of packets, 0 to 1.
        share: f64,
        /// Mean length of a burst, in packets.
        #[serde(default = "once")]
        burst: f64,
    },
    /// Packets from and to the victims take longer.
    Delay {
        /// Who.
        victims: Victims,
        /// How much longer, each way.
        #[serde(with = "text")]
        by: Duration,
        /// More than that by up to so much, evenly.
        #[serde(default, with = "text")]
        jitter: Duration,
    },
    /// Packets from and to the victims arrive twice.
    Duplicate {
        /// Who.
        victims: Victims,
        /// Share of packets, 0 to 1.
        share: f64,
    },
    /// Packets from and to the victims overtake others.
    Reorder {
        /// Who.
        victims: Victims,
        /// Share of packets that are held back, 0 to 1.
        share: f64,
        /// For how long.
        #[serde(with = "text")]
        by: Duration,
    },
    /// A bit of a packet's content is flipped.
    Corrupt {
        /// Who.
        victims: Victims,
        /// Share of packets, 0 to 1.
        share: f64,
    },
    /// Each directed link of the victims carries at most so much; what does not fit waits, and is dropped beyond 100 ms.
    Rate {
        /// Who.
        victims: Victims,
        /// Kilobits a second.
        kbit: u64,
    },
    /// Packets that are larger get lost without a word.
    Mtu {
        /// Who.
        victims: Victims,
        /// Largest UDP payload that passes, in bytes.
        bytes: usize,
    },
    /// Packets from and to the victims are held, and all released when the fault ends.
    HoldBack {
        /// Who.
        victims: Victims,
    },
    /// No UDP from and to the victims; TCP works.
    UdpBlocked {
        /// Who.
        victims: Victims,
    },
    /// The victims' packets come from another port, as after a NAT's restart; again every `every`.
    Rebind {
        /// Who.
        victims: Victims,
        /// How often.
        #[serde(with = "text")]
        every: Duration,
    },
    /// Nobody reaches the victims who was not called by them within `idle`: a NAT that forgets.
    NatForgets {
        /// Who.
        victims: Victims,
        /// For how long it remembers.
        #[serde(with = "text")]
        idle: Duration,
    },
    /// Victims in pairs are killed and started again, each at the address of the other.
    SwappedAddresses {
        /// Who; two.
        victims: Victims,
    },
    /// The state directory is put back as it was before the fault, and the node started with it.
    RestoredState {
        /// Who.
        victims: Victims,
    },
    /// A copy of the victim, state directory and all, runs at another address meanwhile.
    Clone {
        /// Who.
        victims: Victims,
    },
    /// The victims' local services misbehave.
    Service {
        /// Nodes whose services it is.
        victims: Victims,
        /// How.
        does: Misbehaviour,
    },
    /// So many times the load.
    Burst {
        /// Factor.
        times: u32,
        /// Meanwhile each call keeps its service busy for so long.
        #[serde(default, with = "text", skip_serializing_if = "Duration::is_zero")]
        work: Duration,
    },
    /// Clients that open a call at the victims' doors and never move on.
    Stuck {
        /// Nodes at whose doors they stand.
        victims: Victims,
        /// How many in all.
        clients: usize,
    },
    /// Certificates of the victims are renewed again and again: they are good for `lifetime` only.
    ShortCertificates {
        /// How long a certificate is good.
        #[serde(with = "text")]
        lifetime: Duration,
    },
    /// The edges' file and public certificates are written anew and loaded, every `every`.
    Reload {
        /// Which edges.
        victims: Victims,
        /// How often.
        #[serde(with = "text")]
        every: Duration,
    },
    /// An API key is revoked at the edges; calls with it must be refused.
    KeyRevoked {
        /// Which edges.
        victims: Victims,
    },
    /// Strangers at the victims' mesh ports: without a certificate, with one of another mesh, and with noise. In the simulation:
    /// records and documents that nobody of the mesh has signed.
    Strangers {
        /// Whose ports.
        victims: Victims,
    },
    /// The victims' clocks are wrong.
    Clock {
        /// Who.
        victims: Victims,
        /// By how much.
        #[serde(with = "text")]
        ahead: Duration,
    },
    /// The victims run the other binary (`--other`) until the fault ends.
    OtherVersion {
        /// Who.
        victims: Victims,
    },
}

fn once() -> f64 {
    1.0
}

/// How a service misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Misbehaviour {
    /// Its process is killed; it comes back when the fault ends.
    Crash,
    /// Takes calls, and never answers.
    Hang,
    /// Answers 500 to one call in a hundred.
    Stumble,
    /// Closes each connection after an answer, without saying so.
    CloseIdle,
    /// Answers before it has read the request's body.
    AnswerEarly,
    /// Takes 200 ms more than usual.
    Slow,
}

/// What a fault needs of its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Real processes.
    Processes,
    /// Real processes, and the runner between them and everybody.
    Network,
    /// Only what gossip is about.
    Gossip,
    /// A clock of each node's own.
    Clocks,
    /// A network in which TCP is cut as well.
    AllPackets,
    /// A file system of its own for each state directory.
    FileSystems,
}

/// Whose views the fault excuses, when they show somebody down who lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Excuse {
    /// Nobody's.
    Nobody,
    /// The victims', and everybody's of the victims.
    Victims,
    /// The victims' of the others, and the others' of the victims.
    Across,
}

/// Loss up to which nobody may be shown as down.
pub(crate) const TOLERABLE_LOSS: f64 = 0.1;

impl Fault {
    /// Its name in plans.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kill { .. } => "kill",
            Self::Pause { .. } => "pause",
            Self::Starve { .. } => "starve",
            Self::Descriptors { .. } => "descriptors",
            Self::DiskFull { .. } => "disk-full",
            Self::TruncatedState { .. } => "truncated-state",
            Self::Roll { .. } => "roll",
            Self::Upgrade { .. } => "upgrade",
            Self::Herd { .. } => "herd",
            Self::Partition { .. } => "partition",
            Self::Cut { .. } => "cut",
            Self::Mute { .. } => "mute",
            Self::Deaf { .. } => "deaf",
            Self::Loss { .. } => "loss",
            Self::Delay { .. } => "delay",
            Self::Duplicate { .. } => "duplicate",
            Self::Reorder { .. } => "reorder",
            Self::Corrupt { .. } => "corrupt",
            Self::Rate { .. } => "rate",
            Self::Mtu { .. } => "mtu",
            Self::HoldBack { .. } => "hold-back",
            Self::UdpBlocked { .. } => "udp-blocked",
            Self::Rebind { .. } => "rebind",
            Self::NatForgets { .. } => "nat-forgets",
            Self::SwappedAddresses { .. } => "swapped-addresses",
            Self::RestoredState { .. } => "restored-state",
            Self::Clone { .. } => "clone",
            Self::Service { .. } => "service",
            Self::Burst { .. } => "burst",
            Self::Stuck { .. } => "stuck",
            Self::ShortCertificates { .. } => "short-certificates",
            Self::Reload { .. } => "reload",
            Self::KeyRevoked { .. } => "key-revoked",
            Self::Strangers { .. } => "strangers",
            Self::Clock { .. } => "clock",
            Self::OtherVersion { .. } => "other-version",
        }
    }

    /// Who is hit; `None` for the whole mesh.
    pub fn victims(&self) -> Option<&Victims> {
        match self {
            Self::Kill { victims, .. }
            | Self::Pause { victims }
            | Self::Starve { victims, .. }
            | Self::Descriptors { victims }
            | Self::DiskFull { victims }
            | Self::TruncatedState { victims }
            | Self::Roll { victims }
            | Self::Upgrade { victims }
            | Self::Herd { victims }
            | Self::Partition { victims, .. }
            | Self::Cut { victims }
            | Self::Mute { victims }
            | Self::Deaf { victims }
            | Self::Loss { victims, .. }
            | Self::Delay { victims, .. }
            | Self::Duplicate { victims, .. }
            | Self::Reorder { victims, .. }
            | Self::Corrupt { victims, .. }
            | Self::Rate { victims, .. }
            | Self::Mtu { victims, .. }
            | Self::HoldBack { victims }
            | Self::UdpBlocked { victims }
            | Self::Rebind { victims, .. }
            | Self::NatForgets { victims, .. }
            | Self::SwappedAddresses { victims }
            | Self::RestoredState { victims }
            | Self::Clone { victims }
            | Self::Service { victims, .. }
            | Self::Stuck { victims, .. }
            | Self::Reload { victims, .. }
            | Self::KeyRevoked { victims }
            | Self::Strangers { victims }
            | Self::Clock { victims, .. }
            | Self::OtherVersion { victims } => Some(victims),
            Self::Burst { .. } | Self::ShortCertificates { .. } => None,
        }
    }

    /// What it needs.
    pub fn needs(&self) -> Needs {
        match self {
            Self::Kill { .. }
            | Self::Pause { .. }
            | Self::Partition { .. }
            | Self::Cut { .. }
            | Self::Mute { .. }
            | Self::Deaf { .. }
            | Self::Loss { .. }
            | Self::Delay { .. }
            | Self::Duplicate { .. }
            | Self::Strangers { .. }
            | Self::Herd { .. } => Needs::Gossip,
            Self::Reorder { .. }
            | Self::Corrupt { .. }
            | Self::Rate { .. }
            | Self::Mtu { .. }
            | Self::HoldBack { .. }
            | Self::Rebind { .. }
            | Self::NatForgets { .. } => Needs::Network,
            Self::UdpBlocked { .. } => Needs::AllPackets,
            Self::Clock { .. } => Needs::Clocks,
            Self::DiskFull { .. } => Needs::FileSystems,
            _ => Needs::Processes,
        }
    }

    /// Whether it worsens links that still carry something: what uses them must bear it.
    pub fn is_of_links(&self) -> bool {
        matches!(
            self,
            Self::Loss { .. }
                | Self::Delay { .. }
                | Self::Duplicate { .. }
                | Self::Reorder { .. }
                | Self::Corrupt { .. }
                | Self::Rate { .. }
                | Self::Rebind { .. }
        )
    }

    /// Why that backend cannot do it.
    pub fn cannot(&self, backend: Backend) -> Option<&'static str> {
        let of_clients = self.victims().is_some_and(|victims| victims.role == Role::Clients);
        if of_clients && backend != Backend::Lab {
            return Some("only the lab has the links of the clients in its hands");
        }
        match (self.needs(), backend) {
            (Needs::Clocks, Backend::Lab | Backend::Relay) => Some("all processes of a machine share its clock"),
            (Needs::AllPackets, Backend::Relay) => {
                Some("the relay sees no TCP, so it cannot show that TCP still works")
            }
            (Needs::FileSystems, Backend::Relay) => Some("a file system of its own needs the right to mount one"),
            (Needs::Processes | Needs::FileSystems, Backend::Sim) => {
                Some("the simulation has no processes, services and files")
            }
            (Needs::Network | Needs::AllPackets, Backend::Sim) => Some("the simulation has no bytes and ports"),
            _ => None,
        }
    }

    /// Whose views it excuses.
    pub fn excuse(&self) -> Excuse {
        match self {
            Self::Partition { .. } => Excuse::Across,
            Self::Cut { .. }
            | Self::Delay { .. }
            | Self::Duplicate { .. }
            | Self::Reorder { .. }
            | Self::Service { .. }
            | Self::Burst { .. }
            | Self::Stuck { .. }
            | Self::Reload { .. }
            | Self::KeyRevoked { .. }
            | Self::Strangers { .. }
            | Self::DiskFull { .. }
            | Self::Roll { .. }
            | Self::Upgrade { .. }
            | Self::Rebind { .. }
            | Self::ShortCertificates { .. } => Excuse::Nobody,
            Self::Loss { share, .. } | Self::Corrupt { share, .. } if *share <= TOLERABLE_LOSS => Excuse::Nobody,
            _ => Excuse::Victims,
        }
    }

    /// Whether it stops the victims from taking part, so that calls at their doors may fail.
    pub fn disables(&self) -> bool {
        matches!(
            self,
            Self::Kill { .. }
                | Self::Pause { .. }
                | Self::Starve { .. }
                | Self::Descriptors { .. }
                | Self::TruncatedState { .. }
                | Self::Herd { .. }
                | Self::SwappedAddresses { .. }
                | Self::RestoredState { .. }
                | Self::OtherVersion { .. }
        )
    }

    /// The fault in words, with its figures.
    pub fn describe(&self) -> String {
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        let long = |d: &Duration| humantime::format_duration(*d).to_string();
        match self {
            Self::Kill { back: Some(back), .. } => format!("kill -9, back after {}", long(back)),
            Self::Kill { for_good: true, .. } => "kill -9 for good".into(),
            Self::Kill { .. } => "kill -9".into(),
            Self::Pause { .. } => "SIGSTOP".into(),
            Self::Starve { share, .. } => format!("no CPU for {} of the time", percent(*share)),
            Self::Descriptors { .. } => "no more file descriptors".into(),
            Self::DiskFull { .. } => "disk full".into(),
            Self::TruncatedState { .. } => "kill -9, a state file cut in half".into(),
            Self::Roll { .. } => "rolling restart".into(),
            Self::Upgrade { .. } => "taken over by new processes".into(),
            Self::Herd { .. } => "all killed, all started at once".into(),
            Self::Partition { flip: Some(flip), .. } => format!("partition on and off every {}", long(flip)),
            Self::Partition { .. } => "partition".into(),
            Self::Cut { .. } => "links between them cut".into(),
            Self::Mute { .. } => "nobody hears it".into(),
            Self::Deaf { .. } => "it hears nobody".into(),
            Self::Loss { share, burst, .. } if *burst > 1.0 => {
                format!("{} loss in bursts of {burst:.0}", percent(*share))
            }
            Self::Loss { share, .. } => format!("{} loss", percent(*share)),
            Self::Delay { by, jitter, .. } if jitter.is_zero() => format!("{} later", long(by)),
            Self::Delay { by, jitter, .. } => format!("{} later, jitter {}", long(by), long(jitter)),
            Self::Duplicate { share, .. } => format!("{} duplicated", percent(*share)),
            Self::Reorder { share, .. } => format!("{} out of order", percent(*share)),
            Self::Corrupt { share, .. } => format!("{} corrupted", percent(*share)),
            Self::Rate { kbit, .. } => format!("{kbit} kbit/s a link"),
            Self::Mtu { bytes, .. } => format!("packets above {bytes} bytes vanish"),
            Self::HoldBack { .. } => "packets held, then released at once".into(),
            Self::UdpBlocked { .. } => "UDP blocked, TCP works".into(),
            Self::Rebind { every, .. } => format!("another source port every {}", long(every)),
            Self::NatForgets { idle, .. } => format!("a NAT that forgets after {}", long(idle)),
            Self::SwappedAddresses { .. } => "addresses swapped".into(),
            Self::RestoredState { .. } => "an old state directory restored".into(),
            Self::Clone { .. } => "a clone with the same state".into(),
            Self::Service { does, .. } => match does {
                Misbehaviour::Crash => "its service crashes".into(),
                Misbehaviour::Hang => "its service hangs".into(),
                Misbehaviour::Stumble => "its service answers a 500 now and then".into(),
                Misbehaviour::CloseIdle => "its service closes idle connections".into(),
                Misbehaviour::AnswerEarly => "its service answers early".into(),
                Misbehaviour::Slow => "its service is slow".into(),
            },
            Self::Burst { times, .. } => format!("{times} times the load"),
            Self::Stuck { clients, .. } => format!("{clients} clients that never move"),
            Self::ShortCertificates { lifetime, .. } => format!("certificates good for {}", long(lifetime)),
            Self::Reload { every, .. } => format!("file and certificates loaded anew every {}", long(every)),
            Self::KeyRevoked { .. } => "an API key revoked".into(),
            Self::Strangers { .. } => "strangers at the mesh port".into(),
            Self::Clock { ahead, .. } => format!("clock {} ahead", long(ahead)),
            Self::OtherVersion { .. } => "the other version".into(),
        }
    }
}
