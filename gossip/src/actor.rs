//! One task that owns a [`Gossip`]: commands in, [`Outgoing`] out, watches of what everybody else reads.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use starling_protocol::{Delta, Items, Name, NodeId, Pong, SignedDocument, SignedStrike, Summary};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    Announcement, Counters, Detail, DocumentError, DocumentView, ForgetError, Gossip, Ident, Outgoing, Snapshot,
    Target, Via,
};

/// Commands that may wait for the actor. It handles each in microseconds; a full queue means a stalled process, and then
/// dropping datagrams is right.
const COMMANDS: usize = 1024;
/// Messages that may wait to be sent. Each can be lost: whatever they carry is repeated or found missing later.
const MESSAGES: usize = 4096;

enum Command {
    Datagram { from: NodeId, bytes: Bytes },
    Items { from: NodeId, items: Items, via: Via },
    Summary { from: NodeId, summary: Summary, reply: oneshot::Sender<Delta> },
    Delta { from: NodeId, with: Target, delta: Delta, reply: oneshot::Sender<Items> },
    Ping { from: NodeId, suspected: Option<u16>, reply: oneshot::Sender<Option<Pong>> },
    Checked { suspect: Ident, incarnation: u16, pong: Option<Pong> },
    Announce(Box<dyn FnOnce(&mut Announcement) + Send>),
    Publish { signed: SignedDocument, reply: oneshot::Sender<Result<(), DocumentError>> },
    Strike { signed: SignedStrike, reply: oneshot::Sender<Result<(), ForgetError>> },
    Malformed { from: NodeId },
    Seeds(Vec<SocketAddr>),
    Counters(oneshot::Sender<Counters>),
    Details(oneshot::Sender<Vec<Detail>>),
    Leave(oneshot::Sender<()>),
    Rest(oneshot::Sender<()>),
    Wake,
}

impl Command {
    /// Whether a node that rests has nothing to do with it.
    fn is_about_others(&self) -> bool {
        match self {
            Self::Datagram { .. }
            | Self::Items { .. }
            | Self::Summary { .. }
            | Self::Delta { .. }
            | Self::Ping { .. }
            | Self::Checked { .. }
            | Self::Publish { .. }
            | Self::Strike { .. }
            | Self::Malformed { .. } => true,
            Self::Announce(_)
            | Self::Seeds(_)
            | Self::Counters(_)
            | Self::Details(_)
            | Self::Leave(_)
            | Self::Rest(_)
            | Self::Wake => false,
        }
    }
}

/// What outlives the process: whoever watches it stores it.
#[derive(Debug, Clone, Default)]
pub struct Durable {
    /// The present life; to be stored before the next message is sent.
    pub generation: u64,
    /// Addresses of live members.
    pub peers: Vec<SocketAddr>,
    /// Mesh documents by kind.
    pub documents: BTreeMap<Name, DocumentView>,
}

/// Cheap to clone; the actor ends when the last one is dropped.
#[derive(Clone)]
pub struct GossipHandle {
    commands: mpsc::Sender<Command>,
    snapshot: watch::Receiver<Arc<Snapshot>>,
    durable: watch::Receiver<Durable>,
    dropped: Arc<AtomicU64>,
}

