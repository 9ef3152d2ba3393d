//! A port that carries TCP to a service, whatever it says.

use starling_http::{
    Drain, accept,
    tcp::Socket,
    tunnel::{self, End},
};
use starling_protocol::Name;
use tokio::net::TcpListener;

use super::{Complaints, Door};

/// One port for one service, as one worker serves it.
#[derive(Clone)]
pub(crate) struct TcpDoor {
    door: Door,
    service: Name,
    complaints: Complaints,
}

impl TcpDoor {
    /// The port that `door` has for `service`.
    pub(crate) fn new(door: Door, service: Name, complaints: Complaints) -> Self {
        Self { door, service, complaints }
    }

    /// Serves until the drain is over.
    pub(crate) async fn serve(self, listener: TcpListener, drain: Drain) {
        let of = drain.clone();
        accept::tcp(listener, self.door.places.clone(), drain, move |socket, _| {
            let (door, drain) = (self.clone(), of.clone());
            async move {
                tokio::select! {
                    () = door.carry(socket) => {}
                    () = drain.closing() => {}
                }
            }
        })
        .await;
    }

    /// Carries one connection to an instance. Where there is none, it is reset, as it would be by the service's own host.
    async fn carry(&self, socket: Socket) {
        let Some(stream) = socket.into_tcp() else { return };
        let (upload, writing) = End::tcp(stream).divide();
        match self.door.open_tunnel(&self.service, None, upload).await {
            Ok(answer) => {
                let patience = tunnel::patience_in(None);
                writing.carry(answer.into_body(), patience).await;
            }
            Err(why) => self.complaints.tell(&self.service, &why),
        }
    }
}
