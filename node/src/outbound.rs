//! The doors for the local application: the outbound listener, which routes by host name, and a port for each upstream.

mod tcp;
mod udp;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{HeaderValue, Method, Request, Response, StatusCode};
use starling_http::{
    Body, Drain, Guarded, Problem, ProxyError, Shelf,
    accept::{self, Seldom, TcpPlaces, TcpRoom},
    is_grpc,
    normal::{self, Origin, Tunnel},
    tcp::{Control, Limits, Speaks},
    tunnel::{End, Protocol},
};
use starling_protocol::{Name, service_of_host};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};

pub(crate) use self::{tcp::TcpDoor, udp::UdpDoor};

use crate::{
    Call, Carried, LimitSettings, MadeByNode, MeshClient, RepeatSettings,
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
/// What may wait each way in a tunnel that ends here.
const TUNNEL_BYTES: usize = 64 << 10;
/// Connections of the application to one door, which all come from one address.
const ROOM: TcpRoom = TcpRoom { connections: 10_000, of_one: 10_000 };

/// One door, as one worker serves it.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) client: MeshClient,
    /// The service that this door leads to; by host name if `None`.
    pub(crate) service: Option<Name>,
    pub(crate) limits: LimitSettings,
    pub(crate) repeats: RepeatSettings,
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
        accept::tcp(listener, self.places.clone(), drain, move |socket, _| {
            let control = socket.control();
            self.clone().speak(socket, control, of.clone())
        })
        .await;
    }

    /// Serves one connection, or what is in a tunnel.
    fn speak(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        control: Control,
        drain: Drain,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let limits = Limits {
            max_streams: MAX_STREAMS,
            stream_window_bytes: STREAM_WINDOW_BYTES,
            idle: IDLE,
            shelf: self.shelf.clone(),
            control,
        };
        let of = drain.clone();
        Box::pin(starling_http::tcp::serve(stream, Speaks::Either, limits, drain, move |request| {
            let (door, drain) = (self.clone(), of.clone());
            async move { door.answer(request, drain).await }
        }))
    }

    async fn answer(&self, request: Request<Body>, drain: Drain) -> Response<Guarded<Answered<Carried>>> {
        // To whoever asks for a tunnel, 200 is consent.
        let grpc = is_grpc(request.headers()) && *request.method() != Method::CONNECT;
        let (mut parts, body) = request.into_parts();
        let mut observed = self.observer.outgoing(&parts.method, &mut parts.headers, trace::Origin::Ours);
        let request = Request::from_parts(parts, observed.counting(body));
        let response = match self.call(request, drain, &mut observed).await {
            // What another node says in place of its service, for gRPC as that has it.
            Ok(response) if grpc && response.extensions().get::<MadeByNode>().is_some() => {
                let (head, body) = response.into_parts();
                let (head, _) = Problem::told_by_proxy(&head).into_response(self.client.pseudonym(), grpc).into_parts();
                Response::from_parts(head, body.map_body(|_| Body::empty()))
            }
            Ok(response) => response,
            Err(problem) => problem.into_response(self.client.pseudonym(), grpc).map(Guarded::from),
        };
        observed.answered(response)
    }

    async fn call(
        &self,
        request: Request<Body>,
        drain: Drain,
        observed: &mut Observed,
    ) -> Result<Response<Guarded<Carried>>, Problem> {
        let (mut parts, body) = request.into_parts();
        let checked = normal::normalise_request(&mut parts, Origin::Outside)?;
        if checked.tunnel == Some(Tunnel::Udp) {
            let detail = "UDP is carried over an upstream with protocol = \"udp\"";
            return Err(Problem::proxy(StatusCode::NOT_IMPLEMENTED, ProxyError::HttpRequestError, detail));
        }
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
        let is_connect = checked.tunnel == Some(Tunnel::Bytes);
        if is_connect && self.service.is_none() && self.client.takes_http(&service) {
            observed.is_for(service.as_str());
            return Ok(Response::new(Guarded::from(self.inside(service, body, drain))));
        }
        let limits = self.limits.of(&parts.headers);
        let request = Request::from_parts(parts, body.with_length(checked.length));
        let call = Call { service, version: None, request, limits, repeats: self.repeats };
        Ok(self.client.call(call, observed).await?)
    }

    /// HTTP within a tunnel to a service that speaks HTTP, as proxies are asked for that: the tunnel ends here, so that the calls
    /// in it are calls like any others.
    fn inside(&self, service: Name, sent: Body, drain: Drain) -> Body {
        let (near, far) = tokio::io::duplex(TUNNEL_BYTES);
        let (answer, writing) = End::of(near).divide();
        tokio::spawn(writing.carry(sent, IDLE));
        tokio::spawn(Self { service: Some(service), ..self.clone() }.speak(far, Control::default(), drain));
        answer
    }

    /// Opens a tunnel to an instance of a service: the answer whose body comes out of it, or why there is none.
    async fn open_tunnel(
        &self,
        service: &Name,
        protocol: Option<Protocol>,
        upload: Body,
    ) -> Result<Response<Guarded<Answered<Carried>>>, String> {
        let mut request = Request::new(upload);
        *request.method_mut() = Method::CONNECT;
        if let Some(protocol) = protocol {
            request.extensions_mut().insert(protocol);
        }
        let (mut parts, upload) = request.into_parts();
        let mut observed = self.observer.outgoing(&parts.method, &mut parts.headers, trace::Origin::Ours);
        let limits = self.limits.of(&parts.headers);
        let request = Request::from_parts(parts, observed.counting(upload));
        let call = Call { service: service.clone(), version: None, request, limits, repeats: self.repeats };
        let (response, refused) = match self.client.call(call, &mut observed).await {
            Ok(response) if response.status().is_success() => (response, None),
            Ok(response) => {
                let why = response.headers().get("proxy-status").map_or(&b"no reason given"[..], HeaderValue::as_bytes);
                let why = String::from_utf8_lossy(why).into_owned();
                (response.map(|_| Guarded::from(Body::empty())), Some(why))
            }
            Err(error) => {
                let mut none = Response::new(Guarded::from(Body::empty()));
                *none.status_mut() = error.status;
                (none, Some(error.detail))
            }
        };
        let answer = observed.answered(response);
        refused.map_or(Ok(answer), Err)
    }
}

/// Says now and then that the application's connections or packets to a service come to nothing: it sees that they do, and no
/// reason.
#[derive(Clone, Debug, Default)]
pub(crate) struct Complaints(Arc<Mutex<Seldom>>);

impl Complaints {
    fn tell(&self, service: &Name, why: &str) {
        if self.0.lock().unwrap_or_else(|e| e.into_inner()).may_speak() {
            tracing::warn!(%service, why, "what the application sends comes to nothing");
        }
    }
}
