//! Connections to peers, for calls.

mod dial;
mod pool;
mod silence;

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
};

use http::request;
use starling_http::{h3::client::Client, tunnel::Protocol};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{dial::DialError, pool::Pool};

/// Which of the connections to a peer a call goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// All but packets.
    Calls,
    /// UDP packets: a connection sends datagrams before everything else, so that a flow of them would leave calls nothing.
    Packets,
}

impl Lane {
    /// The one of a request.
    pub(crate) fn of(request: &request::Parts) -> Self {
        match request.extensions.get::<Protocol>() {
            Some(protocol) if protocol.is_udp() => Self::Packets,
            _ => Self::Calls,
        }
    }
}

/// Tunnels on a connection that leave room for calls on it, of 4,096 streams; whoever comes then gets a new one.
const MAX_TUNNELS: u32 = 2048;

/// A live connection to a peer. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Connection(Arc<State>);

struct State {
    client: Client,
    silent: CancellationToken,
    generation: u64,
    /// Calls under way on it, tunnels among them.
    calls: AtomicU32,
    tunnels: AtomicU32,
    /// Woken with each call.
    busy: Arc<Notify>,
    retired: AtomicBool,
}

impl Connection {
    fn new(client: Client, generation: u64) -> Self {
        Self(Arc::new(State {
            client,
            silent: CancellationToken::new(),
            generation,
            calls: AtomicU32::new(0),
            tunnels: AtomicU32::new(0),
            busy: Arc::default(),
            retired: AtomicBool::new(false),
        }))
    }

    pub(crate) fn client(&self) -> &Client {
        &self.0.client
    }

    fn is_usable(&self, generation: u64) -> bool {
        // A peer that came back under a new generation may be a new process: calls under way may finish on the old
        // connection, new ones must not be the first to find out that it is gone.
        self.0.generation >= generation
            && !self.0.retired.load(Relaxed)
            && self.0.tunnels.load(Relaxed) < MAX_TUNNELS
            && self.0.client.takes_requests()
    }

    /// Takes no more calls; those under way keep it alive.
    pub(crate) fn retire(&self) {
        self.0.retired.store(true, Relaxed);
    }

    /// A call begins; somebody notices if the peer falls silent meanwhile. It ends when what is returned is dropped.
    pub(crate) fn begin(self, is_tunnel: bool) -> InUse {
        self.0.calls.fetch_add(1, Relaxed);
        self.0.tunnels.fetch_add(is_tunnel.into(), Relaxed);
        self.0.busy.notify_one();
        InUse { connection: self, is_tunnel }
    }

    /// Resolves when the peer has fallen silent with calls under way. Cancel safe.
    pub(crate) async fn silent(&self) {
        self.0.silent.cancelled().await;
    }
}

/// A connection that carries a call.
pub(crate) struct InUse {
    connection: Connection,
    is_tunnel: bool,
}

impl Deref for InUse {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let State { calls, tunnels, .. } = &*self.connection.0;
        calls.fetch_sub(1, Relaxed);
        tunnels.fetch_sub(self.is_tunnel.into(), Relaxed);
    }
}
