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
    stream::{Broken, Receiver, Sight},
};
use crate::BodyError;

/// How often an upload with data that nobody reads is looked at: the data hides what comes behind it.
const LOOK: Duration = Duration::from_millis(50);

/// The request task's hold on the upload. Dropped without [`Upload::answered`], it breaks the upload off for its reader, too:
/// a part of a request whose call is over must not look like all of it.
pub(crate) struct Upload(Arc<Mutex<State>>);

/// The reader's hold on it: what is inside a [`crate::Body`].
pub(crate) struct UploadBody(Arc<Mutex<State>>);

struct State {
    /// `None` once it is over.
    receiver: Option<Receiver>,
    /// What went wrong, whoever saw it.
    broken: Option<Code>,
    /// Somebody has asked for data.
    wanted: bool,
    /// The reader waits for data, and will be the first to see what happens.
    reading: bool,
    /// The reader does not want the rest.
    abandoned: bool,
    /// The answer is on its way, or out.
    released: bool,
    answered: bool,
    /// The request task.
    watcher: Waker,
    reader: Waker,
}

enum Watched {
    Broken(Code),
    /// Well over, or not wanted: what the caller does with the rest of it means nothing.
    Over,
    /// Something may be hidden behind data.
    Hidden,
}

impl Upload {
    /// Divides a receiver between its watcher and its reader.
    pub(crate) fn divide(receiver: Receiver) -> (Self, UploadBody) {
        let state = Arc::new(Mutex::new(State {
            receiver: Some(receiver),
            broken: None,
            wanted: false,
            reading: false,
            abandoned: false,
            released: false,
            answered: false,
            watcher: Waker::noop().clone(),
            reader: Waker::noop().clone(),
        }));
        (Self(state.clone()), UploadBody(state))
    }

    /// Resolves when the caller gave the upload up, or it turned out malformed: with the code to reset the answer with. Never
    /// resolves once the upload is over. Cancel safe.
    pub(crate) async fn broken(&self) -> Code {
        match self.over().await {
            Some(code) => code,
            None => std::future::pending().await,
        }
    }

    /// Resolves when nothing more comes of the upload, with a code if it broke off. Cancel safe.
    async fn over(&self) -> Option<Code> {
        loop {
            match poll_fn(|cx| lock(&self.0).watch(cx)).await {
                Watched::Broken(code) => return Some(code),
                Watched::Over => return None,
                Watched::Hidden => {
                    // Until the reader has moved, or a moment has passed.
                    let moved = poll_fn(|cx| lock(&self.0).moved(cx));
                    let _ = tokio::time::timeout(LOOK, moved).await;
                }
            }
        }
    }

    /// The same, as far as it is known.
    pub(crate) fn broken_so_far(&self) -> Option<Code> {
        lock(&self.0).broken
    }

    /// Resolves when somebody asks for the body. Cancel safe.
    pub(crate) async fn wanted(&self) {
        poll_fn(|cx| {
            let mut state = lock(&self.0);
            state.watcher.clone_from(cx.waker());
            if state.wanted { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// The answer is on its way: an upload that nobody wants may be stopped now. Before, its caller might take that for the
    /// answer.
    pub(crate) fn release(&self) {
        let mut state = lock(&self.0);
        state.released = true;
        if state.abandoned {
            state.receiver = None;
        }
    }

    /// The whole answer is out. Resolves when the upload is over, too.
    pub(crate) async fn ended(self) {
        lock(&self.0).answered = true;
        self.over().await;
    }

    /// The whole answer is out. Whoever reads the upload may go on doing so, and it is watched as long as that.
    pub(crate) fn answered(self) {
        let is_over = {
            let mut state = lock(&self.0);
            state.answered = true;
            state.receiver.is_none()
        };
        if !is_over {
            tokio::spawn(async move { self.over().await });
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let mut state = lock(&self.0);
        if !state.answered {
            state.break_off(Code::H3_REQUEST_CANCELLED);
        }
    }
}

impl State {
    fn watch(&mut self, cx: &mut Context<'_>) -> Poll<Watched> {
        self.watcher.clone_from(cx.waker());
        if let Some(code) = self.broken {
            return Poll::Ready(Watched::Broken(code));
        }
        match &mut self.receiver {
            // The reader's waker must stay the one that quinn wakes.
            Some(_) if self.reading && !self.abandoned => Poll::Pending,
            Some(receiver) if !self.abandoned => match receiver.look(cx) {
                // Behind an end of the stream the reader may still find that the message has none.
                Sight::Nothing | Sight::Over => Poll::Pending,
                Sight::Data => Poll::Ready(Watched::Hidden),
                Sight::Broken(broken) => {
                    self.break_off(broken.reset_code());
                    Poll::Ready(Watched::Broken(broken.reset_code()))
                }
            },
            _ => Poll::Ready(Watched::Over),
        }
    }

    fn moved(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.watcher.clone_from(cx.waker());
        let still = self.broken.is_none() && self.receiver.is_some() && !self.reading && !self.abandoned;
        if still { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Makes what was not read yet an error for the reader.
    fn break_off(&mut self, code: Code) {
        if let Some(receiver) = self.receiver.take() {
            if !receiver.has_ended() {
                self.broken.get_or_insert(code);
            }
            receiver.stop(code);
            self.reader.wake_by_ref();
        }
    }
}

impl UploadBody {
    pub(crate) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut state = lock(&self.0);
        if !state.wanted {
            state.wanted = true;
            state.watcher.wake_by_ref();
        }
        if let Some(code) = state.broken {
            return Poll::Ready(Some(Err(Broken::Reset(code).into())));
        }
        let Some(receiver) = &mut state.receiver else { return Poll::Ready(None) };
        let polled = receiver.poll_frame(cx);
        if polled.is_pending() {
            state.reader.clone_from(cx.waker());
        } else if state.reading {
            // From now on it is the watcher who has to look.
            state.watcher.wake_by_ref();
        }
        state.reading = polled.is_pending();
        let frame = ready!(polled);
        match &frame {
            Some(Ok(_)) => {}
            Some(Err(broken)) => {
                state.broken = Some(broken.reset_code());
                state.receiver = None;
                state.watcher.wake_by_ref();
            }
            None => {
                state.receiver = None;
                state.watcher.wake_by_ref();
            }
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
    }

    /// Nobody takes it: whoever sends it is told, and gets no answer that was made of a part of it.
    pub(crate) fn give_up(&self) {
        let mut state = lock(&self.0);
        state.break_off(Code::H3_EXCESSIVE_LOAD);
        state.watcher.wake_by_ref();
    }

    /// Whoever read does not read any more, for now.
    pub(crate) fn pause(&self) {
        let mut state = lock(&self.0);
        if std::mem::take(&mut state.reading) {
            state.watcher.wake_by_ref();
        }
    }

    pub(crate) fn is_all_here(&self) -> bool {
        lock(&self.0).receiver.as_ref().is_none_or(Receiver::is_all_here)
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
        if state.released {
            state.receiver = None;
        }
        state.watcher.wake_by_ref();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|e| e.into_inner())
}
