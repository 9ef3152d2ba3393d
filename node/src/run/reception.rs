//! Connections on the mesh port: each is led to its protocol.

use std::sync::Arc;

use starling_http::accept::{self, Room};
use starling_protocol::{CloseCode, alpn};

use super::Running;
use crate::identity::{
    admission::Admission,
    tls::{self, Peer},
};

/// Connections of one endpoint on the mesh port.
const ROOM: Room = Room { connections: 20_000, unproven: 2_000 };

/// Takes connections on the mesh port and leads each to its protocol.
#[derive(Clone)]
pub(super) struct Reception {
    pub(super) running: Arc<Running>,
    pub(super) admission: Admission,
}

impl Reception {
    pub(super) async fn accept(self, endpoint: quinn::Endpoint) {
        accept::quic(endpoint, ROOM, move |connection| self.clone().lead(connection)).await;
    }

    async fn lead(self, connection: quinn::Connection) {
        let protocol = tls::protocol_of(&connection).unwrap_or_default();
        if protocol == alpn::JOIN {
            return self.admission.serve(connection).await;
        }
        let peer = match Peer::of(&connection, &self.running.identity) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::info!(from = %connection.remote_address(), %error, "refused a connection");
                return connection.close((CloseCode::Unauthenticated as u32).into(), b"certificate required");
            }
        };
        let drain = self.running.drain.clone();
        if protocol == alpn::CALLS {
            let inbound = self.running.inbound.clone();
            let _ = drain.clone().spawn(inbound.serve(connection, peer, drain)).await;
        } else {
            self.running.links.clone().accept(connection, peer).await;
        }
    }
}
