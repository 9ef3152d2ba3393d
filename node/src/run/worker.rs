//! The threads that carry calls.

use std::{io, time::Duration};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{MeshClient, Observer, inbound::Inbound, port::endpoint::MeshEndpoint};

/// How often each worker is asked whether it still turns, and how long it may take to say so.
const LOOK: Duration = Duration::from_secs(1);

/// A thread with an event loop.
pub(super) struct Thread {
    pub(super) runtime: Handle,
    stop: CancellationToken,
}

impl Thread {
    pub(super) fn start(number: u8) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || runtime.block_on(stopped.cancelled()))?;
        Ok(Self { runtime: handle, stop })
    }

    /// Does something that needs its event loop.
    pub(super) fn enter<T>(&self, what: impl FnOnce() -> T) -> T {
        let _runtime = self.runtime.enter();
        what()
    }
}

/// One of the threads that carry calls, with all that is its own: nothing of it is touched by the others.
pub struct Worker {
    pub(super) thread: Thread,
    pub(super) number: u8,
    pub(super) endpoint: MeshEndpoint,
    pub(super) client: MeshClient,
    pub(super) observer: Observer,
    pub(super) inbound: Inbound,
}

impl Worker {
    /// What runs on its thread.
    pub fn runtime(&self) -> &Handle {
        &self.thread.runtime
    }

    /// Calls services from this thread.
    pub fn client(&self) -> &MeshClient {
        &self.client
    }

    /// Notes the calls of this thread.
    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// Which of the workers it is, from 0.
    pub fn number(&self) -> u8 {
        self.number
    }

    pub(super) fn stop(&self) {
        self.thread.stop.cancel();
    }
}

/// Says when a worker stands still, and when it turns again: its calls wait meanwhile, and nobody else's.
pub(super) async fn watch(runtime: Handle, number: u8) {
    loop {
        tokio::time::sleep(LOOK).await;
        let mut answer = runtime.spawn(async {});
        let asked = tokio::time::Instant::now();
        let answered = match tokio::time::timeout(LOOK, &mut answer).await {
            Ok(answered) => answered,
            Err(_) => {
                tracing::warn!(worker = number, "a worker does not answer; its calls wait");
                let answered = answer.await;
                if answered.is_ok() {
                    tracing::warn!(worker = number, after = ?asked.elapsed(), "the worker is back");
                }
                answered
            }
        };
        if answered.is_err() {
            // Its event loop has ended, with the node.
            return;
        }
    }
}
