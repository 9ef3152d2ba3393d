//! Interim answers: heads that come before the answer, such as 103 with what a page will need (RFC 9110 §15.2, RFC 8297).

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use http::{HeaderMap, Response, StatusCode, request};
use tokio::sync::Notify;

use crate::normal::{self, Origin};

/// Interim answers of a request that are passed on; more are dropped, which changes nothing for its client.
const MAX_PASSED_ON: usize = 16;
/// Interim answers that a client of ours takes before the final one is waited for no longer.
pub(crate) const MAX_TAKEN: usize = 32;

/// The way of interim answers back to a client whose protocol can carry them. Whoever serves the request puts it among the
/// request's extensions, and whoever asks somebody else for the answer uses it.
#[derive(Debug, Clone, Default)]
pub struct Interim(Arc<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    heads: Mutex<VecDeque<Response<()>>>,
    passed_on: AtomicUsize,
    told: Notify,
}

impl Interim {
    /// The way back to the client of a request, if there is one.
    pub fn of(request: &request::Parts) -> Option<&Self> {
        request.extensions.get()
    }

    /// Passes on an interim answer, in normal form. 100 is between neighbours, and 101 is not interim to those behind this one.
    pub fn pass_on(&self, status: StatusCode, fields: HeaderMap, origin: Origin) {
        if !status.is_informational() || matches!(status, StatusCode::CONTINUE | StatusCode::SWITCHING_PROTOCOLS) {
            return;
        }
        if self.0.passed_on.fetch_add(1, Relaxed) >= MAX_PASSED_ON {
            return;
        }
        let mut head = Response::new(());
        (*head.status_mut(), *head.headers_mut()) = (status, fields);
        normal::clean_interim(head.headers_mut(), origin);
        self.heads().push_back(head);
        self.0.told.notify_one();
    }

    /// The next one; waits for ever if there is none. Cancel safe.
    pub(crate) async fn next(&self) -> Response<()> {
        loop {
            match self.take() {
                Some(head) => return head,
                None => self.0.told.notified().await,
            }
        }
    }

    /// The next one, if there is one.
    pub(crate) fn take(&self) -> Option<Response<()>> {
        self.heads().pop_front()
    }

    fn heads(&self) -> MutexGuard<'_, VecDeque<Response<()>>> {
        self.0.heads.lock().unwrap_or_else(|e| e.into_inner())
    }
}
