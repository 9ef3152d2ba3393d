//! A request's body at the server, read by whoever forwards it and watched by the request's own task: a caller that gives its
//! upload up is to be noticed also while nobody reads.

use std::{
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;

use super::{
    Code,
    stream::{Broken, Receiver},
};
use crate::BodyError;

/// How often an upload that nobody reads is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// The request task's hold on the upload.
pub(crate) struct Upload(Arc<Mutex<State>>);

/// The reader's hold on it: what is inside a [`crate::Body`].
pub(crate) struct UploadBody(Arc<Mutex<State>>);

struct State {
    /// `None` once it is over.
    receiver: Option<Receiver>,
    /// The reader waits for data, and will be the first to see what happens.
    reading: bool,
    /// The reader does not want the rest.
    abandoned: bool,
    /// The request task is done.
    released: bool,
    /// What the reader saw go wrong.
    broken: Option<Code>,
    /// The request task.
    watcher: Waker,
}

impl Upload {
    /// Divides a receiver between its watcher and its reader.
    pub(crate) fn divide(receiver: Receiver) -> (Self, UploadBody) {
        let state = Arc::new(Mutex::new(State {
            receiver: Some(receiver),
            reading: false,
            abandoned: false,
            released: false,
            broken: None,
            watcher: Waker::noop().clone(),
        }));
        (Self(state.clone()), UploadBody(state))
    }

    /// Resolves when the caller gave the upload up, or it turned out malformed: with the code to reset the answer with. Never
    /// resolves once the upload is over. Cancel safe.
    pub(crate) async fn broken(&self) -> Code {
        loop {
            let broken = poll_fn(|cx| {
                let mut state = lock(&self.0);
                state.watcher.clone_from(cx.waker());
                match state.broken {
                    Some(code) => Poll::Ready(Some(code)),
                    None if state.receiver.is_some() && !state.abandoned => state.look(cx).map(Some),
                    // Over, or not wanted: what the caller does with the rest of it means nothing.
                    None => Poll::Ready(None),
                }
            });
            match tokio::time::timeout(LOOK, broken).await {
                Ok(Some(code)) => return code,
                Ok(None) => std::future::pending().await,
                Err(_) => {}
            }
        }
    }

    /// The same, as far as the reader has seen it already.
    pub(crate) fn broken_so_far(&self) -> Option<Code> {
        lock(&self.0).broken
    }

    /// The answer is on its way: an upload that nobody wants may be stopped now.
    pub(crate) fn release(&self) {
        let mut state = lock(&self.0);
        state.released = true;
        if state.abandoned {
            state.receiver = None;
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.release();
    }
}

impl State {
    fn look(&mut self, cx: &mut Context<'_>) -> Poll<Code> {
        match &mut self.receiver {
            // The reader's waker must stay the one that quinn wakes.
            Some(receiver) if !self.reading => match ready!(receiver.poll_given_up(cx)) {
                Some(broken) => Poll::Ready(broken.reset_code()),
                None => Poll::Pending,
            },
            _ => Poll::Pending,
        }
    }
}

impl UploadBody {
    pub(crate) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut state = lock(&self.0);
        if let Some(code) = state.broken {
            return Poll::Ready(Some(Err(Broken::Reset(code).into())));
        }
        let Some(receiver) = &mut state.receiver else { return Poll::Ready(None) };
        let polled = receiver.poll_frame(cx);
        state.reading = polled.is_pending();
        let frame = ready!(polled);
        match &frame {
            Some(Ok(_)) => {}
            Some(Err(broken)) => {
                state.broken = Some(broken.reset_code());
                state.receiver = None;
                state.watcher.wake_by_ref();
            }
            None => state.receiver = None,
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        let state = lock(&self.0);
        state.receiver.as_ref().is_none_or(Receiver::has_ended) && state.broken.is_none()
    }
}

impl Drop for UploadBody {
    fn drop(&mut self) {
        let mut state = lock(&self.0);
        state.abandoned = true;
        state.reading = false;
        // Before the answer is out, the caller is not told to stop: it might take that for the answer.
        if state.released {
            state.receiver = None;
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|e| e.into_inner())
}
