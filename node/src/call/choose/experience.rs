//! This node's own experience with a peer: latency, failures in a row, ejection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Weight of the past: after this long, an old sample counts for about a third.
const DECAY: Duration = Duration::from_secs(10);
/// What a node is taken for before it has answered anything.
const INITIAL_LATENCY: Duration = Duration::from_millis(1);
/// What a failing answer counts as, so that a node that fails fast does not look fast.
const FAILURE_LATENCY: Duration = Duration::from_secs(2);
/// Failures in a row that take a node out.
const MAX_CONSECUTIVE_FAILURES: u32 = 5;
const EJECT_MIN: Duration = Duration::from_secs(1);
const EJECT_MAX: Duration = Duration::from_secs(60);

/// This node's own experience with one peer. Counters only: read and written without locks on the way of a call.
#[derive(Debug)]
pub(crate) struct PeerLoad {
    epoch: Instant,
    in_flight: AtomicU32,
    /// Calls in flight that the peer itself last told, from all its callers.
    told: AtomicU32,
    latency_ns: AtomicU64,
    updated_ms: AtomicU64,
    failures: AtomicU32,
    ejections: AtomicU32,
    ejected_until_ms: AtomicU64,
}

impl PeerLoad {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            in_flight: AtomicU32::new(0),
            told: AtomicU32::new(0),
            latency_ns: AtomicU64::new(INITIAL_LATENCY.as_nanos() as u64),
            updated_ms: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            ejected_until_ms: AtomicU64::new(0),
        }
    }

    /// Counts a call until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> PendingCall {
        self.in_flight.fetch_add(1, Relaxed);
        PendingCall(self.clone())
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    pub(crate) fn told(&self, load: u32) {
        self.told.store(load, Relaxed);
    }

    /// An answer came after `latency`; `failed` if it was an error of the service or a refusal to work.
    pub(crate) fn answered(&self, latency: Duration, failed: bool) {
        self.sample(if failed { latency.max(FAILURE_LATENCY) } else { latency });
        if failed {
            self.count_failure();
        } else {
            self.failures.store(0, Relaxed);
            self.ejections.store(0, Relaxed);
        }
    }

    /// No answer: the connection failed or went silent. Out at once; gossip confirms later.
    pub(crate) fn unreachable(&self) {
        self.sample(FAILURE_LATENCY);
        self.eject();
    }

    pub(crate) fn is_ejected(&self) -> bool {
        self.now_ms() < self.ejected_until_ms.load(Relaxed)
    }

    fn count_failure(&self) {
        if self.failures.fetch_add(1, Relaxed) + 1 >= MAX_CONSECUTIVE_FAILURES {
            self.failures.store(0, Relaxed);
            self.eject();
        }
    }

    fn eject(&self) {
        if self.is_ejected() {
            return;
        }
        let times = self.ejections.fetch_add(1, Relaxed).min(6);
        let pause = (EJECT_MIN * 2u32.pow(times)).min(EJECT_MAX);
        self.ejected_until_ms.store(self.now_ms() + pause.as_millis() as u64, Relaxed);
    }

    fn sample(&self, latency: Duration) {
        let now = self.now_ms();
        let elapsed = now.saturating_sub(self.updated_ms.swap(now, Relaxed));
        let sample = latency.as_nanos() as f64;
        let old = self.latency_ns.load(Relaxed) as f64;
        // Peaks count at once, recovery takes its time.
        let new = if sample > old {
            sample
        } else {
            let keep = (-(elapsed as f64 + 1.0) / DECAY.as_millis() as f64).exp();
            old * keep + sample * (1.0 - keep)
        };
        self.latency_ns.store(new as u64, Relaxed);
    }

    pub(super) fn cost(&self) -> f64 {
        let in_flight = self.in_flight.load(Relaxed).max(self.told.load(Relaxed));
        self.latency_ns.load(Relaxed) as f64 * f64::from(in_flight + 1)
    }

    fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64 + 1
    }
}

/// One call in flight at a peer.
pub(crate) struct PendingCall(Arc<PeerLoad>);

impl Drop for PendingCall {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}
