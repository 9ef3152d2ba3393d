//! Making a connection to a peer: from an instance to an authenticated connection that speaks HTTP/3.

use std::{
    pin::pin,
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use starling_gossip::{Instance, Snapshot};
use starling_http::h3::{Code, client::Client};
use starling_protocol::alpn;
use tokio::sync::watch;

use super::{Connection, State};
use crate::{
    identity::{
        Identity,
        tls::{self, Peer},
    },
    port::endpoint::MeshEndpoint,
};

/// New calls go elsewhere some time before a certificate behind the connection ends; the connection ends when nothing vouches for
/// its peer any more.
async fn end_in_time(made: Weak<State>, connection: quinn::Connection, peer: Peer, until: u64, mesh: Mesh) {
    let over = async {
        tls::until(until).await;
        if let Some(made) = made.upgrade() {
            made.retired.store(true, Relaxed);
        }
        drop(made);
        tls::vouched_for(peer.id, peer.expires, mesh).await;
        connection.close(Code::H3_NO_ERROR.into(), b"the certificate has ended");
    };
    tokio::select! {
        () = over => {}
        _ = connection.closed() => {}
    }
}

/// The mesh as it is known.
pub(super) type Mesh = watch::Receiver<Arc<Snapshot>>;

/// How long a handshake may take.
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// A thread of the peer that does not answer so soon may stand still, or be flooded by strangers: another one is asked, too.
/// Longer than a handshake takes over most networks, so that they are not all made twice.
const ASK_ANOTHER: Duration = Duration::from_millis(500);

/// Why there is no connection. Nothing was sent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(crate) struct DialError(pub(super) String);

/// Dials an instance's node and makes sure that it is the one.
pub(super) async fn dial(
    identity: &Arc<Identity>,
    endpoint: &MeshEndpoint,
    mesh: &Mesh,
    instance: &Instance,
) -> Result<Connection, DialError> {
    let dialled = tokio::time::timeout(DIAL_TIMEOUT, connect(identity, endpoint, mesh, instance)).await;
    dialled.unwrap_or_else(|_| Err("no answer in time".into())).map_err(DialError)
}

async fn connect(
    identity: &Arc<Identity>,
    endpoint: &MeshEndpoint,
    mesh: &Mesh,
    instance: &Instance,
) -> Result<Connection, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let handshake = async |nth| {
        let crypto = tls::client_crypto(identity, alpn::CALLS);
        endpoint.dial(instance.addr, crypto, nth).map_err(|e| text(&e))?.await.map_err(|e| text(&e))
    };
    let mut first = pin!(handshake(0));
    let connection = match tokio::time::timeout(ASK_ANOTHER, &mut first).await {
        Ok(connected) => connected?,
        Err(_) => tokio::select! {
            Ok(connected) = first => connected,
            Ok(connected) = handshake(1) => connected,
            else => return Err("no handshake comes about".into()),
        },
    };
    let found = Peer::of(&connection, identity).map_err(|e| text(&e))?;
    if found.id != instance.node {
        connection.close(Code::H3_NO_ERROR.into(), b"");
        return Err(format!("{} answers at its address", found.name));
    }
    let until = tls::useful_until(&found, identity);
    let made = Connection::new(
        Client::start(connection.clone(), endpoint.windows().shelf(), endpoint.windows().order()),
        instance.generation,
    );
    tokio::spawn(end_in_time(Arc::downgrade(&made.0), connection, found, until, mesh.clone()));
    Ok(made)
}
