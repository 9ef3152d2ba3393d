//! QUIC endpoints: one UDP port for everything, served by the control thread and the workers.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::hmac;
use quinn::{EndpointConfig, TokioRuntime, crypto::rustls::QuicClientConfig};
use starling_gossip::Profile;
use starling_http::{
    Datagrams, Shelf, Transport,
    h3::Order,
    shared_port::{self, OwnedBy, aimed_at},
    takes_large_packets,
};

use crate::{
    identity::{Identity, tls},
    state::{StateDir, StateError},
};

/// Index of the control thread in connection ids. Workers count from 1.
pub(crate) const CONTROL: u8 = 0;
/// Highest index that calls can be aimed at.
const HIGHEST: u8 = u8::MAX;

/// What the bodies on one connection may hold that nobody has read yet, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    /// Of one stream: as much as is on its way during a round trip at a good rate, and not more, because a reader that stands
    /// still holds so much. 192 KiB are 192 MiB/s at 1 ms, 1 MiB is 20 MiB/s at 50 ms. With 64 KiB, a stream that is alone has
    /// half the rate over loopback, because its two ends work in turn.
    stream_bytes: u32,
    /// Of all: so much that a thousand readers that stand still leave room for the others.
    connection_bytes: u32,
    /// Of those that stand still; above it, those that stand longest are ended.
    standing_bytes: u32,
    /// In which order they are sent.
    order: Order,
}

/// What a stream that stands still holds beside its window, whatever that is, and as a share of it: packets are received many at a
/// time, and each batch stays as long as one stream holds a part of it. Measured with 50 to 200 streams and windows of 64 to
/// 512 KiB.
const PINNED_BYTES: u64 = 96 << 10;
const PINNED_SHARE: u64 = 4;

impl Windows {
    pub(crate) fn of(profile: Profile) -> Self {
        match profile {
            Profile::Lan => Self {
                stream_bytes: 192 << 10,
                connection_bytes: 128 << 20,
                standing_bytes: 96 << 20,
                order: Order::InLine,
            },
            Profile::Wan => Self {
                stream_bytes: 1 << 20,
                connection_bytes: 384 << 20,
                standing_bytes: 192 << 20,
                order: Order::Mixed,
            },
        }
    }

    /// For the nth connection of one peer, from 1: less and less, so that eight of them may hold less than three would.
    pub(crate) fn of_connection(self, nth: usize) -> Self {
        let share = |bytes: u32| bytes / u32::try_from(nth).unwrap_or(u32::MAX).max(1);
        Self {
            connection_bytes: share(self.connection_bytes).max(8 * self.stream_bytes),
            standing_bytes: share(self.standing_bytes).max(4 * self.stream_bytes),
            ..self
        }
    }

    /// Where the bodies of a connection stand that nobody reads.
    pub(crate) fn shelf(self) -> Shelf {
        let window = u64::from(self.stream_bytes);
        Shelf::new(self.standing_bytes.into(), window + window / PINNED_SHARE + PINNED_BYTES)
    }

    /// In which order the streams of a connection are sent.
    pub(crate) fn order(self) -> Order {
        self.order
    }

    fn on(self, transport: Transport) -> Transport {
        let (stream_window_bytes, connection_window_bytes) = (self.stream_bytes, self.connection_bytes);
        Transport { stream_window_bytes, connection_window_bytes, ..transport }
    }
}

/// Towards whoever dials for calls or to join. The shorter idle time of the two ends holds, so a listener may have the
/// longest.
const CALLS_IN: Transport = Transport {
    bidi_streams: 4096,
    uni_streams: 64,
    // Of those that carry calls: see `Windows`.
    stream_window_bytes: 1 << 20,
    connection_window_bytes: 8 << 20,
    send_window_bytes: 8 << 20,
    idle: Duration::from_secs(120),
    keep_alive: None,
    // UDP packets; those of all flows together, that is.
    datagrams: Some(Datagrams { send_bytes: 256 << 10, receive_bytes: 1 << 20 }),
    between_nodes: true,
};
/// Before it is known who dials: enough for a handshake and a request to join.
const STRANGER_STREAMS: u32 = 8;
const STRANGER_WINDOW_BYTES: u32 = 128 << 10;
/// Towards whoever is dialled for calls or to join. Servers open no streams both ways (RFC 9114 §6.1).
const CALLS_OUT: Transport =
    Transport { bidi_streams: 0, idle: Duration::from_secs(30), keep_alive: Some(Duration::from_secs(10)), ..CALLS_IN };
/// On the thread that has gossip. Its links are many and nearly silent, so they get places for few streams.
const GOSSIP_IN: Transport = Transport {
    bidi_streams: 16,
    uni_streams: 0,
    // A probe that waited behind more would be stale.
    datagrams: Some(Datagrams { send_bytes: 16 << 10, receive_bytes: 64 << 10 }),
    ..CALLS_IN
};
/// Gossip's links are kept alive by probes in a small mesh; in a large one often enough for the state that firewalls keep of
/// a UDP flow that goes both ways.
const GOSSIP_OUT: Transport = Transport { keep_alive: Some(Duration::from_secs(45)), ..GOSSIP_IN };

/// The endpoint of one thread: what arrives on the mesh port with this thread's index, and what this thread dials.
///
/// Dialling has a socket of its own, so that one pair of addresses carries one connection: receive offload merges packets
/// by address pair.
#[derive(Clone)]
pub(crate) struct MeshEndpoint {
    /// Incoming connections; `None` if another thread takes them all.
    listening: Option<quinn::Endpoint>,
    dialling: quinn::Endpoint,
    /// Which of a peer's threads connections are aimed at. It is not known how many workers there are; the peer's kernel
    /// takes the remainder.
    aim: u8,
    windows: Windows,
}

