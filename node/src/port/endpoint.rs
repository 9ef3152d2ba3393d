//! QUIC endpoints: one UDP port for everything, served by the control thread and the workers.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::hmac;
use quinn::{
    AckFrequencyConfig, ConnectionId, ConnectionIdGenerator, EndpointConfig, IdleTimeout, TokioRuntime,
    TransportConfig, VarInt, crypto::rustls::QuicClientConfig,
};
use rand::RngExt;

use crate::{
    identity::Identity,
    identity::tls,
    state::{StateDir, StateError},
};

/// Index of the control thread in connection ids. Workers count from 1.
pub(crate) const CONTROL: u8 = 0;
/// Index of the worker that a call is aimed at; every node has it.
pub(crate) const FIRST_WORKER: u8 = 1;

const CONNECTION_ID_BYTES: usize = 8;
/// Idle time and keep-alive of connections for calls. The shorter idle time of the two ends holds (RFC 9000 §10.1).
const CALLS_IDLE: Duration = Duration::from_secs(30);
const CALLS_KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The same for gossip, whose links are many and nearly silent, and kept alive by probes in a small mesh: often enough for
/// the state that firewalls keep of a UDP flow that goes both ways.
const GOSSIP_IDLE: Duration = Duration::from_secs(120);
const GOSSIP_KEEP_ALIVE: Duration = Duration::from_secs(45);
/// Streams that a peer may have open towards this node, both ways and one way. quinn has a place for each of them, some 70
/// bytes, from the first packet on: as many for gossip as for calls would be most of the memory of a node.
const CALL_STREAMS: [u32; 2] = [4096, 64];
const GOSSIP_STREAMS: [u32; 2] = [16, 0];
/// The same towards whoever dials for calls or to join. Servers open none both ways (RFC 9114 §6.1).
const ANSWERS_STREAMS: [u32; 2] = [0, 64];
/// Window of one stream. A stuck reader may hold this much.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Window of a connection: larger than a stream's, so that one stuck reader does not stall its siblings.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// A probe that waited behind this much would be stale.
const DATAGRAM_SEND_BYTES: usize = 16 << 10;
const DATAGRAM_RECEIVE_BYTES: usize = 64 << 10;

/// The endpoint of one thread: what arrives on the mesh port with this thread's index, and what this thread dials.
///
/// Dialling has a socket of its own, so that one pair of addresses carries one connection: receive offload merges packets
/// by address pair.
#[derive(Clone)]
pub(crate) struct MeshEndpoint {
    /// Incoming connections.
    pub(crate) listening: quinn::Endpoint,
    dialling: quinn::Endpoint,
}

impl MeshEndpoint {
    /// Puts a socket of the group to work on the current runtime.
    pub(crate) fn new(
        socket: UdpSocket,
        index: u8,
        identity: &Arc<Identity>,
        reset_key: &[u8; 32],
    ) -> io::Result<Self> {
        let local = socket.local_addr()?;
        let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, reset_key)));
        config.cid_generator(move || Box::new(OwnedBy(index)));
        let mut server = quinn::ServerConfig::with_crypto(tls::server_crypto(identity));
        let streams = if index == CONTROL { GOSSIP_STREAMS } else { CALL_STREAMS };
        server.transport_config(Arc::new(transport(streams, GOSSIP_IDLE, None)));
        let listening = quinn::Endpoint::new(config, Some(server), socket, Arc::new(TokioRuntime))?;
        let dialling = quinn::Endpoint::new(
            EndpointConfig::default(),
            None,
            crate::port::reuseport::bind_ephemeral(local)?,
            Arc::new(TokioRuntime),
        )?;
        Ok(Self { listening, dialling })
    }

    /// Dials a peer; `aim` is the index of the thread that shall have the connection there.
    pub(crate) fn dial(
        &self,
        addr: SocketAddr,
        crypto: Arc<QuicClientConfig>,
        aim: u8,
    ) -> Result<quinn::Connecting, quinn::ConnectError> {
        self.dialling.connect_with(client_config(crypto, aim), addr, tls::SERVER_NAME)
    }

    /// The same, for a link that gossip uses.
    pub(crate) fn dial_gossip(
        &self,
        addr: SocketAddr,
        crypto: Arc<QuicClientConfig>,
        aim: u8,
    ) -> Result<quinn::Connecting, quinn::ConnectError> {
        let mut config = client_config(crypto, aim);
        config.transport_config(Arc::new(transport(GOSSIP_STREAMS, GOSSIP_IDLE, Some(GOSSIP_KEEP_ALIVE))));
        self.dialling.connect_with(config, addr, tls::SERVER_NAME)
    }

    /// Closes everything and waits until the peers have been told, or a moment has passed.
    pub(crate) async fn close(&self) {
        for endpoint in [&self.listening, &self.dialling] {
            endpoint.close((starling_protocol::CloseCode::Leaving as u32).into(), b"leaving");
        }
        let told = async { tokio::join!(self.listening.wait_idle(), self.dialling.wait_idle()) };
        let _ = tokio::time::timeout(Duration::from_millis(500), told).await;
    }
}

