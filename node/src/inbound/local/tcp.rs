//! TCP to the service: a connection for each tunnel.

use std::sync::Arc;

use http::Response;
use starling_http::{Body, Guarded, tunnel::End};

use super::{Dialler, LocalError, Place, TunnelPlace, carry};
use crate::inbound::limiter::Admitted;

/// Connects to the service, and carries what comes there and back.
pub(super) async fn open(
    dialler: &Dialler,
    upload: Body,
    admitted: Admitted,
) -> Result<Response<Guarded<Place>>, LocalError> {
    let (answer, writing) = End::tcp(dialler.connect().await?).divide();
    let place: TunnelPlace = Arc::new(admitted);
    carry(writing, upload, None, place.clone());
    Ok(Response::new(Guarded::new(answer, Place::Tunnel { _place: place })))
}
