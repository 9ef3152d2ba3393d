//! Pairs of QUIC endpoints, and frames by hand.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, Method};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use starling_http::{
    Body, Head, Transport,
    h3::client::{Answer, Client, RequestError},
};

/// How long anything may take on a slow machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

const TRANSPORT: Transport = Transport {
    bidi_streams: 256,
    uni_streams: 16,
    stream_window_bytes: 256 << 10,
    connection_window_bytes: 4 << 20,
    send_window_bytes: 4 << 20,
    idle: Duration::from_secs(60),
    keep_alive: None,
    datagrams: None,
    between_nodes: false,
};

/// A listening endpoint, and one that dials and trusts it.
pub(crate) fn endpoints() -> (quinn::Endpoint, quinn::Endpoint, SocketAddr) {
    let made = rcgen::generate_simple_self_signed(vec!["x".to_string()]).unwrap();
    let cert = CertificateDer::from(made.cert.der().to_vec());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.clone()], key)
        .unwrap();
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
    server.transport_config(TRANSPORT.config());
    let server = quinn::Endpoint::server(server, ([127, 0, 0, 1], 0).into()).unwrap();
    let addr = server.local_addr().unwrap();

    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    config.transport_config(TRANSPORT.config());
    let mut client = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    client.set_default_client_config(config);
    (server, client, addr)
}

/// A connection between the two: the dialling end, then the listening one.
pub(crate) async fn connections() -> (quinn::Connection, quinn::Connection, [quinn::Endpoint; 2]) {
    let (server, client, addr) = endpoints();
    let accepting = async { server.accept().await.unwrap().await.unwrap() };
    let (dialled, accepted) = tokio::join!(client.connect(addr, "x").unwrap(), accepting);
    (dialled.unwrap(), accepted, [server, client])
}

/// Sends a request of ours.
pub(crate) async fn send(
    client: &Client,
    method: Method,
    path: &str,
    fields: &HeaderMap,
    body: Option<Body>,
) -> Result<Answer, RequestError> {
    let head = Head { method: &method, authority: "x", path, fields, protocol: None, interim: None };
    tokio::time::timeout(LIMIT, client.send(head, body)).await.expect("an answer or an error")
}

/// Sends a GET.
pub(crate) async fn get(client: &Client, path: &str) -> Result<Answer, RequestError> {
    send(client, Method::GET, path, &HeaderMap::new(), None).await
}

/// A frame whose payload is short.
pub(crate) fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() < 0x40);
    [&[kind, payload.len() as u8][..], payload].concat()
}

/// A HEADERS frame of fields that are spelt out and short.
pub(crate) fn head(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut section = vec![0, 0];
    for (name, value) in fields {
        let long = name.len().checked_sub(7);
        section.push(0x20 | long.map_or(name.len() as u8, |_| 7));
        section.extend(long.map(|rest| rest as u8));
        section.extend_from_slice(name.as_bytes());
        section.push(value.len() as u8);
        section.extend_from_slice(value.as_bytes());
    }
    let length = (section.len() as u16 | 0x4000).to_be_bytes();
    [&[1][..], &length, &section].concat()
}