impl MeshEndpoint {
    /// Puts a socket of the group to work on the current runtime, where calls are taken or only gossip. `like` is an address of
    /// the mesh port.
    pub(crate) fn new(
        socket: Option<UdpSocket>,
        like: SocketAddr,
        owned: OwnedBy,
        takes_calls: bool,
        identity: &Arc<Identity>,
        reset_key: &[u8; 32],
        windows: Windows,
    ) -> io::Result<Self> {
        let listen = |socket| {
            let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, reset_key)));
            config.cid_generator(move || Box::new(owned));
            takes_large_packets(&mut config);
            let mut server = quinn::ServerConfig::with_crypto(tls::server_crypto(identity));
            let known = if takes_calls { windows.on(CALLS_IN) } else { GOSSIP_IN };
            let stranger = Transport {
                bidi_streams: STRANGER_STREAMS,
                uni_streams: STRANGER_STREAMS,
                connection_window_bytes: STRANGER_WINDOW_BYTES,
                ..known
            };
            server.transport_config(stranger.config());
            quinn::Endpoint::new(config, Some(server), socket, Arc::new(TokioRuntime))
        };
        let listening = socket.map(listen).transpose()?;
        let mut config = EndpointConfig::default();
        takes_large_packets(&mut config);
        let dialling = quinn::Endpoint::new(config, None, shared_port::ephemeral(like)?, Arc::new(TokioRuntime))?;
        // Workers of a node aim at different ones, and nodes do not all aim at the same.
        let aim = match owned.index() {
            CONTROL => CONTROL,
            worker => 1 + ((u16::from(identity.id().0[0]) + u16::from(worker)) % u16::from(HIGHEST)) as u8,
        };
        Ok(Self { listening, dialling, aim, windows })
    }

    /// Where incoming connections are to be taken, if it is here.
    pub(crate) fn listening(&self) -> Option<&quinn::Endpoint> {
        self.listening.as_ref()
    }

    /// What connections for calls may hold.
    pub(crate) fn windows(&self) -> Windows {
        self.windows
    }

    /// Dials a peer, for calls: the thread of it that connections from here are aimed at, or the nth behind it.
    pub(crate) fn dial(
        &self,
        addr: SocketAddr,
        crypto: Arc<QuicClientConfig>,
        nth: u8,
    ) -> Result<quinn::Connecting, quinn::ConnectError> {
        let mut config = client_config(crypto, self.aim.checked_add(nth).unwrap_or(CONTROL + 1));
        config.transport_config(self.windows.on(CALLS_OUT).config());
        self.dialling.connect_with(config, addr, tls::SERVER_NAME)
    }

    /// The same, for a link that gossip uses: the peer's control thread shall have it.
    pub(crate) fn dial_gossip(
        &self,
        addr: SocketAddr,
        crypto: Arc<QuicClientConfig>,
    ) -> Result<quinn::Connecting, quinn::ConnectError> {
        let mut config = client_config(crypto, CONTROL);
        config.transport_config(GOSSIP_OUT.config());
        self.dialling.connect_with(config, addr, tls::SERVER_NAME)
    }

    /// Closes everything and waits until the peers have been told, or a moment has passed.
    pub(crate) async fn close(&self) {
        for endpoint in self.listening.iter().chain([&self.dialling]) {
            endpoint.close((starling_protocol::CloseCode::Leaving as u32).into(), b"leaving");
        }
        let told = async {
            for endpoint in self.listening.iter().chain([&self.dialling]) {
                endpoint.wait_idle().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(500), told).await;
    }
}

/// The peer is a member that calls: it gets the room that it needs.
pub(crate) fn welcome_to_calls(connection: &quinn::Connection, windows: Windows) {
    welcome(connection, &windows.on(CALLS_IN));
}

/// The peer begins nothing new on this connection: what goes on needs little of it.
pub(crate) fn narrow(connection: &quinn::Connection, windows: Windows) {
    connection.set_receive_window(windows.connection_bytes.into());
}

/// The peer is a member that gossips or carries a join, whichever thread it aimed at. Not more than it needs: QUIC keeps some
/// 50 bytes for every stream that a peer may open, and a node has a link to everybody.
pub(crate) fn welcome_to_gossip(connection: &quinn::Connection) {
    welcome(connection, &GOSSIP_IN);
}

fn welcome(connection: &quinn::Connection, room: &Transport) {
    connection.set_receive_window(room.connection_window_bytes.into());
    connection.set_max_concurrent_bi_streams(room.bidi_streams.into());
    connection.set_max_concurrent_uni_streams(room.uni_streams.into());
}

/// An endpoint that can only dial, for a node that has no identity yet.
pub(crate) fn joining_endpoint(addr: SocketAddr) -> io::Result<quinn::Endpoint> {
    let any: SocketAddr = if addr.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    quinn::Endpoint::client(any)
}

pub(crate) fn client_config(crypto: Arc<QuicClientConfig>, aim: u8) -> quinn::ClientConfig {
    let mut config = quinn::ClientConfig::new(crypto);
    config.transport_config(CALLS_OUT.config());
    config.initial_dst_cid_provider(Arc::new(move || aimed_at(aim)));
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
