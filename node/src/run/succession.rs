//! How a running node gives its place to a new process, and how that one takes it.

use std::{
    io,
    path::PathBuf,
    process::ExitStatus,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use starling_protocol::admin as json;
use tokio::{net::UnixListener, process::Command, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Node, Running, StartError};
use crate::{
    admin,
    identity::{admission::Resting, names},
    takeover::{self, Place, Predecessor, SOCKET, Successor, TakeoverError, Told},
};

/// Where the environment of a process that this one starts has the socket to ask at.
pub const ENVIRONMENT: &str = "STARLING_TAKEOVER_SOCKET";
/// Where the environment says with whom a process ends: its parent, or the process of that id.
pub const EXIT_WITH: &str = "STARLING_EXIT_WITH_PARENT";
/// Says that it is the parent.
const EXIT_WITH_PARENT: &str = "parent";
/// How long a process may take that is started by this one, in all; each of its steps has a limit of its own.
const LIMIT: Duration = Duration::from_secs(90);
/// How long a process that was started, and has failed, may take to end.
const END: Duration = Duration::from_secs(5);
/// How often a process that takes over looks whether it knows the mesh.
const LOOK: Duration = Duration::from_millis(20);
/// For how long a process stays at least that another one has taken over from.
const HEARD: Duration = Duration::from_secs(1);
/// How long flows of packets may take to get sockets of their own.
const SETTLE: Duration = Duration::from_secs(2);
/// Pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(100);

/// Where a process is in the line of those that have had its node's place.
#[derive(Default)]
pub(super) struct Succession {
    /// The one before, while it finishes.
    predecessor: Mutex<Option<u32>>,
    /// This one has the place, and every packet is for it that the one before does not expect.
    pub(super) in_charge: CancellationToken,
    /// Another process has it.
    pub(super) superseded: CancellationToken,
    /// That this process decides nothing yet, as an issuer.
    deciding: Mutex<Option<Resting>>,
    /// Ports for packets that still take what the next one should have.
    pub(super) unsettled: TaskTracker,
    /// What became of the last that asked for this one's place, and its process id.
    attempt: watch::Sender<Option<(u32, Result<json::Upgraded, String>)>>,
    /// One is started at a time.
    starting: tokio::sync::Mutex<()>,
    /// The one that has it now, and how long this one may take to finish.
    successor: watch::Sender<Option<(u32, Duration)>>,
    /// That one is gone, too.
    orphaned: CancellationToken,
}

impl Succession {
    /// Process id of the one before, while it finishes.
    pub(super) fn predecessor(&self) -> Option<u32> {
        *self.predecessor.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Holds back what an issuer decides, until the node is in charge.
    pub(super) fn hold(&self, resting: Resting) {
        *self.deciding() = Some(resting);
    }

    fn deciding(&self) -> MutexGuard<'_, Option<Resting>> {
        self.deciding.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn set_predecessor(&self, pid: Option<u32>) {
        *self.predecessor.lock().unwrap_or_else(|e| e.into_inner()) = pid;
    }
}

impl Node {
    /// From now on this process has the ports, and others can ask for its place; the one before, if there is one, finishes what it
    /// has.
    ///
    /// # Errors
    /// If the ports cannot be taken: then the one before stays in charge, and this one must end.
    pub async fn take_charge(&self, place: &mut Place) -> Result<(), StartError> {
        let running = self.running.clone();
        if place.predecessor().is_some() {
            running.ports().take_all().map_err(TakeoverError::Ports)?;
        }
        if let Some(before) = place.up(running.config.node.upgrade_timeout).await? {
            tracing::info!(predecessor = before.pid, "this process has taken over");
            running.succession.set_predecessor(Some(before.pid));
            running.ports().leave_the_rest();
            tokio::spawn(running.clone().outlive(before));
        }
        running.succession.in_charge.cancel();
        drop(running.succession.deciding().take());
        let admin_listener = self.admin_listener.lock().unwrap_or_else(|e| e.into_inner()).take();
        {
            let (ended, mut duties) = (running.succession.superseded.clone(), running.duties());
            duties.spawn(names::run(running.admission.clone()));
            if let Some(listener) = admin_listener {
                duties.spawn(admin::serve_tcp(listener, running.clone(), ended.clone()));
            }
            let (socket, subject) = (running.state.path().join("admin.sock"), running.clone());
            duties.spawn(async move { admin::serve_unix(&socket, subject, ended).await });
        }
        let path = running.state.path().join(SOCKET);
        match takeover::listen(&path) {
            Ok(listener) => drop(tokio::spawn(running.offer(listener))),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no new process can take over: the next upgrade is a restart");
            }
        }
        Ok(())
    }

    /// Resolves when another process has taken over; then there is nothing to do but [`Node::finish_for_successor`]. Returns its
    /// process id. Cancel safe.
    pub async fn superseded(&self) -> u32 {
        let mut successor = self.running.succession.successor.subscribe();
        let found = successor.wait_for(Option::is_some).await.ok().and_then(|found| *found);
        match found {
            Some((pid, _)) => pid,
            None => std::future::pending().await,
        }
    }

    /// Finishes what this process has, after another one has taken over, and tells nobody in the mesh: the node goes on. `hurry`
    /// leaves it no more than `drain_timeout`, and so does the end of the other one. Returns whether every call finished by itself.
    pub async fn finish_for_successor(&self, hurry: impl Future<Output = ()>) -> bool {
        let running = &self.running;
        let patience = running.succession.successor.borrow().map_or(Duration::ZERO, |(_, patience)| patience);
        let finish = async |patience| {
            let (others, own) = tokio::join!(
                running.drain.finish_connections(patience),
                running.doors_drain.finish_connections(patience)
            );
            others && own
        };
        // Whoever looks after the processes has to hear of the new one before this one is gone.
        let heard = tokio::time::sleep(HEARD);
        let cut_short = async {
            tokio::select! {
                () = hurry => {}
                () = running.succession.orphaned.cancelled() => {
                    tracing::error!("the process that has taken over is gone; this one finishes, and frees the ports");
                }
            }
            finish(running.config.node.drain_timeout).await
        };
        let finished = tokio::select! {
            finished = finish(patience) => finished,
            finished = cut_short => finished,
        };
        heard.await;
        self.close().await;
        finished
    }
}

impl Running {
    /// What a process does that takes over, before it opens its doors: takes the gossip, and waits until the mesh has told it what
    /// there is.
    pub(super) async fn meet_the_mesh(&self, members: usize) -> Result<(), StartError> {
        self.ports().take_fixed().map_err(TakeoverError::Ports)?;
        let is_over = || self.introduction.is_over(&self.gossip.snapshot());
        while !is_over() {
            tokio::time::sleep(LOOK).await;
        }
        if members > 0 && !self.gossip.snapshot().introduced {
            return Err(StartError::Alone { members });
        }
        Ok(())
    }

    /// Takes what is left of the port of the process before, when that one is gone.
    async fn outlive(self: Arc<Self>, mut before: Predecessor) {
        before.gone().await;
        self.succession.set_predecessor(None);
        if let Err(error) = self.ports().forget_the_one_before() {
            tracing::warn!(%error, "the connections of the process before learn late that it is gone");
        }
        tracing::info!(pid = before.pid, "the process before has finished");
    }

    /// Gives this node's place to the first process that can have it.
    async fn offer(self: Arc<Self>, listener: UnixListener) {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(_) => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let mut successor = match Successor::meet(stream).await {
                Ok(successor) => successor,
                Err(error) => {
                    tracing::warn!(%error, "a process asked for this one's place in vain");
                    continue;
                }
            };
            let (pid, version) = (successor.pid, successor.version.clone());
            if let Some(why) = self.is_kept() {
                successor.end(&why).await;
                self.attempted(pid, Err(why));
                continue;
            }
            tracing::info!(pid, version, "a process asks for this one's place");
            match self.give(&mut successor).await {
                Ok(patience) => {
                    self.duties().abort_all();
                    self.admission.retire();
                    self.succession.superseded.cancel();
                    self.drain.begin();
                    self.doors_drain.begin();
                    self.ports().close_listeners();
                    self.succession.unsettled.close();
                    let _ = tokio::time::timeout(SETTLE, self.succession.unsettled.wait()).await;
                    successor.settled().await;
                    self.succession.successor.send_replace(Some((pid, patience)));
                    self.attempted(pid, Ok(json::Upgraded { pid, version, predecessor: std::process::id() }));
                    drop(listener);
                    successor.gone().await;
                    return self.succession.orphaned.cancel();
                }
                Err(why) => self.attempted(pid, Err(why)),
            }
        }
    }

    /// Why nobody can have this node's place at the moment.
    fn is_kept(&self) -> Option<String> {
        if std::process::id() == 1 {
            return Some("the running process is the first of its container, which ends with it; restart that".into());
        }
        if self.drain_asked.is_cancelled() {
            return Some("the node is leaving the mesh".into());
        }
        if let Some(pid) = self.succession.predecessor() {
            return Some(format!(
                "process {pid}, from which the running one took over, has not finished yet; wait for it, or end it"
            ));
        }
        if !self.ports().can_be_left() {
            return Some(
                "this system does not steer packets to one of two processes on a port; upgrade by a restart".into(),
            );
        }
        None
    }

    /// Gives all, step by step; takes it back if the other one fails. Returns how long this process may take to finish.
    async fn give(&self, successor: &mut Successor) -> Result<Duration, String> {
        let leaving = async {
            self.drain_asked.cancelled().await;
            Err("the node is leaving the mesh".into())
        };
        let mut deciding = None;
        let outcome = tokio::select! {
            outcome = self.step_by_step(successor, &mut deciding) => outcome,
            left = leaving => left,
        };
        if let Err(why) = &outcome {
            tracing::error!(pid = successor.pid, why, "another process could not take over; this one stays in charge");
            successor.end(why).await;
            if let Err(error) = self.ports().take_all() {
                tracing::error!(%error, "the ports cannot be taken back");
            }
            self.links.rest(false);
            self.gossip.wake().await;
        }
        outcome
    }

    async fn step_by_step(
        &self,
        successor: &mut Successor,
        deciding: &mut Option<Resting>,
    ) -> Result<Duration, String> {
        let text = |e: io::Error| e.to_string();
        let lock = self.lock.share().map_err(text)?;
        let (told, ports) = {
            let mut ports = self.ports();
            ports.make_room().map_err(text)?;
            let (left, descriptors) = ports.left();
            let copies = descriptors.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<Vec<_>>>();
            let snapshot = self.gossip.snapshot();
            let told = Told {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
                health: self.condition.health(&self.config.service),
                peers: snapshot.members.iter().filter(|m| m.is_live() && !m.is_self).map(|m| m.addr).collect(),
                ports: left,
            };
            (told, copies.map_err(text)?)
        };
        successor.give(told, lock, ports).await?;
        *deciding = Some(self.admission.rest().await);
        self.gossip.rest().await;
        self.links.rest(true);
        // That this process ends is not the fault of any document.
        self.documents.acquit();
        successor.go().await
    }

    fn attempted(&self, pid: u32, outcome: Result<json::Upgraded, String>) {
        self.succession.attempt.send_replace(Some((pid, outcome)));
    }

    /// Starts a process that takes over, with the arguments of this one, and waits for what comes of it.
    pub(super) async fn start_successor(&self, binary: Option<String>) -> Result<json::Upgraded, String> {
        let Ok(_one) = self.succession.starting.try_lock() else {
            return Err("another upgrade is under way".into());
        };
        if let Some(why) = self.is_kept() {
            return Err(why);
        }
        let mut attempt = self.succession.attempt.subscribe();
        let arguments: Vec<_> = std::env::args_os().collect();
        let (own, arguments) = arguments.split_first().ok_or("this process does not know its own program")?;
        let program = binary.map_or_else(|| PathBuf::from(own), PathBuf::from);
        let mut command = Command::new(&program);
        command.args(arguments).env(ENVIRONMENT, self.state.path().join(SOCKET));
        if std::env::var_os(EXIT_WITH).is_some_and(|whom| whom == EXIT_WITH_PARENT)
            && let Some(parent) = rustix::process::getppid()
        {
            // Not with this one, which is its parent.
            command.env(EXIT_WITH, parent.as_raw_nonzero().to_string());
        }
        let shown = program.display();
        let mut child = command.spawn().map_err(|e| format!("cannot run {shown}: {e}"))?;
        let ended = |status: io::Result<ExitStatus>| match status {
            Ok(status) => format!("{shown} ended before it asked for the place ({status}); its log says why"),
            Err(error) => format!("{shown}: {error}"),
        };
        let own = child.id();
        // Any that has worked, too: this process has no place to give then.
        let is_it = |made: &Option<(u32, Result<json::Upgraded, String>)>| {
            made.as_ref().is_some_and(|(pid, outcome)| Some(*pid) == own || outcome.is_ok())
        };
        let outcome = tokio::time::timeout(LIMIT, async {
            tokio::select! {
                biased;
                made = attempt.wait_for(is_it) => match made {
                    Ok(made) => made.clone().map_or_else(|| Err("nobody has asked".into()), |(_, outcome)| outcome),
                    Err(_) => Err("this node ends".into()),
                },
                status = child.wait() => Err(ended(status)),
            }
        });
        let outcome = outcome.await.unwrap_or_else(|_| Err(format!("{shown} did not take over within {LIMIT:?}")));
        if outcome.is_err()
            && tokio::time::timeout(END, child.wait()).await.is_err()
            && self.succession.successor.borrow().is_none()
        {
            let _ = child.start_kill();
        }
        outcome
    }
}
