//! Whom to call for a full exchange of state, and when: seeds and former peers that do not answer, members thought dead,
//! members whose record is missing, and now and then anybody.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// First pause between two calls of one address.
const RETRY_MIN: Duration = Duration::from_millis(250);
/// Longest pause. Also how fast a healed partition is noticed.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Most addresses called in one round, so that a long list of dead ones costs little.
const PER_ROUND: usize = 3;

/// A schedule of retries by address. Never gives an address up while it is wanted.
#[derive(Debug, Default)]
pub(crate) struct Contacts {
    schedule: HashMap<SocketAddr, Retry>,
}

#[derive(Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl Contacts {
    /// The addresses among `wanted` whose time has come, and their next time. Addresses no longer wanted are forgotten.
    /// Those that wait longest come first, so that none starves behind a long list.
    pub(crate) fn due(&mut self, wanted: &BTreeSet<SocketAddr>, now: Instant) -> Vec<SocketAddr> {
        self.schedule.retain(|addr, _| wanted.contains(addr));
        for &addr in wanted {
            self.schedule.entry(addr).or_insert(Retry { at: now, pause: RETRY_MIN });
        }
        let mut due: Vec<_> =
            self.schedule.iter().filter(|(_, retry)| retry.at <= now).map(|(a, r)| (r.at, *a)).collect();
        due.sort_unstable();
        due.truncate(PER_ROUND);
        for (_, addr) in &due {
            if let Some(retry) = self.schedule.get_mut(addr) {
                retry.at = now + retry.pause;
                retry.pause = (retry.pause * 2).min(RETRY_MAX);
            }
        }
        due.into_iter().map(|(_, addr)| addr).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_tried_for_ever_with_bounded_pauses() {
        let addr: SocketAddr = ([10, 0, 0, 1], 7400).into();
        let mut contacts = Contacts::default();
        let start = Instant::now();
        let mut tries = 0;
        for tenth in 0..6000 {
            tries += contacts.due(&BTreeSet::from([addr]), start + Duration::from_millis(100 * tenth)).len();
        }
        assert!((118..130).contains(&tries), "{tries} tries in ten minutes");
    }

    #[test]
    fn no_address_starves_behind_others() {
        let wanted: BTreeSet<SocketAddr> = (1..=60).map(|port| ([10, 0, 0, 1], port).into()).collect();
        let mut contacts = Contacts::default();
        let start = Instant::now();
        let mut called = BTreeSet::new();
        for quarter in 0..40 {
            called.extend(contacts.due(&wanted, start + Duration::from_millis(250 * quarter)));
        }
        assert_eq!(called, wanted);
    }

    #[test]
    fn an_address_that_is_wanted_again_is_tried_at_once() {
        let addr: SocketAddr = ([10, 0, 0, 1], 7400).into();
        let mut contacts = Contacts::default();
        let now = Instant::now();
        assert_eq!(contacts.due(&BTreeSet::from([addr]), now), [addr]);
        assert_eq!(contacts.due(&BTreeSet::from([addr]), now), []);
        assert_eq!(contacts.due(&BTreeSet::new(), now), []);
        assert_eq!(contacts.due(&BTreeSet::from([addr]), now), [addr]);
    }
}
