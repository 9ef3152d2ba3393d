//! Connections to peers, for calls.

mod dial;
mod pool;
mod silence;

use std::sync::Arc;

use bytes::Bytes;
use starling_http::guard;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub(crate) use self::pool::{DialError, Pool};

pub(crate) type SendRequest = h3::client::SendRequest<guard::Opener, Bytes>;

/// A live connection to a peer.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) send: SendRequest,
    pub(crate) silent: CancellationToken,
    generation: u64,
    connection: quinn::Connection,
    busy: Arc<Notify>,
    retired: CancellationToken,
}

impl Connection {
    fn is_usable(&self, generation: u64) -> bool {
        // A peer that came back under a new generation may be a new process: calls under way may finish on the old
        // connection, new ones must not be the first to find out that it is gone.
        self.generation >= generation && !self.retired.is_cancelled() && self.connection.close_reason().is_none()
    }

    /// Takes no more calls; those under way keep it alive.
    pub(crate) fn retire(&self) {
        self.retired.cancel();
    }

    /// A call begins: somebody should notice if the peer falls silent.
    pub(crate) fn wake_watch(&self) {
        self.busy.notify_one();
    }
}
