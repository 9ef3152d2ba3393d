//! Going away in order: who is still busy, and when to stop waiting for them.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// How long a connection that drains is kept for one more request, where it cannot be said which ones were taken, or none was.
const LAST_REQUEST: Duration = Duration::from_secs(1);
/// How long it takes at most until a connection that has come is looked at.
const JUST_COME: Duration = Duration::from_millis(100);
/// What has not ended by itself may say farewell for so long, before it is cut.
const FAREWELL: Duration = Duration::from_millis(500);

/// Shared by every listener of a node: three signals and a count of who is busy.
#[derive(Clone, Debug)]
pub struct Drain {
    /// Of all of it, of which this may be a part.
    whole: CancellationToken,
    draining: CancellationToken,
    leaving: CancellationToken,
    closing: CancellationToken,
    busy: TaskTracker,
}

impl Default for Drain {
    fn default() -> Self {
        let whole = CancellationToken::new();
        let (leaving, closing, busy) = Default::default();
        Self { draining: whole.child_token(), whole, leaving, closing, busy }
    }
}

impl Drain {
    /// The same for a part of what takes part in it, which may also go away by itself.
    #[must_use]
    pub fn part(&self) -> Self {
        Self {
            whole: self.whole.clone(),
            draining: self.draining.child_token(),
            leaving: self.leaving.child_token(),
            closing: self.closing.child_token(),
            busy: self.busy.clone(),
        }
    }

    /// Resolves some time after new work should no longer be taken: a request may have been on its way, and a connection that closes
    /// too soon leaves its client in doubt (RFC 9112 §9.5). Cancel safe.
    pub(crate) async fn no_more_requests(&self) {
        self.draining().await;
        tokio::time::sleep(LAST_REQUEST).await;
    }

    /// Whether that is so of all of it, and not of its connections alone.
    pub fn has_begun_as_a_whole(&self) -> bool {
        self.whole.is_cancelled()
    }

    /// Asks everybody to finish, and waits for nobody.
    pub fn begin(&self) {
        self.draining.cancel();
    }

    /// Runs a connection or listener that the drain must wait for.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.busy.spawn(task)
    }

    /// Makes the drain wait for as long as this is held.
    pub(crate) fn hold(&self) -> TaskTrackerToken {
        self.busy.token()
    }

    /// Whether new work should no longer be taken.
    pub fn has_begun(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Resolves when new work should no longer be taken. Cancel safe.
    pub async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// The same of all of it, and not of a part alone. Cancel safe.
    pub fn begun_as_a_whole(&self) -> impl Future<Output = ()> + Send + use<> {
        self.whole.clone().cancelled_owned()
    }

    /// The same as [`Self::draining`], for somebody who outlives a borrow.
    pub fn begun(&self) -> impl Future<Output = ()> + Send + use<> {
        self.draining.clone().cancelled_owned()
    }

    /// Resolves when the patience is over: who has a word for that is to say it now. Cancel safe.
    pub fn leaving(&self) -> impl Future<Output = ()> + Send + use<> {
        self.leaving.clone().cancelled_owned()
    }

    /// Resolves when connections are to be cut. Cancel safe.
    pub async fn closing(&self) {
        self.closing.cancelled().await;
    }

    /// Asks everybody to finish; cuts off whoever has not after `patience`. Returns whether all finished by themselves.
    pub async fn finish(&self, patience: Duration) -> bool {
        self.whole.cancel();
        self.finish_connections(patience).await
    }

    /// The same where the whole goes on, in another process: each connection goes away as a part of it.
    pub async fn finish_connections(&self, patience: Duration) -> bool {
        self.draining.cancel();
        // Who has come, and was not looked at yet, is not busy yet.
        tokio::time::sleep(JUST_COME).await;
        self.busy.close();
        let in_time = tokio::time::timeout(patience, self.busy.wait()).await.is_ok();
        if !in_time {
            self.leaving.cancel();
            let _ = tokio::time::timeout(FAREWELL, self.busy.wait()).await;
        }
        self.closing.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.busy.wait()).await;
        in_time
    }
}