impl GossipHandle {
    /// Hands over a datagram from an authenticated peer; drops it if the actor is far behind.
    pub fn deliver(&self, from: NodeId, bytes: Bytes) {
        if self.commands.try_send(Command::Datagram { from, bytes }).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Hands over items from an authenticated peer.
    pub async fn receive(&self, from: NodeId, items: Items, via: Via) {
        let _ = self.commands.send(Command::Items { from, items, via }).await;
    }

    /// Hands over a peer's summary; returns the answer, or `None` when the actor is gone.
    pub async fn answer(&self, from: NodeId, summary: Summary) -> Option<Delta> {
        self.ask(|reply| Command::Summary { from, summary, reply }).await
    }

    /// Hands over a peer's answer to our summary; returns what it wants.
    pub async fn absorb(&self, from: NodeId, with: Target, delta: Delta) -> Option<Items> {
        self.ask(|reply| Command::Delta { from, with, delta, reply }).await
    }

    /// Hands over a ping that came on a stream.
    pub async fn answer_ping(&self, from: NodeId, suspected: Option<u16>) -> Option<Pong> {
        self.ask(|reply| Command::Ping { from, suspected, reply }).await.flatten()
    }

    /// Tells what came of a check.
    pub async fn checked(&self, suspect: Ident, incarnation: u16, pong: Option<Pong>) {
        let _ = self.commands.send(Command::Checked { suspect, incarnation, pong }).await;
    }

    /// Changes what this node tells about itself.
    pub async fn announce(&self, change: impl FnOnce(&mut Announcement) + Send + 'static) {
        let _ = self.commands.send(Command::Announce(Box::new(change))).await;
    }

    /// Publishes a signed document to the mesh; `None` when the actor is gone.
    pub async fn publish(&self, signed: SignedDocument) -> Option<Result<(), DocumentError>> {
        self.ask(|reply| Command::Publish { signed, reply }).await
    }

    /// Strikes a dead member off, mesh-wide; `None` when the actor is gone.
    pub async fn strike(&self, signed: SignedStrike) -> Option<Result<(), ForgetError>> {
        self.ask(|reply| Command::Strike { signed, reply }).await
    }

    /// An authenticated peer sent something on a stream that is not in the protocol's form.
    pub fn malformed(&self, from: NodeId) {
        // Lost when the actor is far behind: it is counted where it came in, too.
        let _ = self.commands.try_send(Command::Malformed { from });
    }

    /// Replaces the seeds.
    pub async fn set_seeds(&self, seeds: Vec<SocketAddr>) {
        let _ = self.commands.send(Command::Seeds(seeds)).await;
    }

    /// What was counted so far.
    pub async fn counters(&self) -> Counters {
        self.ask(Command::Counters).await.unwrap_or_default()
    }

    /// Messages, in and out, that were dropped because a queue was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// What is known of each member at this moment, beside the snapshot.
    pub async fn details(&self) -> Vec<Detail> {
        self.ask(Command::Details).await.unwrap_or_default()
    }

    /// Says good-bye; returns when the messages are on their way out.
    pub async fn leave(&self) {
        self.ask(Command::Leave).await;
    }

    /// Hears and says nothing more, and has nothing stored, until [`Self::wake`]: another process speaks for this node. Returns
    /// when it is so.
    pub async fn rest(&self) {
        self.ask(Command::Rest).await;
    }

    /// Goes on, as after a time in which the process stood still.
    pub async fn wake(&self) {
        let _ = self.commands.send(Command::Wake).await;
    }

    /// The mesh as it is now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// Follows the mesh.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.clone()
    }

