//! What happened in a run, event by event: all that a verdict may look at. It is a file of JSON lines, so that an old run can
//! be judged again.

use std::{
    fs::File,
    io::{BufRead, BufReader, BufWriter, Write},
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use starling_protocol::admin::MemberStatus;

use crate::{
    plan::{Backend, DoorKind, Excuse, Fault, Misbehaviour, Plan},
    stage::Count,
};

/// How long all must agree to have recovered.
pub const STEADY: Duration = Duration::from_secs(2);
/// Name of the file in a report's directory.
pub const FILE: &str = "history.jsonl";
/// Version of the file's form.
const FORM: u32 = 1;

/// An event, and when: seconds since the run's start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Seconds since the start.
    pub at: f64,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// Something that happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The run has begun.
    Begin(Box<Begin>),
    /// A step has come to a phase.
    Phase {
        /// Which step, from 0; the calm before the first belongs to it.
        step: usize,
        /// Which phase.
        phase: Phase,
    },
    /// A fault has begun.
    Inject(Box<Injected>),
    /// A fault has ended, by the runner's hand.
    Heal {
        /// Which.
        fault: usize,
    },
    /// A sign that a fault acted, or ended.
    Sign {
        /// Which fault.
        fault: usize,
        /// Where it was looked for.
        side: Side,
        /// Whether it was found.
        found: bool,
        /// What was seen.
        what: String,
    },
    /// Every node sees every other as it is after a step, and has for a while: a suspicion that a fault has caused may still
    /// run its course after a moment in which all agreed.
    Recovered {
        /// Which step.
        step: usize,
        /// Since when, seconds since the run's start.
        since: f64,
    },
    /// A node shows another differently from before.
    View {
        /// Who looked.
        observer: String,
        /// At whom.
        subject: String,
        /// What it shows now; `None` when it shows it no more.
        status: Option<MemberStatus>,
        /// Which life of it.
        generation: u64,
    },
    /// A node's admin API does not answer, or answers again.
    Admin {
        /// Whose.
        node: String,
        /// Whether it answers.
        answers: bool,
    },
    /// A call that is over.
    Call(Call),
    /// A service has done a call.
    Done {
        /// Which call.
        nonce: u64,
        /// On which node.
        by: String,
    },
    /// A ledger is read whole; one that never is makes the run unknown.
    Ledger {
        /// Of which service process.
        of: String,
        /// Lines in it.
        lines: usize,
    },
    /// A process was started or has ended.
    Process {
        /// Node or service.
        name: String,
        /// What became of it.
        what: String,
        /// Whether the runner wanted it.
        wanted: bool,
    },
    /// A node was asked to end, and is ready again: in between, calls at its own doors are nobody's fault.
    Away {
        /// Which.
        node: String,
        /// Whether it is away.
        away: bool,
    },
    /// What a process takes of the machine.
    Sample {
        /// Node.
        node: String,
        /// Resident memory, in KiB.
        rss_kib: u64,
        /// Open file descriptors.
        descriptors: u64,
    },
    /// A line of a node's log at level WARN or above.
    Log {
        /// Node.
        node: String,
        /// The line.
        line: String,
    },
    /// What a network fault did, by directed link.
    Links {
        /// Which fault.
        fault: usize,
        /// From, to, and how many packets.
        links: Vec<(String, String, Count)>,
    },
    /// Calls that are open at a service although no client waits for them any more.
    Open {
        /// Of which service process.
        of: String,
        /// Method and path of each.
        calls: Vec<String>,
    },
    /// How far the load was behind its schedule, at most, in a second.
    Behind {
        /// Milliseconds.
        ms: f64,
    },
    /// A call of a fault's own, which must be answered with that status.
    Probe {
        /// Which fault.
        fault: usize,
        /// What it was.
        what: String,
        /// Whether it went as it must.
        good: bool,
    },
    /// What a simulation found out by itself, at each of its steps.
    Simulated {
        /// Digest of all that happened: the same for the same plan and seed.
        digest: String,
        /// Events that happened.
        events: u64,
        /// Healthy nodes that were shown as down: who, whom, when.
        false_downs: Vec<String>,
        /// An invariant that did not hold.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        broken: Option<String>,
    },
    /// The run is over.
    End {
        /// Whether all of the plan was done.
        whole: bool,
        /// Why not.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        why: Option<String>,
    },
}

/// What a run is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Begin {
    /// Version of the file's form.
    pub form: u32,
    /// Name of the plan.
    pub name: String,
    /// The plan, with what the command line changed.
    pub plan: Plan,
    /// Where it ran.
    pub backend: Backend,
    /// Faults that this backend cannot do, and why; they were left out.
    pub skipped: Vec<String>,
    /// Version of the binary.
    pub version: String,
    /// System and cores.
    pub host: String,
    /// Start, unix seconds.
    pub started: f64,
    /// How to run the same again.
    pub replay: String,
    /// All nodes and edges.
    pub nodes: Vec<String>,
    /// Those whose views are noted: all of them, or some in a very large simulation.
    pub observers: Vec<String>,
    /// Which node serves what.
    pub serving: Vec<(String, String)>,
}

