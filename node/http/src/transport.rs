//! How QUIC connections are tuned, in one place.

use std::{sync::Arc, time::Duration};

use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// What differs between the uses of QUIC. Windows and limits bound what the other end can make this one hold.
#[derive(Debug, Clone, Copy)]
pub struct Transport {
    /// Streams both ways that the other end may have open. quinn has a place for each of them, some 70 bytes, from the
    /// first packet on.
    pub bidi_streams: u32,
    /// Streams one way that the other end may have open.
    pub uni_streams: u32,
    /// What a stream may have received and not read, in bytes: a stuck reader holds so much.
    pub stream_window_bytes: u32,
    /// The same of all streams of a connection: larger than a stream's, so that one stuck reader does not stall its
    /// siblings.
    pub connection_window_bytes: u32,
    /// What may be sent and not acknowledged, in bytes: kept here until it is.
    pub send_window_bytes: u32,
    /// Silence that ends a connection. The shorter one of the two ends holds (RFC 9000 §10.1).
    pub idle: Duration,
    /// How often a quiet connection is kept alive; one side is enough, the one that dialled.
    pub keep_alive: Option<Duration>,
    /// What datagrams may wait, to be sent and to be read, in bytes; `None` refuses datagrams.
    pub datagrams: Option<Datagrams>,
    /// Between nodes of one site: a first guess of the round trip that fits, acknowledgements as rare as both ends like, and
    /// packets as large as the network takes.
    pub between_nodes: bool,
}

/// Room for datagrams that wait, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Datagrams {
    /// To be sent.
    pub send_bytes: usize,
    /// To be read.
    pub receive_bytes: usize,
}

/// Round trip that is assumed before the first one was measured (RFC 9002 §6.2.2 would have 333 ms).
const INITIAL_RTT: Duration = Duration::from_millis(50);

/// The largest packet that is looked for between nodes, where the network takes more than Ethernet's 1500 bytes: most networks of
/// data centres do, and so does loopback. Ten packets are sent in one call of the kernel, which takes 64 KiB at a time.
const MAX_PACKET_BYTES: u16 = 6500;

/// An endpoint between nodes: it takes packets as large as they are looked for.
pub fn takes_large_packets(config: &mut EndpointConfig) {
    config.max_udp_payload_size(MAX_PACKET_BYTES).expect("it is no less than QUIC's least");
}

impl Transport {
    /// As quinn wants it.
    pub fn config(&self) -> Arc<TransportConfig> {
        let mut config = TransportConfig::default();
        config
            .max_concurrent_bidi_streams(self.bidi_streams.into())
            .max_concurrent_uni_streams(self.uni_streams.into())
            .stream_receive_window(self.stream_window_bytes.into())
            .receive_window(self.connection_window_bytes.into())
            .send_window(self.send_window_bytes.into())
            .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(self.idle.as_millis() as u32))))
            .keep_alive_interval(self.keep_alive)
            .datagram_receive_buffer_size(self.datagrams.map(|d| d.receive_bytes))
            .datagram_send_buffer_size(self.datagrams.map_or(0, |d| d.send_bytes));
        if self.between_nodes {
            let mut packets = MtuDiscoveryConfig::default();
            packets.upper_bound(MAX_PACKET_BYTES);
            config
                .initial_rtt(INITIAL_RTT)
                .ack_frequency_config(Some(AckFrequencyConfig::default()))
                .mtu_discovery_config(Some(packets));
        }
        Arc::new(config)
    }
}
