//! A new process takes the place of a running one, on the same state directory and ports, without a break.
//!
//! ```text
//! the new process                          the one that runs
//!   Hello                  -->
//!                          <--  Left, and its descriptors     (it serves on)
//!   binds what is missing, checks its configuration
//!   Ready                  -->
//!                          <--  Go                            (it neither gossips nor admits any more)
//!   reads the state, gossips in a new generation, waits until the mesh has told it what there is
//!   Up                     -->
//!                          <--  Settled                       (it takes nothing new, and finishes what it has)
//!                          <--  end of the stream: it is gone
//! ```
//!
//! Until `Up`, whatever goes wrong in the new process leaves the old one in charge.

mod line;

use std::{
    fs::Permissions,
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
    time::Duration,
};

use rustix::process::{Signal, kill_process};
use serde::{Deserialize, Serialize};
use starling_http::shared_port::{Left, Ports};
use starling_protocol::{Name, ServiceState};
use tokio::net::{UnixListener, UnixStream};

use self::line::Line;

/// Socket in the state directory at which a running node can be asked for its place.
pub const SOCKET: &str = "takeover.sock";
/// The protocol that this version speaks.
const PROTOCOL: u32 = 1;
/// How long either side waits for the other's next word: for the new process to check all that it can.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long whoever asks may take to say who it is.
const HELLO: Duration = Duration::from_secs(5);
/// How long the new process may take to read the state and to get to know the mesh. Nobody speaks for the node if it stands still.
const GO: Duration = Duration::from_secs(10);
/// How long a process that has failed may take to end by itself.
const END: Duration = Duration::from_secs(2);

/// What the new process says.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    Hello { protocol: u32, pid: u32, version: String },
    Ready,
    Up { upgrade_timeout: Duration },
    Failed { why: String },
}

/// What the running one answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Left(Box<Told>),
    Go,
    Settled,
    Refused { why: String },
}

/// What a new process is told of the running one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) pid: u32,
    pub(crate) version: String,
    /// How its services are.
    pub(crate) health: Vec<Health>,
    /// Where the members are that it knows to be alive, but for itself.
    pub(crate) peers: Vec<SocketAddr>,
    pub(crate) ports: Left,
}

/// How a service is that is checked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Health {
    pub(crate) service: Name,
    pub(crate) addr: SocketAddr,
    pub(crate) state: ServiceState,
}

