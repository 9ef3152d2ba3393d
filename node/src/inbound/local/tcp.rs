//! TCP to the service: a connection for each tunnel.

use http::Response;
use starling_http::{Body, Guarded, tunnel::End};

use super::{Dialler, LocalError, Place, TUNNEL_PATIENCE, carry};

/// Connects to the service, and carries what comes there and back.
pub(super) async fn open(dialler: &Dialler, upload: Body) -> Result<Response<Guarded<Place>>, LocalError> {
    let (stream, room) = dialler.connect().await?;
    let (answer, writing) = End::tcp(stream).divide();
    carry(writing, upload, TUNNEL_PATIENCE, room.clone());
    Ok(Response::new(Guarded::new(answer, Place::Tunnel { _place: room })))
}
