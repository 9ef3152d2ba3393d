//! Making a connection to a peer.

use std::sync::Arc;

use starling_gossip::Instance;
use starling_http::h3::{Code, client::Client};
use starling_protocol::alpn;
use tokio::sync::watch;

use super::{
    Connection, DialError,
    pool::{DIAL_TIMEOUT, PeerSlot, Pool, Slot, lock},
    silence::watch_for_silence,
};
use crate::{
    identity::tls::{self, Peer},
    port::endpoint::FIRST_WORKER,
};

pub(super) async fn dial(
    pool: Arc<Pool>,
    peer: Arc<PeerSlot>,
    instance: Arc<Instance>,
    done: watch::Sender<Option<Result<(), DialError>>>,
) {
    let outcome = match tokio::time::timeout(DIAL_TIMEOUT, connect(&pool, &peer, &instance)).await {
        Ok(Ok(made)) => {
            *lock(&peer.slot) = Slot::Ready(made);
            Ok(())
        }
        failed => {
            let reason = failed.map_or_else(|_| "no answer in time".into(), |r| r.err().unwrap_or_default());
            tracing::debug!(node = %instance.node_name, addr = %instance.addr, reason, "cannot connect");
            peer.load.unreachable();
            *lock(&peer.slot) = Slot::Idle;
            Err(DialError(reason))
        }
    };
    done.send_replace(Some(outcome));
}

async fn connect(pool: &Pool, peer: &Arc<PeerSlot>, instance: &Instance) -> Result<Connection, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let crypto = tls::client_crypto(&pool.identity, alpn::CALLS);
    let connecting = pool.endpoint.dial(instance.addr, crypto, FIRST_WORKER).map_err(|e| text(&e))?;
    let connection = connecting.await.map_err(|e| text(&e))?;
    let found = Peer::of(&connection, &pool.identity).map_err(|e| text(&e))?;
    if found.id != instance.node {
        connection.close(Code::H3_NO_ERROR.into(), b"");
        return Err(format!("{} answers at its address", found.name));
    }
    let made = Connection::new(Client::start(connection), instance.generation);
    tokio::spawn(watch_for_silence(Arc::downgrade(&made.0), peer.load.clone()));
    Ok(made)
}
