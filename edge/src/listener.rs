//! Public listeners: HTTP/1.1 and 2 over TLS on TCP, HTTP/3 on UDP of the same port, and a plain port that redirects.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use rustls_pki_types::CertificateDer;
use starling_http::{
    Body, Drain, Problem, ProxyError, Shelf, Transport,
    accept::{self, Place, Room, TcpPlaces, TcpRoom},
    h3,
    shared_port::OwnedBy,
    tcp::{self, Control, Limits, Socket, Speaks},
};
use tokio::net::TcpListener;

use crate::{
    acme::{self, Challenges},
    client_certificate::Presented,
    config::Network,
    gateway::{Arrival, Gateway, PublicProtocol},
    proxy_protocol, route,
    tls::Tls,
};

/// Connections of a listener.
const MAX_CONNECTIONS: usize = 10_000;
/// The same of its QUIC endpoint.
const ROOM: Room = Room {
    connections: MAX_CONNECTIONS,
    unproven: 512,
    unproven_handshakes: 64,
    handshakes_of_one: 256,
    of_one: MAX_CONNECTIONS / 4,
};
/// Connections of a TCP listener.
const TCP_ROOM: TcpRoom = TcpRoom { connections: MAX_CONNECTIONS, of_one: MAX_CONNECTIONS / 4 };
/// Requests at once on a connection.
const MAX_STREAMS: u32 = 128;
/// What an upload may hold that nobody takes.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// The same of all uploads, over all connections.
const STANDING_BYTES: u64 = 64 << 20;
/// How long a connection may have no request.
const IDLE: Duration = Duration::from_secs(60);
/// How long a balancer may take to say whose a connection is.
const TELL_CARRIED: Duration = Duration::from_secs(2);
/// What TLS may keep that the client does not take, in bytes.
const TLS_BUFFER_BYTES: usize = 32 << 10;

/// Of HTTP/3: the windows of HTTP/2.
const TRANSPORT: Transport = Transport {
    bidi_streams: MAX_STREAMS,
    uni_streams: 8,
    stream_window_bytes: STREAM_WINDOW_BYTES,
    connection_window_bytes: STREAM_WINDOW_BYTES * MAX_STREAMS,
    send_window_bytes: 2 << 20,
    idle: IDLE,
    keep_alive: None,
    datagrams: None,
    between_nodes: false,
};

/// Where uploads stand that nobody takes, over all connections of one of so many workers.
pub(crate) fn shelf(workers: usize) -> Shelf {
    Shelf::new(STANDING_BYTES / workers as u64, STREAM_WINDOW_BYTES.into())
}

/// Room for connections over TCP, on all workers. Those that come from `carriers` say first whose they are.
pub(crate) fn places(carriers: &[Network]) -> TcpPlaces {
    let carriers = carriers.to_vec();
    TCP_ROOM.places().carried_by(move |from| carriers.iter().any(|network| network.contains(from)))
}

fn limits(shelf: Shelf, control: Control) -> Limits {
    Limits { max_streams: MAX_STREAMS, stream_window_bytes: STREAM_WINDOW_BYTES, idle: IDLE, shelf, control }
}

/// How QUIC goes at the public port.
pub(crate) fn transport() -> Arc<quinn::TransportConfig> {
    TRANSPORT.config()
}

/// The endpoint of a worker.
pub(crate) fn quic_endpoint(socket: UdpSocket, owner: OwnedBy, tls: &Tls) -> io::Result<quinn::Endpoint> {
    let mut config = quinn::EndpointConfig::default();
    config.cid_generator(move || Box::new(owner));
    let endpoint = quinn::Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime))?;
    tls.serve_at(&endpoint);
    Ok(endpoint)
}

/// Accepts until the drain.
pub(crate) async fn serve_tcp(
    listener: TcpListener,
    places: TcpPlaces,
    carriers: Arc<[Network]>,
    tls: Arc<Tls>,
    gateway: Gateway,
    shelf: Shelf,
    drain: Drain,
) {
    let (of, all) = (drain.clone(), places.clone());
    accept::tcp(listener, places, drain, move |stream, from| {
        let is_carried = carriers.iter().any(|network| network.contains(from.ip()));
        let (tls, gateway, shelf, drain, all) = (tls.clone(), gateway.clone(), shelf.clone(), of.clone(), all.clone());
        async move {
            if !is_carried {
                return serve_tls(stream, from, tls, gateway, shelf, drain).await;
            }
            let Some((stream, client, _place)) = uncarried(stream, from, &all).await else { return };
            serve_tls(stream, client, tls, gateway, shelf, drain).await;
        }
    })
    .await;
}

/// Whose a connection is that a balancer has made, and that one's place; `None` if it does not say so in time, or there is no place.
/// Until then the connection is the balancer's own.
async fn uncarried(mut stream: Socket, from: SocketAddr, places: &TcpPlaces) -> Option<(Socket, SocketAddr, Place)> {
    let own = places.of_one(from.ip())?;
    let told = tokio::time::timeout(TELL_CARRIED, proxy_protocol::read(&mut stream)).await;
    drop(own);
    match told {
        Ok(Ok(client)) => {
            let client = client.unwrap_or(from);
            Some((stream, client, places.of_one(client.ip())?))
        }
        Ok(Err(error)) => {
            tracing::debug!(%from, %error, "a connection that should say whose it is");
            None
        }
        Err(_) => None,
    }
}

