//! How much one peer may say.

use std::time::Instant;

/// Datagrams and streams a second, and how many may come at once. A member of a mesh of a thousand nodes in the middle of
/// a partition says a tenth of that.
const DATAGRAMS_PER_SECOND: f64 = 500.0;
const DATAGRAM_BURST: f64 = 1000.0;
const STREAMS_PER_SECOND: f64 = 50.0;
const STREAM_BURST: f64 = 200.0;
/// Bytes on streams. A node that comes into a mesh of ten thousand is told 12 MiB, once.
const BYTES_PER_SECOND: f64 = (2 << 20) as f64;
const BYTE_BURST: f64 = (48 << 20) as f64;

/// What a peer may still send.
#[derive(Debug)]
pub(super) struct Flow {
    datagrams: Bucket,
    streams: Bucket,
    bytes: Bucket,
    warned: Option<Instant>,
}

impl Flow {
    pub(super) fn new(now: Instant) -> Self {
        let datagrams = Bucket { tokens: DATAGRAM_BURST, at: now, rate: DATAGRAMS_PER_SECOND, burst: DATAGRAM_BURST };
        let streams = Bucket { tokens: STREAM_BURST, at: now, rate: STREAMS_PER_SECOND, burst: STREAM_BURST };
        let bytes = Bucket { tokens: BYTE_BURST, at: now, rate: BYTES_PER_SECOND, burst: BYTE_BURST };
        Self { datagrams, streams, bytes, warned: None }
    }

    /// Whether one more datagram is fine.
    pub(super) fn datagram(&mut self, now: Instant) -> bool {
        self.datagrams.take(1.0, now)
    }

    /// Whether one more stream is fine.
    pub(super) fn stream(&mut self, now: Instant) -> bool {
        self.streams.take(1.0, now)
    }

    /// Whether so many bytes more on a stream are fine.
    pub(super) fn bytes(&mut self, count: usize, now: Instant) -> bool {
        self.bytes.take(count as f64, now)
    }

    /// Whether to say that the peer floods us: once a minute.
    pub(super) fn is_first_of_flood(&mut self) -> bool {
        let first = self.warned.is_none_or(|at| at.elapsed().as_secs() >= 60);
        if first {
            self.warned = Some(Instant::now());
        }
        first
    }
}

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
    rate: f64,
    burst: f64,
}

impl Bucket {
    fn take(&mut self, count: f64, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.rate;
        self.at = now;
        self.tokens = (self.tokens + earned).min(self.burst);
        let fine = self.tokens >= count;
        self.tokens -= if fine { count } else { 0.0 };
        fine
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_and_a_flood_does_not() {
        let now = Instant::now();
        let mut flow = Flow::new(now);
        assert_eq!((0..5000).filter(|_| flow.datagram(now)).count(), DATAGRAM_BURST as usize);
        assert!(flow.stream(now), "datagrams do not use up streams");
        assert_eq!((0..9).filter(|_| flow.bytes(16 << 20, now)).count(), 3, "large frames are few");
        assert!(!flow.bytes(1, now) && flow.bytes(1 << 20, now + Duration::from_secs(1)));
        let later = now + Duration::from_secs(1);
        assert_eq!((0..5000).filter(|_| flow.datagram(later)).count(), DATAGRAMS_PER_SECOND as usize);
    }
}
