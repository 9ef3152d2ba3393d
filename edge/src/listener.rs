//! Public listeners: HTTP/1.1 and 2 over TLS on TCP, HTTP/3 on UDP of the same port, and a plain port that redirects.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, header};
use quinn::{IdleTimeout, VarInt, crypto::rustls::QuicServerConfig};
use rustls::crypto::CryptoProvider;
use starling_http::{
    Body, Drain, Problem, ProxyError,
    h1h2::{self, Limits, Speaks},
    h3_server,
};
use starling_node::Room;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    certificates::Certificates,
    gateway::{Arrival, Gateway, PublicProtocol},
};

/// Connections of a listener.
const MAX_CONNECTIONS: usize = 10_000;
/// The same of its QUIC endpoint.
const ROOM: Room = Room { connections: MAX_CONNECTIONS, unproven: 512 };
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const LIMITS: Limits = Limits { max_streams: 128, stream_window_bytes: 256 << 10 };

/// TLS for TCP.
pub(crate) fn tcp_tls(
    provider: Arc<CryptoProvider>,
    certificates: Arc<Certificates>,
) -> Result<TlsAcceptor, rustls::Error> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// TLS for QUIC.
pub(crate) fn quic_config(
    provider: Arc<CryptoProvider>,
    certificates: Arc<Certificates>,
) -> Result<quinn::ServerConfig, String> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = QuicServerConfig::try_from(config).map_err(|e| e.to_string())?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(LIMITS.max_streams.into())
        .max_concurrent_uni_streams(8u32.into())
        .stream_receive_window(LIMITS.stream_window_bytes.into())
        .receive_window((LIMITS.stream_window_bytes * 8).into())
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32))))
        .datagram_receive_buffer_size(None);
    server.transport_config(Arc::new(transport));
    Ok(server)
}

/// Accepts until the drain.
pub(crate) async fn serve_tcp(listener: TcpListener, tls: TlsAcceptor, gateway: Gateway, drain: Drain) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let (stream, client) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = drain.draining() => return,
        };
        let (tls, gateway, of) = (tls.clone(), gateway.clone(), drain.clone());
        drain.spawn(async move {
            serve_tls(stream, client, tls, gateway, of).await;
            drop(place);
        });
    }
}

async fn serve_tls(stream: TcpStream, client: SocketAddr, tls: TlsAcceptor, gateway: Gateway, drain: Drain) {
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await else { return };
    let session = stream.get_ref().1;
    let (protocol, speaks) = match session.alpn_protocol() {
        Some(b"h2") => (PublicProtocol::Http2, Speaks::Http2),
        _ => (PublicProtocol::Http1, Speaks::Http1),
    };
    let arrival = Arc::new(Arrival { client, protocol, sni: session.server_name().map(str::to_owned) });
    h1h2::serve(stream, speaks, LIMITS, drain, move |request| {
        let (gateway, arrival) = (gateway.clone(), arrival.clone());
        async move { gateway.answer(request, &arrival).await }
    })
    .await;
}

/// Accepts until the endpoint closes.
pub(crate) async fn serve_quic(endpoint: quinn::Endpoint, gateway: Gateway, drain: Drain) {
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => incoming,
                None => return,
            },
            () = drain.draining() => return,
        };
        let Some(incoming) = ROOM.admit(&endpoint, incoming) else { continue };
        let (gateway, of) = (gateway.clone(), drain.clone());
        drain.spawn(async move {
            let Ok(Ok(connection)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, incoming).await else { return };
            let handshake = connection.handshake_data();
            let sni = handshake
                .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
                .and_then(|data| data.server_name);
            let arrival =
                Arc::new(Arrival { client: connection.remote_address(), protocol: PublicProtocol::Http3, sni });
            h3_server::serve(connection, of, move |request| {
                let (gateway, arrival) = (gateway.clone(), arrival.clone());
                async move { gateway.answer(request, &arrival).await }
            })
            .await;
        });
    }
}

/// Answers plain HTTP with the way to HTTPS.
pub(crate) async fn serve_redirect(listener: TcpListener, public_port: u16, drain: Drain) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = drain.draining() => return,
        };
        let of = drain.clone();
        drain.spawn(async move {
            h1h2::serve(
                stream,
                Speaks::Http1,
                LIMITS,
                of,
                move |request| async move { redirect(request, public_port) },
            )
            .await;
            drop(place);
        });
    }
}

fn redirect(request: Request<Body>, public_port: u16) -> Response<Body> {
    let (mut parts, _) = request.into_parts();
    let checked = starling_http::normal::normalise_request(&mut parts, starling_http::normal::Origin::Outside);
    let location = checked.map_err(Problem::from).and_then(|checked| {
        let host = checked.authority.rsplit_once(':').map_or(checked.authority.as_str(), |(host, port)| {
            if port.bytes().all(|b| b.is_ascii_digit()) { host } else { &checked.authority }
        });
        let port = if public_port == 443 { String::new() } else { format!(":{public_port}") };
        let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
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
