//! The data-plane thread.

use tokio_util::sync::CancellationToken;

/// A thread that carries calls, with its runtime.
pub(super) struct Worker {
    pub(super) handle: tokio::runtime::Handle,
    pub(super) stop: CancellationToken,
}

impl Worker {
    pub(super) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the system has resources for an event loop");
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name("worker-0".into())
            .spawn(move || runtime.block_on(stopped.cancelled()))
            .expect("the system has resources for a thread");
        Self { handle, stop }
    }
}
