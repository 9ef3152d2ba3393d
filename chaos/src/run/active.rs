//! A fault that is on: how it is begun, kept up, and ended.

mod signs;
mod system;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::Rlimit;
use starling_protocol::admin::{Member, Status};

pub(super) use self::system::copy_dir;
use self::system::{DeadMan, clear_dir, fill, limit_descriptors, set_descriptors, state_of};
use super::{
    mesh::Mesh,
    probes::{self, Probing},
};
use crate::{
    Process,
    history::{Event, Recorder},
    load::Calls,
    plan::{Fault, Misbehaviour},
    stage::{Effect, Links, Rule, RuleId},
};

/// Between two takeovers.
const BETWEEN_TAKEOVERS: Duration = Duration::from_secs(1);
/// A fault ends by itself so long after the step should have ended it.
const DEAD_MAN: Duration = Duration::from_secs(60);
/// A limit below which every number is taken: what is open stays open, nothing new can be.
const NO_DESCRIPTORS: u64 = 3;
const LOOK_AT_MEMBERS: Duration = Duration::from_secs(1);
/// How long a node may take to end when it is asked to.
const TERMINATES: Duration = Duration::from_secs(60);
/// How long a sign is waited for after the fault's time, before it counts as not found.
pub(super) const SIGN: Duration = Duration::from_secs(3);

/// A fault that is on.
pub(crate) struct Active {
    /// Its number in the run.
    pub(crate) id: usize,
    pub(crate) fault: Fault,
    pub(crate) victims: Vec<String>,
    /// When it was begun, seconds since the run's start.
    at: f64,
    begun: Instant,
    rules: Vec<RuleId>,
    undo: Vec<Undo>,
    /// Process ids of the victims, as they were.
    pids: BTreeMap<String, Option<u32>>,
    /// When it last did what it does again and again, and how often that was.
    last: Instant,
    rounds: usize,
    probing: Option<Probing>,
    /// Ends of the certificates that each node has shown.
    certificates: BTreeMap<String, BTreeSet<String>>,
    /// How often a starved process was looked at, and found stopped.
    looks: (usize, usize),
    /// Processes that another one has taken over from, with the name of their node.
    finishing: Vec<(String, Process)>,
    /// What the product was asked, and showed.
    shown: Result<String, String>,
    /// What the runner found out by itself.
    stage: Result<String, String>,
}

/// What has to be done when it ends, whatever happens.
enum Undo {
    Continue(DeadMan),
    Descriptors { pid: u32, was: Rlimit },
    Ballast(std::path::PathBuf),
}

/// What a fault may need besides the mesh.
pub(crate) struct Hands<'a> {
    pub(crate) mesh: &'a mut Mesh,
    pub(crate) load: &'a Calls,
    pub(crate) recorder: &'a Arc<Recorder>,
    pub(crate) other: Option<&'a std::path::Path>,
}

impl Active {
    /// Begins it.
    ///
    /// # Errors
    /// If it cannot be begun: the run is unknown then.
    pub(crate) async fn begin(
        id: usize,
        fault: &Fault,
        victims: Vec<String>,
        hold: Duration,
        hands: &mut Hands<'_>,
    ) -> Result<Self> {
        let now = Instant::now();
        let mut active = Self {
            id,
            fault: fault.clone(),
            victims,
            at: hands.recorder.now(),
            begun: now,
            rules: Vec::new(),
            undo: Vec::new(),
            pids: BTreeMap::new(),
            last: now,
            rounds: 0,
            probing: None,
            certificates: BTreeMap::new(),
            looks: (0, 0),
            finishing: Vec::new(),
            shown: Err("the product was not asked".into()),
            stage: Err("nothing was looked at".into()),
        };
        for victim in &active.victims {
            let Ok(at) = hands.mesh.at(victim) else { continue };
            active.pids.insert(victim.clone(), hands.mesh.nodes[at].pid());
        }
        active.network(hold, hands.mesh);
        active.processes(hold, hands).await?;
        Ok(active)
    }

    fn indices(&self, mesh: &Mesh) -> Vec<usize> {
        self.victims.iter().filter_map(|victim| mesh.at(victim).ok()).collect()
    }

