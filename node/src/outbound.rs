//! The doors for the local application: the outbound listener, which routes by host name, and a port for each upstream.

use std::time::Duration;

use http::{Request, Response, StatusCode};
use starling_http::{
    Body, Drain, Guarded, Problem, ProxyError, Shelf,
    accept::{self, TcpPlaces, TcpRoom},
    is_grpc,
    normal::{self, Origin},
    tcp::{self, Limits, Speaks},
};
use starling_protocol::{Name, service_of_host};
use tokio::net::TcpListener;

use crate::{
    Call, Carried, LimitSettings, MeshClient,
    observe::{
        observer::{Answered, Observed, Observer},
        trace,
    },
};

/// The application is trusted with more than the internet.
const MAX_STREAMS: u32 = 1024;
const STREAM_WINDOW_BYTES: u32 = 512 << 10;
/// What its uploads may hold that the mesh does not take.
const STANDING_BYTES: u64 = 64 << 20;
/// How long its connections may have no request: its pools decide.
const IDLE: Duration = Duration::from_secs(3600);
/// Connections of the application to one door, which all come from one address.
const ROOM: TcpRoom = TcpRoom { connections: 10_000, of_one: 10_000 };

/// One door, as one worker serves it.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) client: MeshClient,
    /// The service that this door leads to; by host name if `None`.
    pub(crate) service: Option<Name>,
    pub(crate) limits: LimitSettings,
    pub(crate) observer: Observer,
    pub(crate) places: TcpPlaces,
    pub(crate) shelf: Shelf,
}

/// Room for the application's connections to one door, on all workers.
pub(crate) fn places() -> TcpPlaces {
    ROOM.places()
}

/// Where its uploads stand that the mesh does not take, on one of so many workers.
pub(crate) fn shelf(workers: usize) -> Shelf {
    Shelf::new(STANDING_BYTES / workers as u64, STREAM_WINDOW_BYTES.into())
}

impl Door {
    /// Serves until the drain is over.
    pub(crate) async fn serve(self, listener: TcpListener, drain: Drain) {
        let of = drain.clone();
        let limits = Limits {
            max_streams: MAX_STREAMS,
            stream_window_bytes: STREAM_WINDOW_BYTES,
            idle: IDLE,
            shelf: self.shelf.clone(),
        };
        accept::tcp(listener, self.places.clone(), drain, move |stream, _| {
            let door = self.clone();
            tcp::serve(stream, Speaks::Either, limits.clone(), of.clone(), move |request| {
                let door = door.clone();
                async move { door.answer(request).await }
            })
        })
        .await;
    }

    async fn answer(&self, request: Request<Body>) -> Response<Guarded<Answered<Carried>>> {
        let grpc = is_grpc(request.headers());
        let (mut parts, body) = request.into_parts();
        let mut observed = self.observer.outgoing(&parts.method, &mut parts.headers, trace::Origin::Ours);
        let request = Request::from_parts(parts, observed.counting(body));
        let response = match self.call(request, &mut observed).await {
            Ok(response) => response,
            Err(problem) => problem.into_response(self.client.pseudonym(), grpc).map(Guarded::from),
        };
        observed.answered(response)
    }

    async fn call(
        &self,
        request: Request<Body>,
        observed: &mut Observed,
    ) -> Result<Response<Guarded<Carried>>, Problem> {
        let (mut parts, body) = request.into_parts();
        let checked = normal::normalise_request(&mut parts, Origin::Outside)?;
        let service = match &self.service {
            Some(service) => service.clone(),
            None => {
                let host = checked.host();
                service_of_host(host).ok_or_else(|| {
                    let detail = format!("{host} is not a service of the mesh; call <service>.mesh.internal");
                    Problem::proxy(StatusCode::NOT_FOUND, ProxyError::DestinationNotFound, detail)
                })?
            }
        };
        let limits = self.limits.of(&parts.headers);
        let request = Request::from_parts(parts, body.with_length(checked.length));
        let call = Call { service, version: None, request, limits };
        Ok(self.client.call(call, observed).await?)
    }
}