    /// Follows what is to be stored, mesh documents among it.
    pub fn durable(&self) -> watch::Receiver<Durable> {
        self.durable.clone()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Where the actor's output goes.
struct Outputs {
    messages: mpsc::Sender<Outgoing>,
    snapshot: watch::Sender<Arc<Snapshot>>,
    durable: watch::Sender<Durable>,
    dropped: Arc<AtomicU64>,
}

/// Puts `gossip` on a task of the current runtime. What it wants sent comes out of the receiver, and what it wants stored
/// out of [`GossipHandle::durable`]; whoever holds the receiver does the I/O.
pub fn spawn(mut gossip: Gossip) -> (GossipHandle, mpsc::Receiver<Outgoing>) {
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let (messages, outgoing) = mpsc::channel(MESSAGES);
    let (publish, snapshot) = watch::channel(Arc::new(Snapshot::default()));
    let (keep, durable) = watch::channel(Durable { generation: gossip.me().generation, ..Durable::default() });
    let dropped = Arc::new(AtomicU64::new(0));
    let outputs = Outputs { messages, snapshot: publish, durable: keep, dropped: dropped.clone() };
    flush(&mut gossip, &outputs, Instant::now());
    tokio::spawn(run(gossip, inbox, outputs));
    (GossipHandle { commands, snapshot, durable, dropped }, outgoing)
}

async fn run(mut gossip: Gossip, mut inbox: mpsc::Receiver<Command>, outputs: Outputs) {
    let mut rests = false;
    loop {
        let tick = tokio::time::sleep_until(gossip.next_tick().into());
        // Messages before timers: after a stall, the answers that wait in the inbox must be seen before the probes that
        // they answer are given up.
        tokio::select! {
            biased;
            command = inbox.recv() => match command {
                Some(Command::Rest(done)) => {
                    rests = true;
                    let _ = done.send(());
                }
                Some(Command::Wake) => rests = false,
                Some(command) if rests && command.is_about_others() => {}
                Some(command) => handle(&mut gossip, command, &outputs),
                None => return,
            },
            () = tick, if !rests => {
                let now = Instant::now();
                if let Ok(unix) = SystemTime::now().duration_since(UNIX_EPOCH) {
                    gossip.set_clock(now, unix.as_secs());
                }
                gossip.tick(now);
            }
        }
        match rests {
            true => gossip.drain(Instant::now()).into_iter().for_each(|outgoing| {
                if let Outgoing::Changed(snapshot) = outgoing {
                    outputs.snapshot.send_replace(snapshot);
                }
            }),
            false => flush(&mut gossip, &outputs, Instant::now()),
        }
    }
}

fn handle(gossip: &mut Gossip, command: Command, outputs: &Outputs) {
    let now = Instant::now();
    // Whoever asked may have gone away: an answer that nobody takes is no error.
    match command {
        Command::Datagram { from, bytes } => gossip.deliver(from, &bytes, now),
        Command::Items { from, items, via } => gossip.receive(from, items, via, now),
        Command::Summary { from, summary, reply } => drop(reply.send(gossip.answer(from, summary, now))),
        Command::Delta { from, with, delta, reply } => drop(reply.send(gossip.absorb(from, with, delta, now))),
        Command::Ping { from, suspected, reply } => drop(reply.send(gossip.answer_ping(from, suspected, now))),
        Command::Checked { suspect, incarnation, pong } => gossip.checked(suspect, incarnation, pong, now),
        Command::Announce(change) => {
            let mut announcement = gossip.announcement().clone();
            change(&mut announcement);
            gossip.announce(announcement, now);
        }
        Command::Publish { signed, reply } => drop(reply.send(gossip.publish(signed, now))),
        Command::Strike { signed, reply } => drop(reply.send(gossip.strike(signed, now))),
        Command::Malformed { from } => gossip.malformed(from, now),
        Command::Seeds(seeds) => gossip.set_seeds(seeds),
        Command::Counters(reply) => drop(reply.send(gossip.counters())),
        Command::Details(reply) => drop(reply.send(gossip.details(now))),
        Command::Leave(done) => {
            gossip.leave(now);
            flush(gossip, outputs, now);
            let _ = done.send(());
        }
        // Of the task's own.
        Command::Rest(_) | Command::Wake => {}
    }
}

fn flush(gossip: &mut Gossip, outputs: &Outputs, now: Instant) {
    for outgoing in gossip.drain(now) {
        match outgoing {
            Outgoing::Changed(snapshot) => {
                outputs.snapshot.send_replace(snapshot);
            }
            Outgoing::Generation(generation) => outputs.durable.send_modify(|d| d.generation = generation),
            Outgoing::Peers(peers) => outputs.durable.send_modify(|d| d.peers = peers),
            Outgoing::Document(view) => outputs.durable.send_modify(|d| {
                d.documents.insert(view.document.kind.clone(), view);
            }),
            message => {
                if outputs.messages.try_send(message).is_err() {
                    outputs.dropped.fetch_add(1, Relaxed);
                }
            }
        }
    }
}
