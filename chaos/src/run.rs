//! A run: a plan, carried out. Baseline, then for each step: the faults begin, are held, end; the mesh mends; calm.

mod active;
mod litter;
mod mesh;
mod observer;
mod probes;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rand::{SeedableRng, rngs::StdRng};
use starling_protocol::admin::MemberStatus;
use tokio_util::sync::CancellationToken;

pub use self::litter::sweep;
pub(crate) use self::mesh::COUNTED;
use self::{
    active::{Active, Hands},
    mesh::Mesh,
    observer::Observers,
};
use crate::{
    history::{Begin, Event, History, Injected, Phase, Recorder, STEADY, Side},
    load::Calls,
    plan::{Backend, Fault, Plan, Step},
    stage::{Lab, Stage},
};

/// How often the runner looks whether something is to be done.
const TICK: Duration = Duration::from_millis(40);
/// How often processes are measured.
const SAMPLE: Duration = Duration::from_secs(1);
/// Longer than a step may need to mend: then the run goes on, and the step has failed.
const HEAL_BEYOND: Duration = Duration::from_secs(20);
/// How long it takes until everybody has noticed that somebody is gone, generously.
const NOTICED: Duration = Duration::from_secs(10);
/// How long the word that a client has gone may take to its service.
const GONE: Duration = Duration::from_secs(2);
/// How many times as long as a process stood still it may take besides, where a client of HTTP/3 went meanwhile without a word: answers
/// that came meanwhile look like a slow line, and a connection is given up after three times what an answer may take (RFC 9000 §10.1).
const AFTER_STILL: u32 = 5;
/// Until all nodes see all others after the start.
const CONVERGED: Duration = Duration::from_secs(120);

/// A run that somebody asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the plan.
    pub name: String,
    /// The plan.
    pub plan: Plan,
    /// Where.
    pub backend: Backend,
    /// The binary under test.
    pub binary: PathBuf,
    /// Another version of it.
    pub other: Option<PathBuf>,
    /// Where the report goes.
    pub report: PathBuf,
    /// Whether the nodes' state and logs are kept beside it.
    pub keep: bool,
    /// How to run the same again.
    pub replay: String,
    /// What is wrong with the runner itself, to see that it is noticed.
    pub sabotage: Sabotage,
}

/// A runner that does not do what it says. Every verdict must turn with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// None.
    #[default]
    None,
    /// The switch lets everything pass.
    Switch,
    /// A ledger is lost.
    LedgerLost,
    /// A ledger says that a call was done twice.
    LedgerTwice,
    /// An admin API shows a healthy node as down.
    Admin,
    /// The clients' clock jumps.
    Clock,
    /// The load stops in the middle.
    Load,
}

/// Says what is going on, while it is.
pub trait Progress: Send + Sync {
    /// A line that stays.
    fn say(&self, line: &str);
    /// How far it is, once a second.
    fn now(&self, line: &str);
}

/// Whether a lab can be set up here, by whoever asks.
///
/// # Errors
/// Why not, and what to do.
pub fn check_lab() -> Result<(), String> {
    Lab::check()
}

/// Runs a plan, and writes its history into the report's directory. Cancelled, it mends what it broke, cleans up, and the
/// history says that it is not whole.
///
/// # Errors
/// If it cannot even begin: a binary that does not start, a directory that cannot be written.
pub async fn run(options: &Options, progress: &dyn Progress, stop: &CancellationToken) -> Result<History> {
    std::fs::create_dir_all(&options.report).with_context(|| format!("cannot make {}", options.report.display()))?;
    let dir = litter::Dir::new(options.keep.then(|| options.report.join("nodes")))?;
    let recorder = Arc::new(Recorder::new(&options.report)?);
    let plan = &options.plan;
    let nodes = plan.mesh.nodes + plan.mesh.edges;
    recorder.note(Event::Begin(Box::new(Begin::new(
        options.name.clone(),
        plan,
        options.backend,
        options.replay.clone(),
    ))));
    for why in plan.cannot(options.backend) {
        progress.say(&format!("skipped: {why}"));
    }
    progress.say(&format!("{} on {}: {nodes} nodes, seed {}", options.name, options.backend, plan.seed));
    let stage = Stage::new(options.backend, nodes, plan.seed)?;
    stage.table().disarmed = options.sabotage == Sabotage::Switch;
    let mesh = tokio::select! {
        mesh = Mesh::start(plan, stage, dir.path(), &options.binary, recorder.clone()) => mesh?,
        () = stop.cancelled() => bail!("stopped before the mesh was up"),
    };
    let observers = Observers::start(&mesh, &recorder);
    let mut run = Run {
        options,
        progress,
        doing: "baseline".into(),
        mesh,
        observers,
        recorder: recorder.clone(),
        active: Vec::new(),
        gone: BTreeSet::new(),
        hits: BTreeMap::new(),
        faults: 0,
        sampled: Instant::now(),
    };
    run.converged().await?;
    progress.say(&format!("the mesh is up after {:.1} s", recorder.now()));
    let doors = run.mesh.doors(plan)?;
    let services = plan.mesh.services.iter().map(|s| s.name.clone()).collect();
    let skew = if options.sabotage == Sabotage::Clock { -3.0 } else { 0.0 };
    let load = Calls::start(&plan.load, doors, services, plan.seed, recorder.clone(), skew);
    let done = run.steps(&load, stop).await;
    // Whatever happened: nothing stays broken.
    run.mend(&load).await;
    load.stop().await;
    run.finish(options.sabotage).await;
    let (whole, why) = match done {
        Ok(()) => (true, None),
        Err(error) => (false, Some(format!("{error:#}"))),
    };
    recorder.note(Event::End { whole, why });
    drop(run);
    recorder.finish()
}