/// A part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No fault: what all that follows is compared with.
    Baseline,
    /// The faults begin, and are held.
    Fault,
    /// They have ended; the mesh mends itself.
    Healing,
    /// Mended: nothing may go wrong.
    Calm,
}

/// Where a sign of a fault is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The switch's counts, the kernel's state of a process.
    Stage,
    /// What the product shows, or its clients see.
    Product,
    /// That it has ended.
    Healed,
}

/// A fault that was begun.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Injected {
    /// Its number in the run.
    pub fault: usize,
    /// Of which step.
    pub step: usize,
    /// Its name in plans.
    pub kind: String,
    /// In words.
    pub text: String,
    /// Who was hit.
    pub victims: Vec<String>,
    /// Whose views it excuses.
    pub excuse: Excuse,
    /// Whether calls at the victims' doors may fail.
    pub disables: bool,
    /// Directed links on which nothing arrives.
    pub cut: Vec<(String, String)>,
    /// Nodes whose services do not answer.
    pub mute_services: Vec<String>,
    /// Whether the victims never come back.
    pub for_good: bool,
    /// Whether it breaks nothing that the victims have begun: they are slow, or asked to end.
    pub graceful: bool,
    /// Whether a whole answer is no longer owed by calls at all: more is asked than there is room for.
    pub overload: bool,
}

/// Kinds of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CallKind {
    /// Small, idempotent.
    Get,
    /// Small, must not be done twice.
    Post,
    /// A download, each byte checked.
    Download,
    /// An upload, whose digest the service answers.
    Upload,
    /// A download that drips.
    Stream,
    /// A gRPC call with messages both ways in turn.
    Talk,
    /// A WebSocket, with messages both ways in turn.
    Socket,
    /// A TCP connection that does the same.
    Connection,
    /// UDP packets, each sent until it is answered.
    Packets,
    /// Small, idempotent, and counted by the edges for a quota, which may forbid it.
    Counted,
}

impl CallKind {
    /// Whether the mesh may and must try it again until it has an answer's head (RFC 9110 §9.2.2).
    pub fn is_idempotent(self) -> bool {
        !matches!(self, Self::Post | Self::Upload | Self::Talk | Self::Socket | Self::Connection)
    }
}

/// A call that is over.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    /// Its number, which goes along to the service.
    pub nonce: u64,
    /// What it was.
    pub kind: CallKind,
    /// Which door.
    pub door: DoorKind,
    /// Of which node.
    pub node: String,
    /// To which service.
    pub service: String,
    /// When it was due, seconds since the start.
    pub due: f64,
    /// From then to its end, in milliseconds.
    pub ms: f64,
    /// Status of the answer; 0 if there was none.
    pub status: u16,
    /// Who answered.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub by: String,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Whether a whole answer had the wrong content.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub wrong: bool,
}

impl Call {
    /// Whether it has its right answer in time.
    pub fn good(&self) -> bool {
        let is_forbidden = self.kind == CallKind::Counted && self.status == 429;
        self.error.is_none() && (matches!(self.status, 101 | 200) || is_forbidden)
    }

    /// When it was over, seconds since the start.
    pub fn over(&self) -> f64 {
        self.due + self.ms / 1e3
    }
}

/// Writes a history while it happens.
pub(crate) struct Recorder {
    start: Instant,
    state: Mutex<Recording>,
}

struct Recording {
    file: BufWriter<File>,
    entries: Vec<Entry>,
}

impl Recorder {
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let state = Recording { file: BufWriter::new(file), entries: Vec::new() };
        Ok(Self { start: Instant::now(), state: Mutex::new(state) })
    }

    pub(crate) fn start(&self) -> Instant {
        self.start
    }

    /// Seconds since the start.
    pub(crate) fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    pub(crate) fn note(&self, event: Event) {
        let entry = Entry { at: self.now(), event };
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        // A disk that is full is seen at the end: the file is read back.
        let _ = serde_json::to_writer(&mut state.file, &entry);
        let _ = state.file.write_all(b"\n");
        // What makes sense of the rest must not be lost with a runner that is killed.
        if matches!(entry.event, Event::Begin(_) | Event::Phase { .. } | Event::Inject(_) | Event::Heal { .. }) {
            let _ = state.file.flush();
        }
        state.entries.push(entry);
    }

    /// Does something with what was noted so far.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&[Entry]) -> T) -> T {
        look(&self.state.lock().unwrap_or_else(|e| e.into_inner()).entries)
    }

    /// All of it, once it is safely on disk.
    pub(crate) fn finish(&self) -> Result<History> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        state.file.flush().context("the history cannot be written whole")?;
        Ok(History { entries: state.entries.clone() })
    }
}

