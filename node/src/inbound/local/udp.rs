//! UDP to the service: a socket for each flow.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::{Request, Response, StatusCode};
use starling_http::{
    Body, Guarded, Problem, ProxyError,
    tunnel::{self, Capsules, PacketReceiver, PacketSender},
};
use tokio::net::UdpSocket;

use super::{Dialler, LocalError, Place, TunnelPlace};
use crate::{Sent, inbound::limiter::Admitted, observe::packets::PacketCounts};

/// After an error that may last.
const PAUSE: Duration = Duration::from_millis(100);

/// Opens a socket to the service, and carries packets there and back until the flow's other end has enough.
pub(super) async fn open(
    dialler: &Dialler,
    counts: &Arc<PacketCounts>,
    request: Request<Body>,
    admitted: Admitted,
) -> Result<Response<Guarded<Place>>, LocalError> {
    let socket = socket_to(dialler.addr).await.map_err(|error| super::not_connected(&error))?;
    let (capsules, answer) = Capsules::new();
    let (parts, upload) = request.into_parts();
    let Some((sender, receiver)) = tunnel::packets(&parts.extensions, capsules, upload) else {
        let (status, detail) = (StatusCode::BAD_REQUEST, "packets come over a connection that carries them");
        let problem = Problem::proxy(status, ProxyError::HttpRequestError, detail);
        return Err(LocalError { sent: Sent::No, problem });
    };
    let place: TunnelPlace = Arc::new(admitted);
    tokio::spawn(relay(socket, sender, receiver, counts.clone(), place.clone()));
    Ok(Response::new(Guarded::new(answer, Place::Tunnel { _place: place })))
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
    _place: TunnelPlace,
) {
    let answers = async {
        loop {
            match tunnel::next_packet(&socket).await {
                Ok(packet) => counts.sent(sender.send(&packet).await),
                // That a packet came to nobody says nothing about the next one.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(_) => tokio::time::sleep(PAUSE).await,
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
