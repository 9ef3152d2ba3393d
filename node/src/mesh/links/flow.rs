//! How much one peer may say.

use std::time::Instant;

/// Datagrams and streams a second, and how many may come at once. A member of a mesh of a thousand nodes in the middle of
/// a partition says a tenth of that.
const DATAGRAMS_PER_SECOND: f64 = 500.0;
const DATAGRAM_BURST: f64 = 1000.0;
const STREAMS_PER_SECOND: f64 = 50.0;
const STREAM_BURST: f64 = 200.0;

/// What a peer may still send.
#[derive(Debug)]
pub(super) struct Flow {
    datagrams: Bucket,
    streams: Bucket,
    warned: Option<Instant>,
}

impl Flow {
    pub(super) fn new(now: Instant) -> Self {
        let datagrams = Bucket { tokens: DATAGRAM_BURST, at: now, rate: DATAGRAMS_PER_SECOND, burst: DATAGRAM_BURST };
        let streams = Bucket { tokens: STREAM_BURST, at: now, rate: STREAMS_PER_SECOND, burst: STREAM_BURST };
        Self { datagrams, streams, warned: None }
    }

    /// Whether one more datagram is fine.
    pub(super) fn datagram(&mut self, now: Instant) -> bool {
        self.datagrams.take(now)
    }

    /// Whether one more stream is fine.
    pub(super) fn stream(&mut self, now: Instant) -> bool {
        self.streams.take(now)
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
    fn take(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.rate;
        self.at = now;
        self.tokens = (self.tokens + earned).min(self.burst);
        let fine = self.tokens >= 1.0;
        self.tokens -= if fine { 1.0 } else { 0.0 };
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
        let later = now + Duration::from_secs(1);
        assert_eq!((0..5000).filter(|_| flow.datagram(later)).count(), DATAGRAMS_PER_SECOND as usize);
    }
}