/// Gossip may have been aimed at a thread that takes calls, and gets no more streams there than elsewhere.
pub(crate) fn limit_to_gossip(connection: &quinn::Connection) {
    connection.set_max_concurrent_bi_streams(GOSSIP_STREAMS[0].into());
    connection.set_max_concurrent_uni_streams(GOSSIP_STREAMS[1].into());
}

/// How many connections an endpoint takes.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// At most; more are refused.
    pub connections: usize,
    /// Above so many, a peer must prove its address first (RFC 9000 §8.1.2).
    pub unproven: usize,
}

impl Room {
    /// Lets a connection attempt in, or refuses it, or asks it to prove its address; `None` if it is dealt with.
    pub fn admit(&self, endpoint: &quinn::Endpoint, incoming: quinn::Incoming) -> Option<quinn::Incoming> {
        let open = endpoint.open_connections();
        if open >= self.connections {
            incoming.refuse();
            return None;
        }
        if open >= self.unproven && !incoming.remote_address_validated() && incoming.may_retry() {
            // It may have been answered already; then it is gone, as it would be.
            let _ = incoming.retry();
            return None;
        }
        Some(incoming)
    }
}

/// An endpoint that can only dial, for a node that has no identity yet.
pub(crate) fn joining_endpoint(addr: SocketAddr) -> io::Result<quinn::Endpoint> {
    let any: SocketAddr = if addr.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    quinn::Endpoint::client(any)
}

pub(crate) fn client_config(crypto: Arc<QuicClientConfig>, aim: u8) -> quinn::ClientConfig {
    let mut config = quinn::ClientConfig::new(crypto);
    config.transport_config(Arc::new(transport(ANSWERS_STREAMS, CALLS_IDLE, Some(CALLS_KEEP_ALIVE))));
    config.initial_dst_cid_provider(Arc::new(move || OwnedBy(aim).generate_cid()));
    config
}

/// The key of stateless resets (RFC 9000 §10.3), kept on disk: after a restart, peers learn with their next packet that
/// their old connections are gone.
pub(crate) fn load_or_create_reset_key(state: &StateDir) -> Result<[u8; 32], StateError> {
    const FILE: &str = "reset.key";
    if let Some(key) = state.read(FILE)?.and_then(|bytes| bytes.try_into().ok()) {
        return Ok(key);
    }
    let key: [u8; 32] = rand::random();
    state.write(FILE, &key)?;
    Ok(key)
}

fn transport(streams: [u32; 2], idle: Duration, keep_alive: Option<Duration>) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(streams[0].into())
        .max_concurrent_uni_streams(streams[1].into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .datagram_send_buffer_size(DATAGRAM_SEND_BYTES)
        .datagram_receive_buffer_size(Some(DATAGRAM_RECEIVE_BYTES))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle.as_millis() as u32))))
        // One side keeps a connection alive: the one that dialled it.
        .keep_alive_interval(keep_alive)
        .initial_rtt(Duration::from_millis(50))
        .ack_frequency_config(Some(AckFrequencyConfig::default()));
    config
}

/// Connection ids whose first byte is the index of the owning thread; the rest is random.
#[derive(Debug, Clone, Copy)]
struct OwnedBy(u8);

impl ConnectionIdGenerator for OwnedBy {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; CONNECTION_ID_BYTES];
        rand::rng().fill(&mut bytes[1..]);
        bytes[0] = self.0;
        ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
