//! One task that owns a [`Gossip`]: commands in, [`Outgoing`] out, a watch of the snapshot for everybody else.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use bytes::Bytes;
use starling_protocol::{FullState, NodeId, SignedRecord};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{Announcement, Counters, Gossip, Outgoing, Snapshot};

/// Commands that may wait for the actor. It handles each in microseconds; a full queue means a stalled process, and then
/// dropping datagrams is right.
const COMMANDS: usize = 1024;

enum Command {
    Datagram { from: NodeId, bytes: Bytes },
    Records { from: NodeId, records: Vec<SignedRecord> },
    Sync { from: NodeId, state: FullState, reply: oneshot::Sender<FullState> },
    SyncReply { from: NodeId, state: FullState },
    Announce(Box<dyn FnOnce(&mut Announcement) + Send>),
    Seeds(Vec<SocketAddr>),
    Counters(oneshot::Sender<Counters>),
    Leave(oneshot::Sender<()>),
}

/// Cheap to clone; the actor ends when the last one is dropped.
#[derive(Clone)]
pub struct GossipHandle {
    commands: mpsc::Sender<Command>,
    snapshot: watch::Receiver<Arc<Snapshot>>,
}

impl GossipHandle {
    /// Hands over a datagram from an authenticated peer; drops it if the actor is far behind.
    pub fn deliver(&self, from: NodeId, bytes: Bytes) {
        let _ = self.commands.try_send(Command::Datagram { from, bytes });
    }

    /// Hands over pushed records from an authenticated peer.
    pub async fn receive_records(&self, from: NodeId, records: Vec<SignedRecord>) {
        let _ = self.commands.send(Command::Records { from, records }).await;
    }

    /// Hands over a peer's full state; returns ours, or `None` when the actor is gone.
    pub async fn sync(&self, from: NodeId, state: FullState) -> Option<FullState> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Sync { from, state, reply }).await.ok()?;
        answer.await.ok()
    }

    /// Hands over a peer's answer to our full state.
    pub async fn sync_reply(&self, from: NodeId, state: FullState) {
        let _ = self.commands.send(Command::SyncReply { from, state }).await;
    }

    /// Changes what this node tells about itself.
    pub async fn announce(&self, change: impl FnOnce(&mut Announcement) + Send + 'static) {
        let _ = self.commands.send(Command::Announce(Box::new(change))).await;
    }

    /// Replaces the seeds.
    pub async fn set_seeds(&self, seeds: Vec<SocketAddr>) {
        let _ = self.commands.send(Command::Seeds(seeds)).await;
    }

    /// What was refused so far.
    pub async fn counters(&self) -> Counters {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Counters(reply)).await;
        answer.await.unwrap_or_default()
    }

    /// Says good-bye; returns when the messages are on their way out.
    pub async fn leave(&self) {
        let (done, left) = oneshot::channel();
        let _ = self.commands.send(Command::Leave(done)).await;
        let _ = left.await;
    }

    /// The mesh as it is now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// Follows the mesh.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.clone()
    }
}

/// Puts `gossip` on a task of the current runtime. What it wants sent or stored comes out of the receiver; whoever holds
/// it does the I/O, and must keep reading.
pub fn spawn(mut gossip: Gossip) -> (GossipHandle, mpsc::UnboundedReceiver<Outgoing>) {
    let (commands, inbox) = mpsc::channel(COMMANDS);
    // Unbounded because its only producer is bounded by its own inbox and timers.
    let (out, outgoing) = mpsc::unbounded_channel();
    let (publish, snapshot) = watch::channel(Arc::new(Snapshot::default()));
    flush(&mut gossip, &out, &publish);
    tokio::spawn(run(gossip, inbox, out, publish));
    (GossipHandle { commands, snapshot }, outgoing)
}

async fn run(
    mut gossip: Gossip,
    mut inbox: mpsc::Receiver<Command>,
    out: mpsc::UnboundedSender<Outgoing>,
    publish: watch::Sender<Arc<Snapshot>>,
) {
    loop {
        let tick = tokio::time::sleep_until(gossip.next_tick().into());
        // Messages before timers: after a stall, the answers that wait in the inbox must be seen before the probes that
        // they answer are given up.
        tokio::select! {
            biased;
            command = inbox.recv() => match command {
                Some(command) => handle(&mut gossip, command, &out, &publish),
                None => return,
            },
            () = tick => gossip.tick(Instant::now()),
        }
        flush(&mut gossip, &out, &publish);
    }
}

fn handle(
    gossip: &mut Gossip,
    command: Command,
    out: &mpsc::UnboundedSender<Outgoing>,
    publish: &watch::Sender<Arc<Snapshot>>,
) {
    let now = Instant::now();
    match command {
        Command::Datagram { from, bytes } => gossip.deliver(from, &bytes, now),
        Command::Records { from, records } => gossip.receive_records(from, records, now),
        Command::Sync { from, state, reply } => {
            let _ = reply.send(gossip.sync(from, state, now));
        }
        Command::SyncReply { from, state } => gossip.sync_reply(from, state, now),
        Command::Announce(change) => {
            let mut announcement = gossip.announcement().clone();
            change(&mut announcement);
            gossip.announce(announcement, now);
        }
        Command::Seeds(seeds) => gossip.set_seeds(seeds),
        Command::Counters(reply) => {
            let _ = reply.send(gossip.counters());
        }
        Command::Leave(done) => {
            gossip.leave(now);
            flush(gossip, out, publish);
            let _ = done.send(());
        }
    }
}

fn flush(gossip: &mut Gossip, out: &mpsc::UnboundedSender<Outgoing>, publish: &watch::Sender<Arc<Snapshot>>) {
    for outgoing in gossip.drain() {
        match outgoing {
            Outgoing::Changed(snapshot) => {
                publish.send_replace(snapshot);
            }
            other => {
                let _ = out.send(other);
            }
        }
    }
}