async fn serve_tls(stream: Socket, client: SocketAddr, tls: Arc<Tls>, gateway: Gateway, shelf: Shelf, drain: Drain) {
    if !gateway.lets_in(client.ip(), true) {
        return;
    }
    let control = stream.control();
    let accepted = tls.acceptor().accept_with(stream, |session| session.set_buffer_limit(Some(TLS_BUFFER_BYTES)));
    let Ok(Ok(stream)) = tokio::time::timeout(accept::HANDSHAKE_TIMEOUT, accepted).await else { return };
    let session = stream.get_ref().1;
    let (protocol, speaks) = match session.alpn_protocol() {
        Some(b"h2") => (PublicProtocol::Http2, Speaks::Http2),
        // The handshake was all (RFC 8737 §4).
        Some(acme::ALPN) => return,
        _ => (PublicProtocol::Http1, Speaks::Http1),
    };
    let certificate = session.peer_certificates().and_then(Presented::of);
    let arrival = Arc::new(Arrival { client, protocol, sni: session.server_name().map(str::to_owned), certificate });
    tcp::serve(stream, speaks, limits(shelf, control), drain, move |request| {
        let (gateway, arrival) = (gateway.clone(), arrival.clone());
        async move { gateway.answer(request, &arrival).await }
    })
    .await;
}

/// Accepts at one of `endpoints` until it closes. Where the node goes away, who comes then is refused at once; where its place is
/// another process's, who still comes here is served once.
pub(crate) async fn serve_quic(
    endpoint: quinn::Endpoint,
    endpoints: usize,
    gateway: Gateway,
    shelf: Shelf,
    drain: Drain,
) {
    let leaves = drain.begun_as_a_whole();
    let door = gateway.clone();
    let lets_in = move |from, is_proven| door.lets_in(from, is_proven);
    let accepting =
        accept::quic(endpoint.clone(), ROOM.shared_by(endpoints), drain.clone(), lets_in, move |connection| {
            let (gateway, shelf, drain) = (gateway.clone(), shelf.clone(), drain.clone());
            async move {
                let _ = drain.clone().spawn(serve_h3(connection, gateway, shelf, drain)).await;
            }
        });
    tokio::select! {
        () = accepting => return,
        () = leaves => {}
    }
    while let Some(incoming) = endpoint.accept().await {
        incoming.refuse();
    }
}

async fn serve_h3(connection: quinn::Connection, gateway: Gateway, shelf: Shelf, drain: Drain) {
    let sni = connection
        .handshake_data()
        .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .and_then(|data| data.server_name);
    let chain = connection.peer_identity().and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
    let certificate = chain.and_then(|chain| Presented::of(&chain));
    let (client, protocol) = (connection.remote_address(), PublicProtocol::Http3);
    let arrival = Arc::new(Arrival { client, protocol, sni, certificate });
    let limits =
        h3::server::Limits { shelf, idle: Some(IDLE), order: h3::Order::Mixed, peer: h3::server::Peer::Client };
    h3::server::serve(connection, limits, drain, move |request| {
        let (gateway, arrival) = (gateway.clone(), arrival.clone());
        async move { gateway.answer(request, &arrival).await }
    })
    .await;
}

/// Answers plain HTTP with the way to HTTPS; and authorities with what they look for.
pub(crate) async fn serve_redirect(
    listener: TcpListener,
    carriers: Arc<[Network]>,
    challenges: Challenges,
    public_port: u16,
    drain: Drain,
) {
    let (of, all) = (drain.clone(), places(&carriers));
    accept::tcp(listener, all.clone(), drain, move |stream, from| {
        let is_carried = carriers.iter().any(|network| network.contains(from.ip()));
        let (challenges, drain, all) = (challenges.clone(), of.clone(), all.clone());
        async move {
            let (stream, _place) = match is_carried {
                true => {
                    let Some((stream, _, place)) = uncarried(stream, from, &all).await else { return };
                    (stream, Some(place))
                }
                false => (stream, None),
            };
            let answer = move |request| {
                let challenges = challenges.clone();
                async move { redirect(request, &challenges, public_port) }
            };
            let limits = limits(shelf(1), stream.control());
            tcp::serve(stream, Speaks::Http1, limits, drain, answer).await;
        }
    })
    .await;
}

fn redirect(request: Request<Body>, challenges: &Challenges, public_port: u16) -> Response<Body> {
    let (mut parts, _) = request.into_parts();
    let checked = starling_http::normal::normalise_request(&mut parts, starling_http::normal::Origin::Outside);
    if let Ok(checked) = &checked
        && parts.method == Method::GET
        && let Some(text) = challenges.text(&route::bare_host(checked.authority.as_str()), parts.uri.path())
    {
        let mut response = Response::new(Body::full(text));
        let kind = HeaderValue::from_static("application/octet-stream");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        return response;
    }
    let location = checked.map_err(Problem::from).and_then(|checked| {
        let host = checked.host();
        let port = if public_port == 443 { String::new() } else { format!(":{public_port}") };
        // `OPTIONS *` is about the server as a whole, whose other door is at its root.
        let path = parts.uri.path_and_query().map(|p| p.as_str()).filter(|path| *path != "*").unwrap_or("/");
        HeaderValue::from_str(&format!("https://{host}{port}{path}")).map_err(|_| {
            Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, "the request target is not a path")
        })
    });
    match location {
        Ok(location) => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
            response.headers_mut().insert(header::LOCATION, location);
            response
        }
        Err(problem) => problem.into_response("starling-edge", false),
    }
}