struct Run<'a> {
    options: &'a Options,
    progress: &'a dyn Progress,
    /// What is being done.
    doing: String,
    mesh: Mesh,
    observers: Observers,
    recorder: Arc<Recorder>,
    active: Vec<Active>,
    /// Nodes that never come back.
    gone: BTreeSet<String>,
    /// How often each node was hit.
    hits: BTreeMap<String, usize>,
    faults: usize,
    sampled: Instant,
}

impl Run<'_> {
    async fn steps(&mut self, load: &Calls, stop: &CancellationToken) -> Result<()> {
        let plan = &self.options.plan;
        let mut rng = StdRng::seed_from_u64(plan.seed);
        let begun = Instant::now();
        self.phase(0, Phase::Baseline);
        if self.options.sabotage == Sabotage::Admin {
            self.observers.lie_about("n2");
        }
        self.wait(plan.load.calm, stop).await?;
        let mut number = 0;
        loop {
            for step in &plan.steps {
                if self.options.sabotage == Sabotage::Load && number == 1 {
                    load.pause();
                }
                let line = self.step(number, step, load, &mut rng, stop).await?;
                let at = self.recorder.now();
                self.progress.say(&format!("{at:6.1} s  {}: {line}", step.name));
                number += 1;
                if plan.duration.is_some_and(|limit| begun.elapsed() >= limit) {
                    return Ok(());
                }
            }
            if plan.duration.is_none() {
                return Ok(());
            }
        }
    }

    async fn step(
        &mut self,
        number: usize,
        step: &Step,
        load: &Calls,
        rng: &mut StdRng,
        stop: &CancellationToken,
    ) -> Result<String> {
        self.phase(number, Phase::Fault);
        let mut said = Vec::new();
        let mut taken = Vec::new();
        for fault in &step.faults {
            if fault.cannot(self.options.backend).is_some() {
                continue;
            }
            let victims = match fault.victims() {
                Some(victims) => victims.pick(&self.options.plan, &self.gone, &taken, &mut self.hits, rng)?,
                None => Vec::new(),
            };
            taken.extend(victims.iter().cloned());
            if !said.is_empty() {
                self.hold(Instant::now() + step.stagger, load, stop).await?;
            }
            self.inject(number, fault, victims.clone(), step.hold, load).await?;
            let who = if victims.len() > 4 { format!("{} nodes", victims.len()) } else { victims.join(", ") };
            said.push(format!("{} {who}", fault.describe()).trim().to_string());
        }
        if said.is_empty() {
            return Ok("nothing that this backend can do".into());
        }
        let until = Instant::now() + step.hold;
        self.hold(until, load, stop).await?;
        self.signs(load, stop).await?;
        self.open_calls().await;
        self.phase(number, Phase::Healing);
        let mended = Instant::now();
        self.end_faults(load).await?;
        let healed = self.healed(step.expect.heal + HEAL_BEYOND, stop).await?;
        let ended = self.recorder.now() - mended.elapsed().as_secs_f64();
        if let Some(since) = healed {
            self.recorder.note(Event::Recovered { step: number, since });
        }
        self.phase(number, Phase::Calm);
        self.wait(self.options.plan.load.calm, stop).await?;
        let how = match healed {
            Some(since) => format!("healed in {:.1} s", (since - ended).max(0.0)),
            None => "NOT healed".into(),
        };
        Ok(format!("{}; {how}", said.join(" + ")))
    }

    fn phase(&mut self, step: usize, phase: Phase) {
        let plan = &self.options.plan;
        let name = plan.step(step).map_or("", |step| &step.name);
        let what = format!("{phase:?}").to_lowercase();
        self.doing = format!("step {} of {}, {name}: {what}", step + 1, plan.steps.len());
        self.recorder.note(Event::Phase { step, phase });
    }

    async fn inject(
        &mut self,
        step: usize,
        fault: &Fault,
        victims: Vec<String>,
        hold: Duration,
        load: &Calls,
    ) -> Result<()> {
        let id = self.faults;
        self.faults += 1;
        let nodes: Vec<String> = self.mesh.nodes.iter().map(|node| node.name.clone()).collect();
        let injected = Injected::new(id, step, fault, &victims, &nodes);
        let for_good = injected.for_good;
        self.recorder.note(Event::Inject(Box::new(injected)));
        if for_good {
            self.gone.extend(victims.iter().cloned());
        }
        let mut hands =
            Hands { mesh: &mut self.mesh, load, recorder: &self.recorder, other: self.options.other.as_deref() };
        let active = Active::begin(id, fault, victims, hold, &mut hands).await;
        self.active.push(active.with_context(|| format!("{} cannot be begun", fault.kind()))?);
        Ok(())
    }

    /// Keeps faults up until then.
    async fn hold(&mut self, until: Instant, load: &Calls, stop: &CancellationToken) -> Result<()> {
        while Instant::now() < until {
            if stop.is_cancelled() {
                bail!("stopped");
            }
            self.keep_up(load).await?;
            self.sample();
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    async fn keep_up(&mut self, load: &Calls) -> Result<()> {
        for active in &mut self.active {
            let mut hands =
                Hands { mesh: &mut self.mesh, load, recorder: &self.recorder, other: self.options.other.as_deref() };
            active.keep_up(&mut hands).await?;
        }
        Ok(())
    }

    /// Looks for the signs that the faults acted; those of the product may take a moment more.
    async fn signs(&mut self, load: &Calls, stop: &CancellationToken) -> Result<()> {
        for active in &mut self.active {
            let mut hands = Hands { mesh: &mut self.mesh, load, recorder: &self.recorder, other: None };
            active.note_stage(&mut hands);
        }
        let deadline = Instant::now() + active::SIGN;
        let mut open: Vec<usize> = (0..self.active.len()).collect();
        while !open.is_empty() {
            let late = Instant::now() > deadline || stop.is_cancelled();
            open.retain(|at| {
                let active = &self.active[*at];
                let (found, what) = match self.recorder.with(|entries| active.product_sign(entries, &self.mesh)) {
                    Ok(what) => (true, what),
                    Err(_) if !late => return true,
                    Err(what) => (false, what),
                };
                self.recorder.note(Event::Sign { fault: active.id, side: Side::Product, found, what });
                false
            });
            if !open.is_empty() {
                self.keep_up(load).await?;
                tokio::time::sleep(TICK).await;
            }
        }
        Ok(())
    }

    async fn end_faults(&mut self, load: &Calls) -> Result<()> {
        let mut ended = std::mem::take(&mut self.active);
        let mut outcome = Ok(());
        for active in &mut ended {
            let mut hands =
                Hands { mesh: &mut self.mesh, load, recorder: &self.recorder, other: self.options.other.as_deref() };
            outcome = outcome.and(active.end(&mut hands).await);
        }
        for active in &ended {
            let (found, what) = match active.healed(&mut self.mesh) {
                Ok(what) => (true, what),
                Err(what) => (false, what),
            };
            self.recorder.note(Event::Sign { fault: active.id, side: Side::Healed, found, what });
        }
        if ended.iter().any(|active| matches!(active.fault, Fault::Clone { .. })) {
            // Whom the others have last seen is gone with its key: that is still to be noticed.
            tokio::time::sleep(NOTICED).await;
        }
        outcome
    }

    /// Ends what is still on, whatever becomes of it.
    async fn mend(&mut self, load: &Calls) {
        if !self.active.is_empty() {
            let _ = self.end_faults(load).await;
        }
    }

    /// Since when every node sees every other as it is; `None` if it does not come to that within the limit.
    async fn healed(&mut self, limit: Duration, stop: &CancellationToken) -> Result<Option<f64>> {
        let deadline = Instant::now() + limit;
        let mut agreed = None;
        loop {
            let now = self.recorder.now();
            agreed = if self.agree() { agreed.or(Some(now)) } else { None };
            if agreed.is_some_and(|since| now - since >= STEADY.as_secs_f64()) {
                return Ok(agreed);
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            if stop.is_cancelled() {
                bail!("stopped");
            }
            self.sample();
            tokio::time::sleep(TICK).await;
        }
    }

    fn agree(&self) -> bool {
        let views = self.observers.views();
        let present: Vec<&str> =
            self.mesh.nodes.iter().map(|node| node.name.as_str()).filter(|name| !self.gone.contains(*name)).collect();
        present.iter().all(|observer| {
            let Some(view) = views.get(*observer) else { return false };
            let alive = present.iter().all(|s| view.get(*s).is_some_and(|seen| seen.status == MemberStatus::Alive));
            let gone = self.gone.iter().all(|s| view.get(s).is_none_or(|seen| seen.status != MemberStatus::Alive));
            alive && gone
        })
    }

    async fn converged(&mut self) -> Result<()> {
        let never = CancellationToken::new();
        if self.healed(CONVERGED, &never).await?.is_some() {
            return Ok(());
        }
        bail!("the nodes do not all see each other {} s after the start", CONVERGED.as_secs());
    }

    async fn wait(&mut self, long: Duration, stop: &CancellationToken) -> Result<()> {
        let until = Instant::now() + long;
        while Instant::now() < until {
            if stop.is_cancelled() {
                bail!("stopped");
            }
            self.sample();
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    /// Measures processes now and then, and notes those that have ended without being asked to.
    fn sample(&mut self) {
        if self.sampled.elapsed() < SAMPLE {
            return;
        }
        self.sampled = Instant::now();
        let (calls, failed) = self.recorder.with(|entries| {
            let calls = entries.iter().filter_map(|entry| match &entry.event {
                Event::Call(call) => Some(call.good()),
                _ => None,
            });
            calls.fold((0, 0), |(calls, failed), good| (calls + 1, failed + usize::from(!good)))
        });
        let at = self.recorder.now();
        self.progress.now(&format!("{at:6.1} s  {}  {calls} calls, {failed} not answered", self.doing));
        let killed: Vec<&String> =
            self.active.iter().filter(|a| a.fault.disables()).flat_map(|a| &a.victims).chain(&self.gone).collect();
        for node in &mut self.mesh.nodes {
            let Some(process) = &mut node.process else { continue };
            if let Some(status) = process.ended() {
                let wanted = killed.contains(&&node.name);
                let what = format!("ended by itself: {status}");
                self.recorder.note(Event::Process { name: node.name.clone(), what, wanted });
                node.process = None;
                continue;
            }
            let Some(pid) = process.pid() else { continue };
            let rss_kib = resident_kib(pid);
            let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count) as u64;
            self.recorder.note(Event::Sample { node: node.name.clone(), rss_kib, descriptors });
        }
    }

    /// Asks every service which calls are open that nobody waits for any more: those of the load that are older than its
    /// deadline, and the time that the word of it may take.
    async fn open_calls(&mut self) {
        let Plan { load, steps, .. } = &self.options.plan;
        let stops = |step: &&Step| step.faults.iter().any(|fault| matches!(fault, Fault::Pause { .. }));
        let still = steps.iter().filter(stops).map(|step| step.hold).max().unwrap_or_default();
        let oldest = (load.deadline + GONE + AFTER_STILL * still).as_millis();
        for node in &self.mesh.nodes {
            for served in &node.services {
                let of = format!("{} of {}", served.service, node.name);
                // One that is dead has nothing open.
                let Ok((_, body)) = mesh::get(&node.place, served.addr, "/open").await else { continue };
                let text = String::from_utf8_lossy(&body).into_owned();
                let old = text.lines().filter_map(|line| line.split_once(' ')).filter(|(age, call)| {
                    age.parse::<u128>().is_ok_and(|age| age > oldest) && !probes::is_of_a_probe(call)
                });
                let calls: Vec<String> = old.map(|(age, call)| format!("{call} for {age} ms")).collect();
                self.recorder.note(Event::Open { of, calls });
            }
        }
    }

    /// Reads ledgers and logs.
    async fn finish(&mut self, sabotage: Sabotage) {
        self.open_calls().await;
        for node in &self.mesh.nodes {
            for served in &node.services {
                let of = format!("{} of {}", served.service, node.name);
                let lost = sabotage == Sabotage::LedgerLost && node.name == "n3";
                let Ok(text) = std::fs::read_to_string(&served.ledger) else { continue };
                if lost {
                    continue;
                }
                let nonces: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
                for nonce in &nonces {
                    self.recorder.note(Event::Done { nonce: *nonce, by: node.name.clone() });
                }
                if sabotage == Sabotage::LedgerTwice {
                    for nonce in &nonces {
                        self.recorder.note(Event::Done { nonce: *nonce, by: node.name.clone() });
                    }
                }
                self.recorder.note(Event::Ledger { of, lines: nonces.len() });
            }
            for line in node.log().lines().filter(|line| is_loud(line)).take(MOST_LINES) {
                self.recorder.note(Event::Log { node: node.name.clone(), line: line.into() });
            }
        }
    }
}

/// Lines of a node's log that are kept.
const MOST_LINES: usize = 2000;

/// A warning, an error, or a panic.
fn is_loud(line: &str) -> bool {
    line.contains("\"level\":\"WARN\"") || line.contains("\"level\":\"ERROR\"") || line.contains("panicked at")
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
}
