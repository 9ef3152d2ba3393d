//! Whether an edge has what more requests would take: memory, and time of the worker that they came to. If it has not, they are refused
//! while they are cheap, so that those under way get on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::StatusCode;
use starling_http::{Problem, accept::Seldom};
use starling_node::memory;

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Parts of what the process may have: from the first on new requests are refused, from the second on new connections too, and below the
/// third all are taken again.
const MUCH: f64 = 0.90;
const MOST: f64 = 0.95;
const FINE: f64 = 0.85;
/// Pause between two times that what is free is given back before its time.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// How often a worker looks whether its turn comes in time.
const TICK: Duration = Duration::from_millis(100);
/// So much later is late, and so many times in a row is no accident: whoever stood still for once was late once. Where everybody waits
/// that long, and has for seconds, more comes in than goes out. A turn that is half as late ends it.
const LATE: Duration = Duration::from_secs(1);
const TIMES: u32 = 3;

/// When a client that was refused may try again.
const LATER: Duration = Duration::from_secs(2);

/// How it stands with memory, of the whole process.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    is_short: AtomicBool,
    is_out: AtomicBool,
    /// Requests that were refused since it is short.
    refused: AtomicU64,
}

impl Memory {
    /// Looks after it as long as the edge runs. `allowed` is what the process may have, in bytes, if anybody says.
    pub(crate) async fn watch(self: Arc<Self>, allowed: impl Fn() -> Option<u64>) {
        let (mut said, mut says, mut gave_back) = (Seldom::default(), false, None::<Instant>);
        loop {
            tokio::time::sleep(LOOK).await;
            let Some(allowed) = allowed() else {
                self.set(0.0);
                continue;
            };
            let share = || memory::resident() as f64 / allowed as f64;
            if share() >= FINE && gave_back.is_none_or(|at| at.elapsed() >= GIVE_BACK) {
                // What is free is no reason to refuse anybody.
                gave_back = Some(Instant::now());
                memory::give_back_now().await;
            }
            let resident = memory::resident();
            match (self.set(share()), self.is_short()) {
                (false, true) => {
                    says = said.may_speak();
                    if says {
                        tracing::warn!(
                            resident,
                            allowed,
                            "short of memory: new requests are refused until there is more; is `[edge] memory`, or MemoryMax= of the unit, enough?"
                        );
                    }
                }
                (true, false) => {
                    let refused = self.refused.swap(0, Relaxed);
                    if says {
                        tracing::info!(resident, allowed, refused, "there is memory again");
                    }
                }
                _ => {}
            }
        }
    }

    /// It is so much of what it may be; gives back whether it was short before.
    fn set(&self, share: f64) -> bool {
        let was = self.is_short();
        self.is_short.store(share >= if was { FINE } else { MUCH }, Relaxed);
        self.is_out.store(share >= MOST, Relaxed);
        was
    }

    pub(crate) fn is_short(&self) -> bool {
        self.is_short.load(Relaxed)
    }

    /// Whether new connections are refused as well.
    pub(crate) fn is_out(&self) -> bool {
        self.is_out.load(Relaxed)
    }
}

/// Whether a worker is behind with its work.
#[derive(Debug, Default)]
pub(crate) struct Lag {
    is_behind: AtomicBool,
    refused: AtomicU64,
}

impl Lag {
    /// Runs on the worker, as long as it does.
    pub(crate) async fn watch(self: Arc<Self>, worker: u8) {
        let (mut said, mut says, mut late) = (Seldom::default(), false, 0);
        loop {
            let due = Instant::now() + TICK;
            tokio::time::sleep_until(due.into()).await;
            late = times_late(late, due.elapsed());
            let (was, is) = (self.is_behind(), late >= TIMES);
            self.is_behind.store(is, Relaxed);
            if is && !was {
                says = said.may_speak();
                if says {
                    tracing::warn!(
                        worker,
                        "behind with its work, for seconds: new requests are refused until it has caught up; more processors or edges would help"
                    );
                }
            } else if was && !is {
                let refused = self.refused.swap(0, Relaxed);
                if says {
                    tracing::info!(worker, refused, "new requests are taken again");
                }
            }
        }
    }

    pub(crate) fn is_behind(&self) -> bool {
        self.is_behind.load(Relaxed)
    }
}

/// How many times in a row it was late, after one more look.
fn times_late(before: u32, late: Duration) -> u32 {
    match () {
        () if late >= LATE => before.saturating_add(1),
        // Neither better nor worse.
        () if before >= TIMES && late >= LATE / 2 => before,
        () => 0,
    }
}

/// Whether one more request can be taken on.
pub(crate) fn admit(memory: &Memory, lag: &Lag) -> Result<(), Problem> {
    let (refused, detail) = match (memory.is_short(), lag.is_behind()) {
        (true, _) => (&memory.refused, "there is no memory for more requests; try again"),
        (_, true) => (&lag.refused, "there are more requests than can be answered in time; try again"),
        _ => return Ok(()),
    };
    refused.fetch_add(1, Relaxed);
    Err(Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "overloaded", detail).retry_after(LATER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_short_until_there_is_clearly_more() {
        let memory = Memory::default();
        let is = |share| {
            memory.set(share);
            (memory.is_short(), memory.is_out())
        };
        assert_eq!(is(0.89), (false, false));
        assert_eq!(is(0.90), (true, false));
        assert_eq!(is(0.96), (true, true));
        assert_eq!(is(0.86), (true, false));
        assert_eq!(is(0.84), (false, false));
        assert_eq!(is(0.89), (false, false));
    }

    #[test]
    fn a_worker_is_behind_when_it_is_late_again_and_again() {
        let after = |seconds: &[f64]| seconds.iter().fold(0, |n, late| times_late(n, Duration::from_secs_f64(*late)));
        assert_eq!(after(&[60.0, 0.0]), 0, "it stood still for once");
        assert_eq!(after(&[1.0, 1.0]), 2);
        assert_eq!(after(&[1.0, 0.6, 1.0]), 1);
        assert_eq!(after(&[1.0, 1.0, 1.0, 0.6]), TIMES, "not better yet");
        assert_eq!(after(&[1.0, 1.0, 1.0, 0.4]), 0);
    }

    #[test]
    fn requests_are_refused_for_either_reason() {
        let (memory, lag) = (Memory::default(), Lag::default());
        assert!(admit(&memory, &lag).is_ok());
        lag.is_behind.store(true, Relaxed);
        let problem = admit(&memory, &lag).unwrap_err();
        assert_eq!(problem.status, StatusCode::SERVICE_UNAVAILABLE);
        memory.set(1.0);
        assert!(admit(&memory, &lag).unwrap_err().detail.contains("memory"));
        assert_eq!((memory.refused.load(Relaxed), lag.refused.load(Relaxed)), (1, 1));
    }
}
