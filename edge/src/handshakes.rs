//! How many handshakes an address may begin in which time: each costs more than most requests.

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use starling_http::accept::{Seldom, source_of};

use crate::{caller::caller_key, config::Rate, limits::Limiter};

/// If nobody says otherwise. A core makes some thousands in a second.
pub(crate) const USUAL: Rate = Rate { count: NonZeroU32::new(2000).unwrap(), window: Duration::from_secs(1) };

/// Counts handshakes by address, in IPv6 by /64.
pub(crate) struct Handshakes {
    proven: Limiter,
    /// Of whoever says that he has an address. It costs the one who has it nothing.
    claimed: Limiter,
    rate: Rate,
    full: Mutex<Seldom>,
}

impl Handshakes {
    /// At `rate` in the long run, and at once what it gives in its time.
    pub(crate) fn new(rate: Rate) -> Self {
        let limiter = || Limiter::new(rate, rate.count);
        Self { proven: limiter(), claimed: limiter(), rate, full: Mutex::default() }
    }

    /// Whether one more may begin. Otherwise whoever has not proven his address is to do that first.
    pub(crate) fn takes(&self, from: IpAddr, is_proven: bool) -> bool {
        let limiter = if is_proven { &self.proven } else { &self.claimed };
        let takes = limiter.take(&caller_key(None, from), 1, Instant::now()).allowed;
        if !takes && is_proven && self.full.lock().unwrap_or_else(PoisonError::into_inner).may_speak() {
            let Rate { count, window } = self.rate;
            tracing::warn!(from = %source_of(from), most = count, in_s = window.as_secs(), "an address begins more connections than it may");
        }
        takes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_in_its_name_costs_an_address_nothing() {
        let rate = Rate { count: NonZeroU32::new(2).unwrap(), window: Duration::from_secs(3600) };
        let handshakes = Handshakes::new(rate);
        let takes = |from: &str, is_proven| handshakes.takes(from.parse().unwrap(), is_proven);
        let claimed: Vec<bool> = (0..3).map(|_| takes("192.0.2.1", false)).collect();
        assert_eq!(claimed, [true, true, false]);
        let proven: Vec<bool> = (0..3).map(|_| takes("192.0.2.1", true)).collect();
        assert_eq!(proven, [true, true, false]);
        assert!(takes("192.0.2.2", true));
        assert!(takes("2001:db8::1", true) && takes("2001:db8::2", true) && !takes("2001:db8::3", true), "one /64");
    }
}
