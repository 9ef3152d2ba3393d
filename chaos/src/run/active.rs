//! A fault that is on: how it is begun, kept up, ended, and what shows that it acted.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use starling_protocol::admin::MemberStatus;

use super::{
    mesh::Mesh,
    probes::{self, Probing},
};
use crate::{
    Process,
    history::{Entry, Event, Recorder, Side},
    load::Calls,
    plan::{Fault, Misbehaviour},
    process::send,
    stage::{Effect, Links, Rule, RuleId},
};

/// A fault ends by itself so long after the step should have ended it.
const DEAD_MAN: Duration = Duration::from_secs(60);
/// How long a node may take to end when it is asked to.
const TERMINATES: Duration = Duration::from_secs(60);
/// One round of a starved process.
const STARVE_ROUND: Duration = Duration::from_millis(200);
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
    /// Process ids and limits, as they were.
    before: BTreeMap<String, Before>,
    /// When it last did what it does again and again, and how often that was.
    last: Instant,
    rounds: usize,
    probing: Option<Probing>,
    /// What the runner found out by itself.
    stage: Result<String, String>,
}

#[derive(Default)]
struct Before {
    pid: Option<u32>,
}

/// What has to be done when it ends, whatever happens.
enum Undo {
    Continue(DeadMan),
    Descriptors { pid: u32, was: Rlimit },
    Ballast(std::path::PathBuf),
}

