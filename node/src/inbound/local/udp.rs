//! UDP to the service: a socket for each flow.

use std::{net::SocketAddr, sync::Arc};

use http::{Request, Response, StatusCode};
use starling_http::{
    Body, Guarded, Problem, ProxyError,
    tunnel::{self, Capsules, PacketReceiver, PacketSender},
};
use tokio::net::UdpSocket;

use super::{Dialler, LocalError, Place, Room};
use crate::{Sent, observe::packets::PacketCounts};

/// Longest packet, in bytes.
const MAX_PACKET_BYTES: usize = 64 << 10;

/// Opens a socket to the service, and carries packets there and back until the flow's other end has enough.
pub(super) async fn open(
    dialler: &Dialler,
    counts: &Arc<PacketCounts>,
    request: Request<Body>,
) -> Result<Response<Guarded<Place>>, LocalError> {
    let room = dialler.room()?;
    let socket = socket_to(dialler.addr).await.map_err(|error| super::not_connected(&error))?;
    let (capsules, answer) = Capsules::new();
    let (parts, upload) = request.into_parts();
    let Some((sender, receiver)) = tunnel::packets(&parts.extensions, capsules, upload) else {
        let (status, detail) = (StatusCode::BAD_REQUEST, "packets come over a connection that carries them");
        let problem = Problem::proxy(status, ProxyError::HttpRequestError, detail);
        return Err(LocalError { sent: Sent::No, problem });
    };
    tokio::spawn(relay(socket, sender, receiver, counts.clone(), room.clone()));
    Ok(Response::new(Guarded::new(answer, Place::Tunnel { _place: room })))
}

async fn socket_to(service: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: SocketAddr = if service.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(service).await?;
    Ok(socket)
}

async fn relay(
    socket: UdpSocket,
    sender: PacketSender,
    mut receiver: PacketReceiver<Body>,
    counts: Arc<PacketCounts>,
    _room: Room,
) {
    let answers = async {
        let mut packet = vec![0; MAX_PACKET_BYTES];
        loop {
            // That a packet came to nobody is told with an error, and says nothing about the next one.
            if let Ok(length) = socket.recv(&mut packet).await {
                counts.sent(sender.send(&packet[..length]).await);
            }
        }
    };
    let questions = async {
        while let Some(packet) = receiver.receive().await {
            counts.came_out(socket.send(&packet).await.is_ok());
        }
    };
    tokio::select! {
        () = answers => {}
        () = questions => {}
        () = sender.closed() => {}
    }
}