/// Why a place is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// Nobody can be asked.
    #[error(
        "no running node can be asked at {path} ({source}); start this one without --take-over, or upgrade a version \
         before takeovers by a restart"
    )]
    Nobody {
        /// The socket.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The running process does not give it.
    #[error("the running process does not give its place: {0}")]
    Refused(String),
    /// Its ports cannot be had.
    #[error("the ports of the running process cannot be taken: {0}")]
    Ports(#[source] io::Error),
    /// It broke off.
    #[error("the running process broke off: {0}")]
    Broken(#[from] io::Error),
    /// It does not answer.
    #[error("the running process does not answer in time")]
    Silent,
}

/// Where a node is to live: ports, and perhaps a process that has them now.
#[derive(Debug, Default)]
pub struct Place {
    ports: Ports,
    claim: Option<Claim>,
}

/// What a new process has been given.
#[derive(Debug)]
struct Claim {
    line: Line,
    lock: Option<OwnedFd>,
    told: Told,
}

impl Place {
    /// The place of the process that runs at that socket; it serves on.
    ///
    /// # Errors
    /// If there is none, or it does not give its place.
    pub async fn of_another(socket: &Path) -> Result<Self, TakeoverError> {
        let stream = UnixStream::connect(socket).await;
        let stream = stream.map_err(|source| TakeoverError::Nobody { path: socket.display().to_string(), source })?;
        let mut line = Line::new(stream);
        let version = env!("CARGO_PKG_VERSION").into();
        let asked = async {
            line.tell(&Word::Hello { protocol: PROTOCOL, pid: std::process::id(), version }).await?;
            let told = match line.hear().await? {
                Answer::Left(told) => told,
                Answer::Refused { why } => return Err(TakeoverError::Refused(why)),
                _ => return Err(TakeoverError::Refused("it speaks out of turn".into())),
            };
            let mut descriptors = line.take(1 + told.ports.descriptors()).await?.into_iter();
            let lock = descriptors.next();
            let ports = Ports::of_another(told.ports.clone(), descriptors.collect())?;
            Ok((ports, lock, *told))
        };
        let (ports, lock, told) = tokio::time::timeout(PATIENCE, asked).await.map_err(|_| TakeoverError::Silent)??;
        Ok(Self { ports, claim: Some(Claim { line, lock, told }) })
    }

    /// Where the node listens.
    pub fn ports(&mut self) -> &mut Ports {
        &mut self.ports
    }

    /// Process id of the one whose place it is.
    pub fn predecessor(&self) -> Option<u32> {
        self.claim.as_ref().map(|claim| claim.told.pid)
    }

    /// Tells the one whose place it is that it is not taken after all.
    pub async fn give_up(&mut self, why: &str) {
        if let Some(claim) = &mut self.claim {
            let _ = claim.line.tell(&Word::Failed { why: why.into() }).await;
        }
    }

    /// What was told of the process whose place it is.
    pub(crate) fn told(&self) -> Option<&Told> {
        self.claim.as_ref().map(|claim| &claim.told)
    }

    /// The lock on the state directory, which is shared with the one whose place it is.
    pub(crate) fn take_lock(&mut self) -> Option<OwnedFd> {
        self.claim.as_mut().and_then(|claim| claim.lock.take())
    }

    /// All is checked that can be: asks for the state.
    pub(crate) async fn ready(&mut self) -> Result<(), TakeoverError> {
        let Some(claim) = &mut self.claim else { return Ok(()) };
        let asked = async {
            claim.line.tell(&Word::Ready).await?;
            claim.line.hear::<Answer>().await
        };
        match tokio::time::timeout(PATIENCE, asked).await.map_err(|_| TakeoverError::Silent)?? {
            Answer::Go => Ok(()),
            Answer::Refused { why } => Err(TakeoverError::Refused(why)),
            _ => Err(TakeoverError::Refused("it speaks out of turn".into())),
        }
    }

    /// This process serves, and the one before has so long to finish. Returns when that one takes nothing new any more; what is
    /// returned tells when it is gone.
    pub(crate) async fn up(&mut self, upgrade_timeout: Duration) -> Result<Option<Predecessor>, TakeoverError> {
        let Some(Claim { mut line, told, .. }) = self.claim.take() else { return Ok(None) };
        // If this cannot be said, or is not answered, the other one is gone, and takes nothing either; unless it has said before that
        // it goes on.
        let _ = line.tell(&Word::Up { upgrade_timeout }).await;
        match tokio::time::timeout(PATIENCE, line.hear()).await {
            Ok(Ok(Answer::Refused { why })) => Err(TakeoverError::Refused(why)),
            _ => Ok(Some(Predecessor { line, pid: told.pid })),
        }
    }
}

/// The process before this one, which finishes what it has.
#[derive(Debug)]
pub(crate) struct Predecessor {
    line: Line,
    pub(crate) pid: u32,
}

impl Predecessor {
    /// Resolves when it is gone. Cancel safe.
    pub(crate) async fn gone(&mut self) {
        self.line.gone().await;
    }
}

/// Binds the socket at which this process can be asked for its place. Only its own user and root can.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// A new process that asks for this one's place.
#[derive(Debug)]
pub(crate) struct Successor {
    line: Line,
    pub(crate) pid: u32,
    pub(crate) version: String,
}

impl Successor {
    /// Hears who asks.
    pub(crate) async fn meet(stream: UnixStream) -> Result<Self, TakeoverError> {
        let mut line = Line::new(stream);
        let own = rustix::process::geteuid().as_raw();
        if !line.user().is_some_and(|user| user == own || user == 0) {
            return Err(Self::refused(line, "the node runs as another user").await);
        }
        let heard = tokio::time::timeout(HELLO, line.hear()).await.map_err(|_| TakeoverError::Silent)?;
        match heard? {
            Word::Hello { protocol, pid, version } if protocol == PROTOCOL => Ok(Self { line, pid, version }),
            Word::Hello { protocol, .. } => {
                let why = format!("the new process speaks version {protocol} of this, and the running one {PROTOCOL}");
                Err(Self::refused(line, &why).await)
            }
            _ => Err(Self::refused(line, "the new process did not say who it is").await),
        }
    }

    async fn refused(mut line: Line, why: &str) -> TakeoverError {
        let _ = line.tell(&Answer::Refused { why: why.into() }).await;
        TakeoverError::Refused(why.into())
    }

    /// Tells it what there is, gives it the lock and the ports, and waits until it has checked all that it can.
    pub(crate) async fn give(&mut self, told: Told, lock: OwnedFd, ports: Vec<OwnedFd>) -> Result<(), String> {
        let given = async {
            self.line.tell(&Answer::Left(Box::new(told))).await?;
            let descriptors: Vec<_> = std::iter::once(&lock).chain(&ports).map(AsFd::as_fd).collect();
            self.line.give(&descriptors).await
        };
        given.await.map_err(|e| e.to_string())?;
        match self.word(PATIENCE).await? {
            Word::Ready => Ok(()),
            other => Err(fault(other)),
        }
    }

    /// Lets it go on, and waits until it serves; returns how long this process may take to finish.
    pub(crate) async fn go(&mut self) -> Result<Duration, String> {
        self.line.tell(&Answer::Go).await.map_err(|e| e.to_string())?;
        match self.word(GO).await? {
            Word::Up { upgrade_timeout } => Ok(upgrade_timeout),
            other => Err(fault(other)),
        }
    }

    /// Tells it that this process takes nothing new any more.
    pub(crate) async fn settled(&mut self) {
        let _ = self.line.tell(&Answer::Settled).await;
    }

    /// Resolves when it is gone. Cancel safe.
    pub(crate) async fn gone(&mut self) {
        self.line.gone().await;
    }

    /// Tells it that it has failed, and waits until it is gone; ends it if it does not end by itself. Before that, what it had
    /// cannot be taken back: it may stand still, and go on.
    pub(crate) async fn end(&mut self, why: &str) {
        let end = async {
            let _ = self.line.tell(&Answer::Refused { why: why.into() }).await;
            self.line.gone().await;
        };
        if tokio::time::timeout(END, end).await.is_ok() {
            return;
        }
        let killed = self.line.pid().map(|pid| kill_process(pid, Signal::KILL));
        if !matches!(killed, Some(Ok(()))) || tokio::time::timeout(END, self.line.gone()).await.is_err() {
            tracing::error!(pid = self.pid, "a process that could not take over does not end; end it by hand");
        }
    }

    async fn word(&mut self, limit: Duration) -> Result<Word, String> {
        match tokio::time::timeout(limit, self.line.hear()).await {
            Ok(Ok(word)) => Ok(word),
            Ok(Err(_)) => Err("it ended before it could serve; its log says why".into()),
            Err(_) => Err(format!("it did not get on within {limit:?}")),
        }
    }
}

fn fault(word: Word) -> String {
    match word {
        Word::Failed { why } => why,
        _ => "it speaks out of turn".into(),
    }
}
