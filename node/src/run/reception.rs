//! Connections on the mesh port: each is led to its protocol.

use std::sync::Arc;

use starling_http::{
    accept::{self, Room, Sources},
    h3::Code,
};
use starling_protocol::{CloseCode, alpn};

use super::Running;
use crate::{
    identity::{
        admission::Admission,
        tls::{self, Peer},
    },
    inbound::Inbound,
    port::endpoint,
};

/// Connections on the mesh port.
const ROOM: Room =
    Room { connections: 20_000, unproven: 2_000, unproven_handshakes: 64, handshakes_of_one: 256, of_one: 10_000 };
/// Connections without a certificate of this mesh, which can only join: at most, and of one address. They get no place that a
/// member could have.
const STRANGERS: usize = 512;
const STRANGERS_OF_ONE: usize = 64;

/// Takes connections on the mesh port and leads each to its protocol.
#[derive(Clone)]
pub(super) struct Reception {
    pub(super) running: Arc<Running>,
    /// Of the thread that it is.
    pub(super) inbound: Inbound,
    pub(super) admission: Admission,
    pub(super) strangers: Sources,
}

impl Reception {
    /// Takes those of one of so many `endpoints` that share the room.
    pub(super) async fn accept(self, endpoint: quinn::Endpoint, endpoints: usize) {
        let drain = self.running.drain.clone();
        let serve = move |connection| self.clone().lead(connection);
        accept::quic(endpoint, ROOM.shared_by(endpoints), drain, |_, _| true, serve).await;
    }

    async fn lead(self, connection: quinn::Connection) {
        let protocol = tls::protocol_of(&connection).unwrap_or_default();
        let peer = Peer::of(&connection, &self.running.identity);
        if protocol == alpn::JOIN {
            let from = connection.remote_address().ip();
            if peer.is_ok() {
                return self.admission.serve(connection).await;
            }
            let place = self.strangers.enter(from, STRANGERS_OF_ONE).filter(|_| self.strangers.total() <= STRANGERS);
            match place {
                Some(_place) => return self.admission.serve(connection).await,
                None => return connection.close((CloseCode::Busy as u32).into(), b"too many strangers; try again"),
            }
        }
        let peer = match peer {
            Ok(peer) => peer,
            Err(error) => {
                tracing::debug!(from = %connection.remote_address(), %error, "refused a connection");
                return connection.close((CloseCode::Unauthenticated as u32).into(), b"certificate required");
            }
        };
        let drain = self.running.drain.part();
        if protocol == alpn::CALLS {
            let (inbound, id, expires) = (self.inbound, peer.id, peer.expires);
            let served = drain.spawn(inbound.serve(connection.clone(), peer, drain.clone()));
            let outlived = async {
                tls::until(expires).await;
                // Whoever calls now does so by a newer certificate, on another connection; tunnels go on.
                drain.begin();
                tls::vouched_for(id, expires, self.running.gossip.watch()).await;
            };
            tokio::select! {
                _ = served => {}
                () = outlived => {
                    connection.close(Code::H3_NO_ERROR.into(), b"the certificate has ended");
                }
            }
        } else {
            endpoint::welcome_to_gossip(&connection);
            self.running.links.clone().accept(connection, peer).await;
        }
    }
}