    /// The rules of a network fault.
    fn network(&mut self, hold: Duration, mesh: &Mesh) {
        let slots: Vec<usize> = self.victims.iter().filter_map(|victim| mesh.slot(victim)).collect();
        let mut table = mesh.stage.table();
        let set = table.set(&slots);
        let of = |effect| (Links::Of(set.clone()), effect, None);
        let (links, effect, flip) = match &self.fault {
            Fault::Partition { flip, .. } => (Links::Across(set), Effect::Cut, *flip),
            Fault::Cut { .. } => (Links::Among(set), Effect::Cut, None),
            Fault::Mute { .. } => (Links::From(set), Effect::Cut, None),
            Fault::Deaf { .. } => (Links::To(set), Effect::Cut, None),
            Fault::Loss { share, burst, .. } => of(Effect::Loss { share: *share, burst: *burst }),
            Fault::Delay { by, jitter, .. } => of(Effect::Delay { by: *by, jitter: *jitter }),
            Fault::Duplicate { share, .. } => of(Effect::Duplicate { share: *share }),
            Fault::Reorder { share, by, .. } => of(Effect::Reorder { share: *share, by: *by }),
            Fault::Corrupt { share, .. } => of(Effect::Corrupt { share: *share }),
            Fault::Rate { kbit, .. } => of(Effect::Rate { bytes_per_second: *kbit as f64 * 1000.0 / 8.0 }),
            Fault::Mtu { bytes, .. } => of(Effect::Mtu { bytes: *bytes }),
            Fault::HoldBack { .. } => of(Effect::HoldBack),
            Fault::UdpBlocked { .. } => of(Effect::UdpBlocked),
            Fault::Rebind { every, .. } => of(Effect::Rebind { every: *every }),
            Fault::NatForgets { idle, .. } => of(Effect::NatForgets { idle: *idle }),
            _ => return,
        };
        let now = Instant::now();
        self.rules.push(table.add(Rule { links, effect, flip, until: now + hold + DEAD_MAN }, now));
    }

    async fn processes(&mut self, hold: Duration, hands: &mut Hands<'_>) -> Result<()> {
        let victims = self.indices(hands.mesh);
        let mesh = &mut *hands.mesh;
        match self.fault.clone() {
            Fault::Kill { .. } | Fault::Herd { .. } => {
                for at in victims {
                    mesh.kill(at).await?;
                }
            }
            Fault::Pause { .. } => self.stop(mesh, 1.0, hold)?,
            Fault::Starve { share, .. } => self.stop(mesh, share, hold)?,
            Fault::Descriptors { .. } => {
                for at in victims {
                    let pid = mesh.nodes[at].pid().context("it does not run")?;
                    let was = limit_descriptors(pid, Some(NO_DESCRIPTORS))?;
                    self.undo.push(Undo::Descriptors { pid, was });
                    self.stage = Ok(format!("the limit went from {:?} to {NO_DESCRIPTORS}", was.current));
                }
            }
            Fault::DiskFull { .. } => {
                for at in victims {
                    let ballast = mesh.nodes[at].state.join("ballast");
                    self.undo.push(Undo::Ballast(ballast.clone()));
                    let error = fill(&ballast).err().context("the disk does not get full")?;
                    self.stage = Ok(format!("a write there ends with: {error}"));
                }
            }
            Fault::TruncatedState { .. } => {
                for at in victims {
                    mesh.kill(at).await?;
                    let file = mesh.nodes[at].state.join("peers.json");
                    let length = std::fs::metadata(&file).context("it has written no peers.json yet")?.len();
                    std::fs::File::options().write(true).open(&file)?.set_len(length / 2)?;
                    self.stage = Ok(format!("{} cut from {length} to {} bytes", file.display(), length / 2));
                    mesh.spawn(at).await?;
                }
            }
            Fault::RestoredState { .. } => {
                for at in victims {
                    let state = mesh.nodes[at].state.clone();
                    let copy = state.with_extension("copy");
                    copy_dir(&state, &copy)?;
                    // A life more than the copy knows of.
                    mesh.kill(at).await?;
                    mesh.spawn(at).await?;
                    mesh.ready(at).await?;
                    mesh.kill(at).await?;
                    // The directory itself stays: it may be the root of a file system.
                    clear_dir(&state)?;
                    copy_dir(&copy, &state)?;
                    std::fs::remove_dir_all(&copy)?;
                    mesh.spawn(at).await?;
                    mesh.ready(at).await?;
                    self.stage = Ok("the state of one life before was put back".into());
                }
            }
            Fault::SwappedAddresses { .. } => {
                for pair in victims.chunks_exact(2) {
                    mesh.kill(pair[0]).await?;
                    mesh.kill(pair[1]).await?;
                    let (a, b) = (mesh.nodes[pair[0]].slot, mesh.nodes[pair[1]].slot);
                    mesh.stage.swap(a, b)?;
                    for at in pair {
                        mesh.spawn(*at).await?;
                    }
                    let now = |slot| mesh.stage.mesh(slot).advertise;
                    self.stage = Ok(format!("now at {} and {}", now(a), now(b)));
                    for at in pair {
                        mesh.ready(*at).await?;
                    }
                }
            }
            Fault::OtherVersion { .. } => {
                let other = hands.other.context("no other binary: name one with --other")?.to_path_buf();
                for at in victims {
                    restart_with(mesh, at, &other, hands.recorder).await?;
                }
                self.stage = Ok(format!("restarted with {}", other.display()));
            }
            Fault::Service { does: Misbehaviour::Crash, .. } => {
                for at in victims {
                    let node = &mut mesh.nodes[at];
                    for served in &mut node.services {
                        served.process.kill().await?;
                        let name = format!("{} of {}", served.service, node.name);
                        hands.recorder.note(Event::Process { name, what: "killed".into(), wanted: true });
                    }
                }
                self.stage = Ok("its process is gone".into());
            }
            Fault::Service { does, .. } => {
                let word = serde_json::to_value(does)?.as_str().unwrap_or_default().to_string();
                self.stage = tell(mesh, &victims, &word).await;
            }
            Fault::Burst { times, work } => {
                hands.load.times(times);
                if !work.is_zero() {
                    let all: Vec<usize> = (0..mesh.nodes.len()).collect();
                    self.stage = tell(mesh, &all, &format!("work {}", work.as_millis())).await;
                }
            }
            Fault::Clone { .. }
            | Fault::Stuck { .. }
            | Fault::Strangers { .. }
            | Fault::KeyRevoked { .. }
            | Fault::Reload { .. } => {
                self.probing = Some(Probing::begin(&self.fault, &victims, mesh).await?);
            }
            _ => {}
        }
        Ok(())
    }

