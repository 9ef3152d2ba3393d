//! All agents of one system on loopback: started, watched, killed and started again.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::system::{self, SEED, System};
use super::view::{Members, Status};
use crate::process::Process;

/// How often the one agent that is waited for is asked, whatever the system.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How long the agents may take to agree on anything.
const AGREE_LIMIT: Duration = Duration::from_secs(300);

/// Running agents; they are killed when it is dropped.
pub(crate) struct Mesh<'a> {
    system: &'a System,
    dir: &'a Path,
    /// In the order of their numbers; `None` for one that was killed and is not back.
    agents: Vec<Option<Process>>,
}

/// When the last agent was seen to know what was waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Agreed {
    /// The moment after the last reading.
    pub(crate) at: Instant,
    /// The time since an agent was last seen not to know it: by so much at most is `at` too late.
    pub(crate) gap: Duration,
}

impl<'a> Mesh<'a> {
    /// Starts the seed, waits until it answers, and starts the others as fast as they can be started.
    ///
    /// Also gives the moment before the last one was started.
    pub(crate) fn start(system: &'a System, nodes: u16, dir: &'a Path) -> Result<(Self, Instant)> {
        let mut mesh = Self { system, dir, agents: vec![Some(system.start(SEED, dir)?)] };
        mesh.watch("the seed answers", None, all_alive(0..1))?;
        let mut last = Instant::now();
        for index in SEED + 1..nodes {
            last = Instant::now();
            mesh.agents.push(Some(system.start(index, dir)?));
        }
        Ok((mesh, last))
    }

    /// Waits until every agent has shown all of them alive.
    pub(crate) fn wait_all_alive(&mut self) -> Result<Agreed> {
        self.watch("all see all alive", None, all_alive(self.indices()))
    }

    /// Asks every agent once; an error unless each shows all of them alive.
    pub(crate) fn check_all_alive(&self) -> Result<()> {
        let check = all_alive(self.indices());
        for index in self.indices() {
            check(&self.system.view(index).members()?).with_context(|| system::name(index))?;
        }
        Ok(())
    }

    /// Kills an agent with SIGKILL and waits until every other shows it as down; gives the moment before the kill too.
    pub(crate) fn kill(&mut self, victim: u16) -> Result<(Instant, Agreed)> {
        let process = self.agents[usize::from(victim)].take().context("the agent to kill is not running")?;
        let name = system::name(victim);
        let killed = Instant::now();
        drop(process);
        let check = |members: &Members| {
            let status = members.status(&name);
            ensure!(status == Some(Status::Down), "sees it as {}", word(status));
            Ok(())
        };
        Ok((killed, self.watch(&format!("all see {name} down"), Some(victim), check)?))
    }

    /// Starts an agent that was killed.
    pub(crate) fn restart(&mut self, victim: u16) -> Result<()> {
        self.agents[usize::from(victim)] = Some(self.system.start(victim, self.dir)?);
        Ok(())
    }

    /// The agents that run.
    pub(crate) fn processes(&self) -> impl Iterator<Item = &Process> {
        self.agents.iter().flatten()
    }

    fn indices(&self) -> Range<u16> {
        0..self.agents.len() as u16
    }

    /// Reads the agents but `except` one after the other, each again and again until it passes `check`.
    ///
    /// What is waited for comes to stay, so this ends when the last agent has come to it. It asks one agent at a time:
    /// asking all of them all the time would keep a small machine from its work. The last one started is the first to
    /// be read, because it is likely to be the last to know.
    fn watch(&mut self, what: &str, except: Option<u16>, check: impl Fn(&Members) -> Result<()>) -> Result<Agreed> {
        let start = Instant::now();
        let mut not_yet = start;
        for index in self.indices().rev().filter(|index| Some(*index) != except) {
            let mut view = self.system.view(index);
            loop {
                let asked = Instant::now();
                let Err(reason) = view.members().and_then(|members| check(&members)) else { break };
                not_yet = asked;
                for process in self.agents.iter_mut().flatten() {
                    process.check_alive().with_context(|| format!("waiting until {what}"))?;
                }
                if start.elapsed() > AGREE_LIMIT {
                    let name = system::name(index);
                    return Err(reason).context(format!("not within {} s: {what}: {name}", AGREE_LIMIT.as_secs()));
                }
                std::thread::sleep(POLL_INTERVAL.saturating_sub(asked.elapsed()));
            }
        }
        let at = Instant::now();
        Ok(Agreed { at, gap: at - not_yet })
    }
}

/// Whether an agent shows all of these alive; the error names one that it does not.
fn all_alive(indices: Range<u16>) -> impl Fn(&Members) -> Result<()> {
    let names: Vec<String> = indices.map(system::name).collect();
    move |members| {
        let missing: Vec<&String> = names.iter().filter(|name| members.status(name) != Some(Status::Alive)).collect();
        let Some(first) = missing.first() else { return Ok(()) };
        bail!("sees {first} as {}, and {} of {} not alive", word(members.status(first)), missing.len(), names.len())
    }
}

fn word(status: Option<Status>) -> &'static str {
    match status {
        Some(Status::Alive) => "alive",
        Some(Status::Down) => "down",
        Some(Status::Other) => "suspect or left",
        None => "unknown",
    }
}
