//! UDP packets by what became of them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use starling_http::tunnel::Passage;

/// UDP packets of all workers, by what became of them, since the start.
#[derive(Debug, Default)]
pub(crate) struct PacketCounts {
    datagrams: AtomicU64,
    capsules: AtomicU64,
    delivered: AtomicU64,
    dropped: AtomicU64,
}

impl PacketCounts {
    /// Counts one that was to go into a tunnel.
    pub(crate) fn sent(&self, how: Passage) {
        let count = match how {
            Passage::Datagram => &self.datagrams,
            Passage::Capsule => &self.capsules,
            Passage::Dropped => &self.dropped,
        };
        count.fetch_add(1, Relaxed);
    }

    /// Counts one that came out of a tunnel, and whether it could be handed on.
    pub(crate) fn came_out(&self, handed_on: bool) {
        let count = if handed_on { &self.delivered } else { &self.dropped };
        count.fetch_add(1, Relaxed);
    }

    /// Counts so many that came to nothing.
    pub(crate) fn dropped(&self, packets: u64) {
        self.dropped.fetch_add(packets, Relaxed);
    }

    /// All of them, by name.
    pub(super) fn read(&self) -> [(&'static str, u64); 4] {
        let Self { datagrams, capsules, delivered, dropped } = self;
        [("datagram", datagrams), ("stream", capsules), ("delivered", delivered), ("dropped", dropped)]
            .map(|(name, count)| (name, count.load(Relaxed)))
    }
}
