//! A body, and what is kept for as long as it moves.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

use crate::{Body, BodyError, Source};

/// What a body keeps alive: a count, a connection, an entry of a log. Dropped when the body has ended or is dropped itself.
pub trait Guard: Send + Unpin + 'static {
    /// So many bytes of the body went on.
    fn passed(&mut self, _bytes: usize) {}

    /// The body has ended whole. Not called when it broke off or was dropped before its end.
    fn ended(&mut self) {}
}

impl Guard for () {}

impl<G: Guard> Guard for Option<G> {
    fn passed(&mut self, bytes: usize) {
        if let Some(guard) = self {
            guard.passed(bytes);
        }
    }

    fn ended(&mut self) {
        if let Some(guard) = self {
            guard.ended();
        }
    }
}

/// A body with its guard.
#[derive(Debug)]
pub struct Guarded<G: Guard> {
    body: Body,
    guard: Option<G>,
}

impl<G: Guard> Guarded<G> {
    /// Keeps `guard` until the body has ended or is dropped.
    pub fn new(body: Body, guard: G) -> Self {
        Self { body, guard: Some(guard) }
    }

    /// Takes body and guard apart; the guard is `None` if there was none, or the body has ended.
    pub fn into_parts(mut self) -> (Body, Option<G>) {
        (std::mem::replace(&mut self.body, Body::empty()), self.guard.take())
    }

    /// Exchanges the guard for one that keeps the former one, too.
    pub fn map_guard<T: Guard>(self, change: impl FnOnce(Option<G>) -> T) -> Guarded<T> {
        let (body, guard) = self.into_parts();
        Guarded::new(body, change(guard))
    }

    /// Exchanges the body; the guard stays, and sees the new one.
    pub fn map_body(mut self, change: impl FnOnce(Body) -> Body) -> Self {
        self.body = change(std::mem::replace(&mut self.body, Body::empty()));
        self
    }

    /// Holds the body to a length, as [`Body::with_length`] does.
    pub fn with_length(self, promised: Option<u64>) -> Self {
        self.map_body(|body| body.with_length(promised))
    }

    /// Gives the body limits of time, as [`Body::with_pace`] does.
    pub fn with_pace(self, idle: Option<Duration>, until: Option<Instant>, upload: Option<&Source>) -> Self {
        self.map_body(|body| body.with_pace(idle, until, upload))
    }
}

/// A body that keeps nothing.
impl<G: Guard> From<Body> for Guarded<G> {
    fn from(body: Body) -> Self {
        Self { body, guard: None }
    }
}

impl<G: Guard> http_body::Body for Guarded<G> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) if !frame.is_trailers() => {
                if let (Some(guard), Some(data)) = (&mut self.guard, frame.data_ref()) {
                    guard.passed(data.len());
                }
            }
            Some(Err(_)) => self.guard = None,
            Some(Ok(_)) | None if self.body.broke_off() => self.guard = None,
            // Nothing comes behind trailers, and not everybody asks.
            Some(Ok(_)) | None => {
                if let Some(mut guard) = self.guard.take() {
                    guard.ended();
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<G: Guard> Drop for Guarded<G> {
    fn drop(&mut self) {
        // Whoever knows the length need not ask for the end.
        if let Some(guard) = &mut self.guard
            && (self.body.is_end_stream() || self.body.size_hint().exact() == Some(0))
        {
            guard.ended();
        }
    }
}
