//! Accepting connections: one loop for TCP, one for QUIC, with room for so many and no more.

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::Drain;

/// How long a handshake may take, of TLS or QUIC.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept: out of descriptors, most likely, and some have to come back first.
const PAUSE: Duration = Duration::from_millis(100);
/// How often failed accepts are told.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Accepts connections until the drain, at most `room` of them at a time; above that they wait in the backlog. Each is
/// served by a task that the drain waits for. Addresses are told with it.
pub async fn tcp<S, F>(listener: TcpListener, room: usize, drain: Drain, serve: S)
where
    S: Fn(TcpStream, SocketAddr) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(room));
    let mut said: Option<Instant> = None;
    loop {
        let accepted = async {
            let place = room.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = drain.draining() => return,
        };
        match accepted {
            Ok((stream, from)) => {
                let _ = stream.set_nodelay(true);
                let served = serve(stream, from);
                drain.spawn(async move {
                    served.await;
                    drop(place);
                });
            }
            Err(error) => {
                if said.is_none_or(|at| at.elapsed() > SAY_EVERY) {
                    tracing::warn!(%error, "cannot accept connections; trying again");
                    said = Some(Instant::now());
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// How many connections a QUIC endpoint takes.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// At most; more are refused.
    pub connections: usize,
    /// Above so many, a peer must prove its address first (RFC 9000 §8.1.2).
    pub unproven: usize,
}

impl Room {
    /// Lets a connection attempt in, or refuses it, or asks it to prove its address; `None` if it is dealt with.
    fn admit(self, endpoint: &quinn::Endpoint, incoming: quinn::Incoming) -> Option<quinn::Incoming> {
        let open = endpoint.open_connections();
        if open >= self.connections {
            incoming.refuse();
            return None;
        }
        if open >= self.unproven && !incoming.remote_address_validated() && incoming.may_retry() {
            // It may have been answered already; then it is gone, as it would be.
            let _ = incoming.retry();
            return None;
        }
        Some(incoming)
    }
}

/// Accepts connections until the endpoint closes or the future is dropped. Each is served by a task of its own, which
/// outlives that.
pub async fn quic<S, F>(endpoint: quinn::Endpoint, room: Room, serve: S)
where
    S: Fn(quinn::Connection) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    while let Some(incoming) = endpoint.accept().await {
        let Some(incoming) = room.admit(&endpoint, incoming) else { continue };
        let serve = serve.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, incoming).await {
                Ok(Ok(connection)) => serve(connection).await,
                Ok(Err(error)) => tracing::debug!(%error, "handshake"),
                Err(_) => tracing::debug!("handshake timed out"),
            }
        });
    }
}