    fn stop(&mut self, mesh: &Mesh, share: f64, hold: Duration) -> Result<()> {
        for at in self.indices(mesh) {
            let pid = mesh.nodes[at].pid().context("it does not run")?;
            self.undo.push(Undo::Continue(DeadMan::stop(pid, share, hold + DEAD_MAN)?));
        }
        Ok(())
    }

    /// What has to be done again and again while it is on.
    pub(crate) async fn keep_up(&mut self, hands: &mut Hands<'_>) -> Result<()> {
        let mesh = &mut *hands.mesh;
        match self.fault.clone() {
            Fault::Kill { back: Some(back), .. } if self.rounds == 0 && self.begun.elapsed() >= back => {
                self.rounds = 1;
                for at in self.indices(mesh) {
                    mesh.spawn(at).await?;
                }
            }
            Fault::Roll { .. } => {
                let victims = self.indices(mesh);
                let at = victims[self.rounds % victims.len()];
                let begun = Instant::now();
                let node = mesh.nodes[at].name.clone();
                hands.recorder.note(Event::Away { node: node.clone(), away: true });
                let how = terminate(mesh, at, hands.recorder).await?;
                mesh.spawn(at).await?;
                mesh.ready(at).await?;
                hands.recorder.note(Event::Away { node, away: false });
                self.rounds += 1;
                let took = begun.elapsed().as_secs_f64();
                self.stage = Ok(format!("{} restarts; the last: {how}, ready again after {took:.1} s", self.rounds));
                // The others should have noticed before the next one goes.
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Fault::Upgrade { .. } if self.last.elapsed() >= BETWEEN_TAKEOVERS => {
                self.last = Instant::now();
                let (mut free, mut busy) = (Vec::new(), Vec::new());
                for (name, mut old) in std::mem::take(&mut self.finishing) {
                    match old.is_running() {
                        true => busy.push((name, old)),
                        false => finished(&mut old, &name, hands.recorder).await,
                    }
                }
                self.finishing = busy;
                // Of each node two processes at most.
                for at in self.indices(mesh) {
                    if !self.finishing.iter().any(|(name, _)| *name == mesh.nodes[at].name) {
                        free.push(at);
                    }
                }
                if let Some(at) = free.get(self.rounds % free.len().max(1)).copied() {
                    let begun = Instant::now();
                    let old = mesh.take_over(at).await?;
                    self.rounds += 1;
                    self.finishing.push((mesh.nodes[at].name.clone(), old));
                    let took = begun.elapsed().as_secs_f64();
                    self.stage = Ok(format!("{} takeovers; the last took {took:.1} s", self.rounds));
                }
            }
            Fault::Starve { .. } => {
                for pid in self.pids.values().flatten() {
                    self.looks.0 += 1;
                    self.looks.1 += usize::from(state_of(*pid) == 'T');
                }
            }
            Fault::Cut { .. } if self.last.elapsed() >= LOOK_AT_MEMBERS => {
                self.last = Instant::now();
                self.shown = self.silence(mesh).await.unwrap_or_else(|error| Err(format!("{error:#}")));
            }
            Fault::Stuck { .. } if self.last.elapsed() >= LOOK_AT_MEMBERS => {
                self.last = Instant::now();
                self.shown = self.in_flight(mesh).await.unwrap_or_else(|error| Err(format!("{error:#}")));
            }
            Fault::ShortCertificates { .. } if self.last.elapsed() >= LOOK_AT_MEMBERS => {
                self.last = Instant::now();
                let members: Vec<Member> = serde_json::from_slice(&mesh.admin(0, "/v1/members").await?)?;
                for member in members {
                    let ends = member.cert_expires.unwrap_or_default();
                    self.certificates.entry(member.name).or_default().insert(ends);
                }
                let fewest = self.certificates.values().map(BTreeSet::len).min().unwrap_or(0);
                self.stage = match fewest {
                    0 | 1 => Err("there are nodes that have shown only one certificate".into()),
                    fewest => Ok(format!("every node has shown {fewest} certificates or more")),
                };
            }
            Fault::Reload { every, .. } if self.last.elapsed() >= every => {
                self.last = Instant::now();
                self.rounds += 1;
                let rounds = self.rounds;
                let loaded = probes::reload(mesh, &self.victims, rounds).await?;
                self.stage = Ok(format!("{rounds} times written and loaded; {loaded}"));
            }
            _ => {}
        }
        let id = self.id;
        if let Some(probing) = &mut self.probing {
            probing.go_on(id, mesh, hands.recorder).await?;
        }
        Ok(())
    }

    /// That a victim has not heard another since the cut, though it hears the rest.
    async fn silence(&self, mesh: &Mesh) -> Result<Result<String, String>> {
        let at = *self.indices(mesh).first().context("nobody is cut off")?;
        let members: Vec<Member> = serde_json::from_slice(&mesh.admin(at, "/v1/members?detail=true").await?)?;
        let heard = |member: &Member| member.detail.as_ref()?.heard_ms_ago;
        let cut = members.iter().filter(|member| !member.is_self && self.victims.contains(&member.name));
        let silent = cut.filter_map(|member| Some((&member.name, heard(member)?))).max_by_key(|(_, ms)| *ms);
        let (name, ms) = silent.context("it shows no other victim")?;
        let since = self.begun.elapsed().as_millis() as u64;
        let what = format!("{} last heard {name} {:.1} s ago", mesh.nodes[at].name, ms as f64 / 1e3);
        // What was under way when the cut came may still have arrived.
        Ok(if since > 3_000 && ms + 1_000 >= since { Ok(what) } else { Err(what) })
    }

    /// That the victims say they have calls that do not end.
    async fn in_flight(&self, mesh: &Mesh) -> Result<Result<String, String>> {
        let mut calls = 0;
        for at in self.indices(mesh) {
            let status: Status = serde_json::from_slice(&mesh.admin(at, "/v1/status").await?)?;
            calls += status.in_flight;
        }
        let what = format!("the victims say that they have {calls} calls in flight");
        Ok(if calls > 0 { Ok(what) } else { Err(what) })
    }

    /// Ends it.
    pub(crate) async fn end(&mut self, hands: &mut Hands<'_>) -> Result<()> {
        let mesh = &mut *hands.mesh;
        {
            let mut table = mesh.stage.table();
            for rule in &self.rules {
                table.remove(*rule);
            }
        }
        mesh.stage.release();
        for undo in self.undo.drain(..) {
            match undo {
                Undo::Continue(dead_man) => drop(dead_man),
                Undo::Descriptors { pid, was } => drop(set_descriptors(pid, was)),
                Undo::Ballast(path) => drop(std::fs::remove_file(path)),
            }
        }
        self.probing = None;
        let victims = self.indices(mesh);
        match self.fault.clone() {
            Fault::Kill { for_good: false, back: None, .. } | Fault::Herd { .. } => {
                for at in victims {
                    mesh.spawn(at).await?;
                }
            }
            Fault::Service { does: Misbehaviour::Crash, .. } => {
                for at in victims {
                    mesh.serve_again(at)?;
                }
            }
            Fault::Service { .. } => drop(tell(mesh, &victims, "good").await),
            Fault::Burst { work, .. } => {
                hands.load.times(1);
                if !work.is_zero() {
                    let all: Vec<usize> = (0..mesh.nodes.len()).collect();
                    let _ = tell(mesh, &all, "good").await;
                }
            }
            Fault::Upgrade { .. } => {
                // Flows of packets would keep them for a minute more.
                let mut finishing = std::mem::take(&mut self.finishing);
                for (_, old) in &finishing {
                    let _ = old.signal("TERM").await;
                }
                for (name, old) in &mut finishing {
                    finished(old, name, hands.recorder).await;
                }
            }
            Fault::OtherVersion { .. } => {
                let own = mesh.binary().to_path_buf();
                for at in victims {
                    restart_with(mesh, at, &own, hands.recorder).await?;
                }
            }
            _ => {}
        }
        // Whoever came to an end by the fault comes back.
        for at in self.indices(mesh) {
            let for_good = matches!(self.fault, Fault::Kill { for_good: true, .. });
            if !for_good && !mesh.nodes[at].is_running() {
                mesh.spawn(at).await?;
            }
        }
        self.note_links(hands);
        hands.recorder.note(Event::Heal { fault: self.id });
        Ok(())
    }

    fn note_links(&self, hands: &Hands<'_>) {
        let name = |slot: usize| hands.mesh.nodes.get(slot).map_or("clients", |node| &node.name).to_string();
        for rule in &self.rules {
            let links = hands.mesh.stage.table().count_by_link(*rule);
            let links = links.into_iter().map(|((from, to), count)| (name(from), name(to), count)).collect();
            hands.recorder.note(Event::Links { fault: self.id, links });
        }
    }

    /// Whether it is over, as far as the stage can tell.
    pub(crate) fn healed(&self, mesh: &mut Mesh) -> Result<String, String> {
        if matches!(self.fault, Fault::Kill { for_good: true, .. }) {
            return Ok("meant for good".into());
        }
        for at in self.indices(mesh) {
            let node = &mut mesh.nodes[at];
            let state = node.pid().map(state_of);
            match state {
                Some('T') => return Err(format!("{} is still stopped", node.name)),
                None => return Err(format!("{} does not run", node.name)),
                _ if !node.is_running() => return Err(format!("{} has ended", node.name)),
                _ => {}
            }
        }
        match self.rules.is_empty() {
            true => Ok("the processes run".into()),
            false => Ok("no rule is left in the switch, the processes run".into()),
        }
    }
}

/// Tells services how to behave, and waits until they have said that they do.
async fn tell(mesh: &mut Mesh, nodes: &[usize], word: &str) -> Result<String, String> {
    let mut told = 0;
    for at in nodes {
        for served in &mut mesh.nodes[*at].services {
            served.process.tell(word).await.map_err(|e| format!("{e:#}"))?;
            let deadline = Instant::now() + SIGN;
            while served.process.output().lines().last() != Some(word) {
                if Instant::now() > deadline {
                    return Err(format!("a service does not say that it is {word}"));
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            told += 1;
        }
    }
    if told > 0 { Ok(format!("{told} services say that they are {word:?}")) } else { Err("nobody was told".into()) }
}

/// SIGTERM, and its end; how it ended. One that does not end, or not well, is the product's fault and noted as such.
async fn terminate(mesh: &mut Mesh, at: usize, recorder: &Recorder) -> Result<String> {
    let node = &mut mesh.nodes[at];
    let Some(mut process) = node.process.take() else { return Ok("it did not run".into()) };
    process.signal("TERM").await?;
    let (how, well) = match process.wait(TERMINATES).await {
        Ok(status) => (format!("ended with {status} on SIGTERM"), status.success()),
        Err(_) => (format!("does not end within {} s of SIGTERM", TERMINATES.as_secs()), false),
    };
    recorder.note(Event::Process { name: node.name.clone(), what: how.clone(), wanted: well });
    Ok(how)
}

/// The end of a process whose place another one has. One that does not end, or not well, is the product's fault.
async fn finished(process: &mut Process, name: &str, recorder: &Recorder) {
    let (how, well) = match process.wait(TERMINATES).await {
        Ok(status) => (format!("ended with {status}"), status.success()),
        Err(_) => (format!("does not end within {} s", TERMINATES.as_secs()), false),
    };
    recorder.note(Event::Process { name: name.into(), what: format!("the process before {how}"), wanted: well });
}

async fn restart_with(mesh: &mut Mesh, at: usize, binary: &std::path::Path, recorder: &Recorder) -> Result<()> {
    terminate(mesh, at, recorder).await?;
    mesh.nodes[at].binary = binary.into();
    mesh.spawn(at).await?;
    mesh.ready(at).await
}
