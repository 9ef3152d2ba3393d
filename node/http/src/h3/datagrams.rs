//! Datagrams of a connection, dealt out to the requests that they belong to (RFC 9297 §2).

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{codec::datagram, connection::Connection};

/// Datagrams of one request that nobody has read yet; more are dropped.
const WAITING: usize = 256;

/// Where the datagrams of a connection go.
#[derive(Debug, Default)]
pub(super) struct Dealer(Mutex<Flows>);

#[derive(Debug, Default)]
struct Flows {
    by_stream: HashMap<u64, mpsc::Sender<Bytes>>,
    /// Somebody reads them.
    read: bool,
}

impl Dealer {
    fn lock(&self) -> MutexGuard<'_, Flows> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The datagrams of one request.
pub(crate) struct Flow {
    sender: FlowSender,
    received: mpsc::Receiver<Bytes>,
}

/// Sends datagrams of one request.
#[derive(Clone)]
pub(crate) struct FlowSender {
    connection: Arc<Connection>,
    stream: u64,
}

/// Why a datagram was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unsendable {
    /// It is larger than fits into a packet here, or the peer takes none.
    TooLarge,
    /// The connection is gone.
    Lost,
}

impl Flow {
    /// Of the request on that stream. What came for it before is gone: it may be lost, as any datagram.
    pub(super) fn of(connection: &Arc<Connection>, stream: quinn::StreamId) -> Self {
        let stream = quinn::VarInt::from(stream).into_inner();
        let (send, received) = mpsc::channel(WAITING);
        let is_first = {
            let mut flows = connection.dealer().lock();
            flows.by_stream.insert(stream, send);
            !std::mem::replace(&mut flows.read, true)
        };
        if is_first {
            tokio::spawn(deal(connection.clone()));
        }
        Self { sender: FlowSender { connection: connection.clone(), stream }, received }
    }

    /// Where those go that are to be sent.
    pub(crate) fn sender(&self) -> FlowSender {
        self.sender.clone()
    }

    /// The next one; never, once the connection is gone. Cancel safe.
    pub(crate) async fn receive(&mut self) -> Bytes {
        match self.received.recv().await {
            Some(payload) => payload,
            None => std::future::pending().await,
        }
    }
}

impl FlowSender {
    /// Sends one; waits while there is no room for it on the connection, and so lets those of other requests go between. Cancel
    /// safe: it is sent, or not.
    pub(crate) async fn send(&self, payload: &[u8]) -> Result<(), Unsendable> {
        let datagram = datagram::encode(self.stream, payload);
        let quinn = self.connection.quinn();
        if quinn.max_datagram_size().is_none_or(|most| datagram.len() > most) || !self.connection.peer_takes_datagrams()
        {
            return Err(Unsendable::TooLarge);
        }
        quinn.send_datagram_wait(datagram).await.map_err(|error| match error {
            quinn::SendDatagramError::ConnectionLost(_) => Unsendable::Lost,
            _ => Unsendable::TooLarge,
        })
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let FlowSender { connection, stream } = &self.sender;
        connection.dealer().lock().by_stream.remove(stream);
    }
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Flow").field(&self.sender.stream).finish()
    }
}

impl fmt::Debug for FlowSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FlowSender").field(&self.stream).finish()
    }
}

/// Reads what comes for as long as the connection lives.
async fn deal(connection: Arc<Connection>) {
    while let Ok(datagram) = connection.quinn().read_datagram().await {
        match datagram::decode(datagram) {
            Ok((stream, payload)) => {
                // Of a request that is over, or whose reader is behind: it is dropped, as it may be anywhere.
                if let Some(flow) = connection.dealer().lock().by_stream.get(&stream) {
                    let _ = flow.try_send(payload);
                }
            }
            Err(fault) => return connection.fail(fault.code(), fault.reason()),
        }
    }
    connection.dealer().lock().by_stream.clear();
}