/// A history that is over.
#[derive(Debug, Clone)]
pub struct History {
    /// Events, in order.
    pub entries: Vec<Entry>,
}

impl History {
    /// Reads the history of a report's directory.
    ///
    /// # Errors
    /// If there is none, or a line of it is not an event.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let file = File::open(&path).with_context(|| format!("no history in {}", dir.display()))?;
        let mut entries = Vec::new();
        for (at, line) in BufReader::new(file).lines().enumerate() {
            let entry = serde_json::from_str(&line?);
            entries.push(entry.with_context(|| format!("{}:{}: not an event", path.display(), at + 1))?);
        }
        let history = Self { entries };
        if history.begin()?.form != FORM {
            bail!("{}: form {}, this version reads form {FORM}", path.display(), history.begin()?.form);
        }
        Ok(history)
    }

    /// What the run was.
    ///
    /// # Errors
    /// If its first event is missing.
    pub fn begin(&self) -> Result<&Begin> {
        match self.entries.first().map(|entry| &entry.event) {
            Some(Event::Begin(begin)) => Ok(begin),
            _ => bail!("the history does not begin with the run's beginning"),
        }
    }

    /// All calls.
    pub fn calls(&self) -> impl Iterator<Item = &Call> {
        self.entries.iter().filter_map(|entry| match &entry.event {
            Event::Call(call) => Some(call),
            _ => None,
        })
    }

    /// How long it took.
    pub fn length(&self) -> Duration {
        Duration::from_secs_f64(self.entries.last().map_or(0.0, |entry| entry.at.max(0.0)))
    }
}

impl Begin {
    /// A run of that plan, here and now.
    pub fn new(name: String, plan: &Plan, backend: Backend, replay: String) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let nodes: Vec<String> = plan.node_names().chain(plan.edge_names()).collect();
        Self {
            form: FORM,
            name,
            plan: plan.clone(),
            backend,
            skipped: plan.cannot(backend),
            version: env!("CARGO_PKG_VERSION").into(),
            host: format!("{} {}, {cores} cores", std::env::consts::OS, kernel.trim()),
            started: started.as_secs_f64(),
            replay,
            observers: nodes.clone(),
            nodes,
            serving: plan.serving(),
        }
    }
}

impl Injected {
    /// A fault that hits those victims, of all these nodes.
    pub fn new(id: usize, step: usize, fault: &Fault, victims: &[String], nodes: &[String]) -> Self {
        let is_victim = |name: &String| victims.contains(name);
        let is_cut = |from: &String, to: &String| match fault {
            Fault::Partition { .. } => is_victim(from) != is_victim(to),
            Fault::Cut { .. } => is_victim(from) && is_victim(to),
            Fault::Mute { .. } => is_victim(from),
            Fault::Deaf { .. } => is_victim(to),
            Fault::UdpBlocked { .. } | Fault::HoldBack { .. } | Fault::NatForgets { .. } => {
                is_victim(from) || is_victim(to)
            }
            _ => false,
        };
        // A simulation of thousands has no calls, for which alone it matters what is cut.
        let pairs = nodes.iter().take(MOST_CUT).flat_map(|from| nodes.iter().take(MOST_CUT).map(move |to| (from, to)));
        let cut = pairs.filter(|(from, to)| from != to && is_cut(from, to)).map(|(f, t)| (f.clone(), t.clone()));
        let odd = matches!(fault, Fault::Service { does, .. } if *does != Misbehaviour::Slow);
        Self {
            fault: id,
            step,
            kind: fault.kind().into(),
            text: fault.describe(),
            victims: victims.to_vec(),
            excuse: fault.excuse(),
            disables: fault.disables(),
            cut: cut.collect(),
            mute_services: if odd { victims.to_vec() } else { Vec::new() },
            for_good: matches!(fault, Fault::Kill { for_good: true, .. }),
            graceful: matches!(
                fault,
                Fault::Roll { .. } | Fault::Upgrade { .. } | Fault::Service { does: Misbehaviour::Slow, .. }
            ),
            overload: matches!(fault, Fault::Burst { .. }),
        }
    }
}

/// Nodes between which cuts are written down one by one.
const MOST_CUT: usize = 256;

impl History {
    /// Writes it into a report's directory.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn write(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        let mut file = BufWriter::new(File::create(dir.join(FILE))?);
        for entry in &self.entries {
            serde_json::to_writer(&mut file, entry)?;
            file.write_all(b"\n")?;
        }
        file.flush().context("the history cannot be written whole")
    }
}
