//! With clients that open requests only to give them up.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// A request that is given up as soon as this was perhaps never meant. Whoever changes his mind takes longer.
const RAPID: Duration = Duration::from_millis(50);
/// How many of these a client may send, at once and each second, before its next requests have to wait.
const CANCELLED_AT_ONCE: f64 = 32.0;
const CANCELLED_PER_SECOND: f64 = 16.0;
/// How long each request of such a client waits, to see whether it is given up, too.
pub(crate) const HOLD: Duration = Duration::from_millis(20);

/// How much a client may give up: whoever opens requests only to reset them (CVE-2023-44487) makes its own next ones wait for
/// a moment, in which they are given up before they cost the service anything.
#[derive(Debug)]
pub(crate) struct Patience {
    credit: Mutex<(f64, Instant)>,
    worn_out: AtomicBool,
}

impl Default for Patience {
    fn default() -> Self {
        Self { credit: Mutex::new((CANCELLED_AT_ONCE, Instant::now())), worn_out: AtomicBool::new(false) }
    }
}

impl Patience {
    /// A request that began then was given up before its answer.
    pub(crate) fn cancelled(&self, begun: Instant) {
        if begun.elapsed() > RAPID {
            return;
        }
        let left = self.earn(1.0);
        self.worn_out.store(left < 1.0, Relaxed);
    }

    pub(crate) fn is_worn_out(&self) -> bool {
        if !self.worn_out.load(Relaxed) {
            return false;
        }
        let worn_out = self.earn(0.0) < 1.0;
        self.worn_out.store(worn_out, Relaxed);
        worn_out
    }

    /// What is left, with what time has brought and without `spent`.
    fn earn(&self, spent: f64) -> f64 {
        let mut credit = self.credit.lock().unwrap_or_else(|e| e.into_inner());
        let earned = credit.1.elapsed().as_secs_f64() * CANCELLED_PER_SECOND;
        *credit = ((credit.0 + earned - spent).clamp(0.0, CANCELLED_AT_ONCE), Instant::now());
        credit.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_wears_out_and_comes_back() {
        let patience = Patience::default();
        let long_ago = Instant::now() - RAPID * 2;
        for _ in 0..100 {
            patience.cancelled(long_ago);
        }
        for _ in 0..CANCELLED_AT_ONCE as usize - 1 {
            patience.cancelled(Instant::now());
        }
        assert!(!patience.is_worn_out());
        patience.cancelled(Instant::now());
        patience.cancelled(Instant::now());
        assert!(patience.is_worn_out());
        patience.credit.lock().unwrap().1 -= Duration::from_secs(1);
        assert!(!patience.is_worn_out());
    }
}
