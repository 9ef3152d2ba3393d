//! When a reader or writer stands still.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep};

/// How long somebody may take nothing of what is there for him, before what he holds is taken back. The silence of a stream
/// that has nothing to give is no stall.
pub(crate) const STALL: Duration = Duration::from_secs(30);

/// The same where bytes are carried that are no HTTP: a program's pause is no fault, and as long as its silence may be.
pub(crate) const TUNNEL_STALL: Duration = Duration::from_secs(3600);

/// Measures how long something that should move has not.
#[derive(Debug)]
pub(crate) struct Stall {
    limit: Duration,
    since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

/// With the usual patience.
impl Default for Stall {
    fn default() -> Self {
        Self::of(STALL)
    }
}

impl Stall {
    /// With that much patience.
    pub(crate) fn of(limit: Duration) -> Self {
        Self { limit, since: None, timer: None }
    }

    /// It moved.
    pub(crate) fn moved(&mut self) {
        self.since = None;
    }

    /// It does not move at the moment; ready once it has not for too long.
    pub(crate) fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let due = *self.since.get_or_insert_with(Instant::now) + self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(())
    }
}