/// Lets a process go on: when told to, when dropped, or when its time is up.
struct DeadMan {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl DeadMan {
    /// Stops the process for that share of the time, until `limit` at the latest.
    fn stop(pid: u32, share: f64, limit: Duration) -> Result<Self> {
        send(pid, Signal::STOP)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, until) = (stop.clone(), Instant::now() + limit);
        let thread = std::thread::Builder::new().name("dead-man".into()).spawn(move || {
            while !stopped.load(Relaxed) && Instant::now() < until {
                if share >= 1.0 {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
                std::thread::sleep(STARVE_ROUND.mul_f64(share));
                let _ = send(pid, Signal::CONT);
                std::thread::sleep(STARVE_ROUND.mul_f64(1.0 - share));
                if !stopped.load(Relaxed) {
                    let _ = send(pid, Signal::STOP);
                }
            }
            let _ = send(pid, Signal::CONT);
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for DeadMan {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
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
            before: BTreeMap::new(),
            last: now,
            rounds: 0,
            probing: None,
            stage: Err("nothing was looked at".into()),
        };
        for victim in &active.victims {
            let at = hands.mesh.at(victim)?;
            active.before.insert(victim.clone(), Before { pid: hands.mesh.nodes[at].pid() });
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
        let slots: Vec<usize> = self.indices(mesh).into_iter().map(|at| mesh.nodes[at].slot).collect();
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
                    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
                    let was = limit_descriptors(pid, Some(open))?;
                    self.undo.push(Undo::Descriptors { pid, was });
                    self.stage = Ok(format!("limit lowered from {:?} to the {open} in use", was.current));
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
                    let file = if file.exists() { file } else { largest_cache(&mesh.nodes[at].state)? };
                    let length = std::fs::metadata(&file)?.len();
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
                    std::fs::remove_dir_all(&state)?;
                    std::fs::rename(&copy, &state)?;
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
                    restart_with(mesh, at, &other).await?;
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
                let how = terminate(mesh, at).await?;
                mesh.spawn(at).await?;
                mesh.ready(at).await?;
                hands.recorder.note(Event::Away { node, away: false });
                self.rounds += 1;
                let took = begun.elapsed().as_secs_f64();
                self.stage = Ok(format!("{} restarts; the last: {how}, ready again after {took:.1} s", self.rounds));
                // The others should have noticed before the next one goes.
                tokio::time::sleep(Duration::from_millis(500)).await;
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

    /// Notes what the stage knows: counts, states of processes. To be called while it is still on.
    pub(crate) fn note_stage(&mut self, hands: &mut Hands<'_>) {
        let (found, what) = match self.stage_sign(hands.mesh) {
            Ok(what) => (true, what),
            Err(what) => (false, what),
        };
        hands.recorder.note(Event::Sign { fault: self.id, side: Side::Stage, found, what });
    }

    fn stage_sign(&self, mesh: &Mesh) -> Result<String, String> {
        let state = |victim: &String| {
            let pid = self.before.get(victim).and_then(|before| before.pid)?;
            Some(state_of(pid))
        };
        match &self.fault {
            _ if !self.rules.is_empty() => {
                let table = mesh.stage.table();
                let counts: Vec<_> = self.rules.iter().map(|rule| table.count(*rule)).collect();
                let links: usize = self.rules.iter().map(|rule| table.count_by_link(*rule).len()).sum();
                let (seen, touched) =
                    counts.iter().fold((0, 0), |(seen, touched), c| (seen + c.seen, touched + c.touched));
                let what = format!("{touched} of {seen} packets on {links} directed links");
                if touched > 0 { Ok(what) } else { Err(format!("the switch touched nothing: {what}")) }
            }
            Fault::Kill { .. } | Fault::Herd { .. } => {
                let gone = self.victims.iter().all(|victim| {
                    // Another process may have the number by now.
                    let now = mesh.at(victim).ok().and_then(|at| mesh.nodes[at].pid());
                    now != self.before.get(victim).and_then(|before| before.pid)
                });
                if gone { Ok("the processes were killed by signal 9".into()) } else { Err("they still run".into()) }
            }
            Fault::Pause { .. } => match self.victims.iter().all(|v| state(v) == Some('T')) {
                true => Ok("the kernel shows the processes as stopped".into()),
                false => Err("the kernel does not show them as stopped".into()),
            },
            Fault::Starve { .. } => {
                let stopped = self.victims.iter().filter_map(|v| self.before.get(v)?.pid).all(|pid| {
                    let looks = (0..40).map(|_| {
                        std::thread::sleep(Duration::from_millis(13));
                        state_of(pid) == 'T'
                    });
                    looks.filter(|stopped| *stopped).count() > 4
                });
                if stopped { Ok("stopped in most looks at its state".into()) } else { Err("it always ran".into()) }
            }
            Fault::Burst { times, .. } => Ok(format!("{times} times as many calls are due")),
            _ => match &self.probing {
                Some(probing) => match (probing.stage(), &self.stage) {
                    (_, Ok(what)) => Ok(what.clone()),
                    (other, _) => other,
                },
                None => self.stage.clone(),
            },
        }
    }

    /// What the product shows of it, if it does yet.
    pub(crate) fn product_sign(&self, entries: &[Entry], mesh: &Mesh) -> Result<String, String> {
        let since = entries.iter().filter(|entry| entry.at >= self.at);
        let victim = |name: &String| self.victims.contains(name);
        let views = since.clone().filter_map(|entry| match &entry.event {
            Event::View { observer, subject, status, .. } => Some((entry.at, observer, subject, *status)),
            _ => None,
        });
        let alive = Some(MemberStatus::Alive);
        let told = |at: f64, o: &String, s: &String, status: Option<MemberStatus>| {
            let status = status.map_or("not at all".into(), |status| status.to_string());
            format!("{o} shows {s} as {status} after {:.2} s", at - self.at)
        };
        let seen_gone = || {
            let mut gone = views.clone().filter(|(_, o, s, status)| victim(s) && !victim(o) && *status != alive);
            gone.next().map(|(at, o, s, status)| told(at, o, s, status)).ok_or("no node shows a victim as gone".into())
        };
        let new_life = || {
            let lives = since.clone().filter_map(|entry| match &entry.event {
                Event::View { observer, subject, generation, .. } if victim(subject) && observer != subject => {
                    Some((subject, *generation))
                }
                _ => None,
            });
            let before = |subject: &String| {
                let all = entries.iter().filter(|entry| entry.at < self.at);
                let seen = all.filter_map(|entry| match &entry.event {
                    Event::View { subject: s, generation, .. } if s == subject => Some(*generation),
                    _ => None,
                });
                seen.max().unwrap_or(0)
            };
            let newer: Vec<&String> = lives.filter(|(s, life)| *life > before(s)).map(|(s, _)| s).collect();
            let all = self.victims.iter().all(|v| newer.contains(&v));
            if all { Ok("others show a new life of it".to_string()) } else { Err("no new life is shown".to_string()) }
        };
        let crossing = || {
            let calls = since.clone().filter(|entry| {
                matches!(&entry.event, Event::Call(call) if call.good()
                && (victim(&call.node) || victim(&call.by)))
            });
            match calls.count() {
                0 => Err("no call went over the touched links".to_string()),
                count => Ok(format!("{count} calls were answered over the touched links")),
            }
        };
        let served_elsewhere = || {
            let by_victims = |from: f64, to: f64| {
                let calls = entries.iter().filter(|entry| entry.at >= from && entry.at < to);
                calls.filter(|e| matches!(&e.event, Event::Call(c) if victim(&c.by) && c.good())).count()
            };
            let now = entries.last().map_or(self.at, |entry| entry.at);
            let (before, after) = (by_victims(self.at - 3.0, self.at), by_victims(self.at + 0.5, now));
            match before > 0 && after * 10 < before {
                true => Ok(format!("victims answered {before} calls in the 3 s before, {after} since")),
                false => Err(format!("victims answered {before} calls in the 3 s before, and {after} since")),
            }
        };
        match &self.fault {
            Fault::Kill { back: Some(_), .. } => new_life(),
            Fault::Kill { .. } | Fault::Partition { .. } | Fault::Pause { .. } | Fault::UdpBlocked { .. } => {
                seen_gone().or_else(|_| served_elsewhere())
            }
            Fault::Herd { .. } => new_life().or_else(|_| seen_gone()),
            Fault::Starve { .. } | Fault::Mute { .. } | Fault::Deaf { .. } | Fault::HoldBack { .. } => {
                seen_gone().or_else(|_| served_elsewhere()).or_else(|_| slower(entries, self.at, &self.victims))
            }
            Fault::Roll { .. } | Fault::TruncatedState { .. } | Fault::RestoredState { .. } => new_life(),
            Fault::SwappedAddresses { .. } | Fault::OtherVersion { .. } => new_life(),
            Fault::Loss { .. } | Fault::Corrupt { .. } | Fault::Duplicate { .. } | Fault::Reorder { .. } => crossing(),
            Fault::Mtu { .. } | Fault::NatForgets { .. } | Fault::Rebind { .. } => crossing(),
            Fault::Delay { .. } | Fault::Rate { .. } => slower(entries, self.at, &self.victims).or_else(|_| crossing()),
            Fault::Cut { .. } => {
                Ok("the victims' links to the others carry on; what is cut is only between them".into())
            }
            Fault::Descriptors { .. } => descriptors_sign(entries, self.at, &self.victims, mesh),
            Fault::DiskFull { .. } => log_sign(mesh, &self.victims, &["No space left", "os error 28"]),
            Fault::Service { does: Misbehaviour::Crash | Misbehaviour::Hang, .. } => served_elsewhere(),
            Fault::Service { does: Misbehaviour::Stumble, .. } => {
                let stumbled = since.clone().filter(|e| matches!(&e.event, Event::Call(c) if c.status == 500));
                match stumbled.count() {
                    0 => Err("no call was answered 500".into()),
                    count => Ok(format!("{count} calls were answered 500")),
                }
            }
            Fault::Service { does: Misbehaviour::Slow, .. } => slower(entries, self.at, &self.victims),
            Fault::Service { .. } => crossing(),
            Fault::Burst { times, .. } => {
                let rate = |from: f64, to: f64| {
                    let calls = entries.iter().filter_map(|e| match &e.event {
                        Event::Call(call) => Some(call.due),
                        _ => None,
                    });
                    calls.filter(|due| *due >= from && *due < to).count() as f64 / (to - from).max(0.1)
                };
                let now = entries.last().map_or(self.at, |entry| entry.at);
                let (before, after) = (rate(self.at - 3.0, self.at), rate(self.at, now));
                let what = format!("{after:.0} calls a second came to an end, {before:.0} before");
                if after > before * f64::from(*times) * 0.3 { Ok(what) } else { Err(what) }
            }
            Fault::Clone { .. }
            | Fault::Stuck { .. }
            | Fault::Strangers { .. }
            | Fault::KeyRevoked { .. }
            | Fault::Reload { .. } => match &self.probing {
                Some(probing) => probing.product(self.id, entries, mesh),
                None => Err("it never began".into()),
            },
            Fault::ShortCertificates { .. } => log_sign(mesh, &[], &["certificate renewed", "renewed"]),
            Fault::Clock { .. } => Err("not here".into()),
        }
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
        if let Some(probing) = self.probing.take() {
            probing.end();
        }
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
            Fault::OtherVersion { .. } => {
                let own = mesh.binary().to_path_buf();
                for at in victims {
                    restart_with(mesh, at, &own).await?;
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

/// Calls over the victims' links take longer than before.
fn slower(entries: &[Entry], at: f64, victims: &[String]) -> Result<String, String> {
    let median = |from: f64, to: f64| {
        let calls = entries.iter().filter_map(|entry| match &entry.event {
            Event::Call(call) if call.due >= from && call.due < to && call.good() => Some(call),
            _ => None,
        });
        let mut ms: Vec<f64> =
            calls.filter(|c| victims.contains(&c.node) || victims.contains(&c.by)).map(|call| call.ms).collect();
        ms.sort_by(f64::total_cmp);
        (ms.len() >= 5).then(|| ms[ms.len() / 2])
    };
    match (median(at - 5.0, at), median(at, f64::MAX)) {
        (Some(before), Some(after)) if after > before * 1.5 => {
            Ok(format!("median over the touched links {after:.1} ms, {before:.1} before"))
        }
        (before, after) => Err(format!("calls over the touched links are not slower: {after:?} ms, {before:?} before")),
    }
}

fn descriptors_sign(entries: &[Entry], at: f64, victims: &[String], mesh: &Mesh) -> Result<String, String> {
    let silent = entries.iter().filter(|e| e.at >= at).find_map(|e| match &e.event {
        Event::Admin { node, answers: false } if victims.contains(node) => Some(node.clone()),
        _ => None,
    });
    match silent {
        Some(node) => Ok(format!("{node} takes no new connection")),
        None => log_sign(mesh, victims, &["Too many open files", "os error 24"]),
    }
}

/// A victim's log, or anybody's, has one of these words.
fn log_sign(mesh: &Mesh, victims: &[String], words: &[&str]) -> Result<String, String> {
    let nodes = mesh.nodes.iter().filter(|node| victims.is_empty() || victims.contains(&node.name));
    for node in nodes {
        if let Some(word) = words.iter().find(|word| node.log().contains(**word)) {
            return Ok(format!("{}'s log says {word:?}", node.name));
        }
    }
    Err(format!("no log says {}", words.join(" or ")))
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

/// SIGTERM, and its end; how it ended.
async fn terminate(mesh: &mut Mesh, at: usize) -> Result<String> {
    let node = &mut mesh.nodes[at];
    let Some(mut process) = node.process.take() else { return Ok("it did not run".into()) };
    process.signal("TERM").await?;
    let status = process.wait(TERMINATES).await.with_context(|| format!("{} does not end on SIGTERM", node.name))?;
    if !status.success() {
        bail!("{} ended with {status} on SIGTERM", node.name);
    }
    Ok(status.to_string())
}

async fn restart_with(mesh: &mut Mesh, at: usize, binary: &std::path::Path) -> Result<()> {
    terminate(mesh, at).await?;
    mesh.nodes[at].binary = binary.into();
    mesh.spawn(at).await?;
    mesh.ready(at).await
}

/// State of a process as in /proc: `R`, `S`, `T`, …; a space if there is none.
fn state_of(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or(' ')
}

fn limit_descriptors(pid: u32, current: Option<u64>) -> Result<Rlimit> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
    let was = prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum: Some(1 << 20) });
    // Without the right to raise the hard limit, it stays.
    match was {
        Ok(was) => Ok(was),
        Err(_) => Ok(prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum: current })?),
    }
}

fn set_descriptors(pid: u32, limit: Rlimit) -> Result<Rlimit> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
    Ok(prlimit(Some(pid), Resource::Nofile, limit)?)
}

/// Writes until no more fits.
fn fill(path: &std::path::Path) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(path)?;
    let block = [0x5a; 64 << 10];
    for _ in 0..(64 << 20) / block.len() {
        file.write_all(&block)?;
    }
    Ok(())
}

/// The largest file of a state directory that is only a memory of the mesh, not an identity.
fn largest_cache(state: &std::path::Path) -> Result<std::path::PathBuf> {
    let files = std::fs::read_dir(state)?.flatten().filter(|entry| entry.path().is_file());
    let caches = files.filter(|entry| entry.metadata().is_ok_and(|m| m.len() > 2));
    let largest = caches.max_by_key(|entry| entry.metadata().map_or(0, |m| m.len()));
    Ok(largest.context("there is no state file")?.path())
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else if kind.is_file() {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    let mode = std::fs::metadata(from)?.permissions();
    Ok(std::fs::set_permissions(to, mode)?)
}

/// The process that a clone of a node runs in.
pub(super) fn start_clone(mesh: &Mesh, at: usize) -> Result<(Process, std::net::SocketAddr)> {
    let node = &mesh.nodes[at];
    let state = mesh.dir.join(format!("{}-clone", node.name));
    copy_dir(&node.state, &state)?;
    let _ = std::fs::remove_file(state.join("lock"));
    let mesh_addr = mesh.stage.mesh(node.slot);
    let other = match node.place {
        crate::stage::Place::Host => crate::free_port(),
        crate::stage::Place::Namespace(_) => (mesh_addr.listen.ip(), 7444).into(),
    };
    let (admin, outbound) = (mesh.stage.local(7412), mesh.stage.local(7411));
    let seed = mesh.stage.mesh(0).advertise;
    let args = [
        ("--name", node.name.clone()),
        ("--state", state.to_string_lossy().into_owned()),
        ("--listen", other.to_string()),
        ("--advertise", other.to_string()),
        ("--admin", admin.to_string()),
        ("--outbound", outbound.to_string()),
        ("--seed", seed.to_string()),
    ];
    let args: Vec<String> =
        std::iter::once("node".to_string()).chain(args.into_iter().flat_map(|(f, v)| [f.to_string(), v])).collect();
    let (binary, log) = (node.binary.clone(), state.with_extension("log"));
    Ok((node.place.within(move || Process::start(&binary, args, &log))?, other))
}
