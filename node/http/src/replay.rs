//! A request body that can be sent again, as long as little of it was read.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

use crate::body::{Body, BodyError};

/// How much of a body is kept for another attempt, in bytes.
const KEEP_BYTES: usize = 64 << 10;

/// What a piece of it costs beside its bytes.
const CHUNK_BYTES: usize = 64;
/// Pieces below this size are copied.
const COPY_BYTES: usize = 1024;

/// The body of a call, over all of its attempts.
#[derive(Clone)]
pub struct Source(Arc<Mutex<Progress>>);

struct Progress {
    rest: Body,
    /// What was read so far; `None` once it was too much to keep.
    kept: Option<Vec<Bytes>>,
    kept_bytes: usize,
    /// What is read from now on is not kept.
    sent_once: bool,
    ended: bool,
    broken: bool,
    /// When the body last moved, and how many bytes it had then.
    moved: Instant,
    bytes: u64,
    /// Somebody waits for more of it.
    starved: bool,
    /// Of the attempt that may read it: a former one, which perhaps still runs somewhere, must not take the bytes away.
    attempt: u32,
}

/// How far an upload has come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UploadProgress {
    /// When it last moved.
    pub(crate) moved: Instant,
    pub(crate) bytes: u64,
    pub(crate) ended: bool,
    /// The caller is waited for.
    pub(crate) starved: bool,
}

impl Source {
    /// Takes over a body that may be sent more than once.
    pub fn new(body: Body) -> Self {
        Self(Arc::new(Mutex::new(Progress {
            rest: body,
            kept: Some(Vec::new()),
            kept_bytes: 0,
            sent_once: false,
            ended: false,
            broken: false,
            moved: Instant::now(),
            bytes: 0,
            starved: false,
            attempt: 0,
        })))
    }

    /// Takes over a body that is sent once.
    pub fn once(body: Body) -> Self {
        let source = Self::new(body);
        source.keep_no_more();
        source
    }

    /// There will be no other attempt, so that nothing has to be kept for one.
    pub fn keep_no_more(&self) {
        self.lock().sent_once = true;
    }

    /// The body for one attempt, from its start. Former attempts read no more.
    pub fn attempt(&self) -> Body {
        let (hint, attempt) = {
            let mut shared = self.lock();
            shared.attempt += 1;
            (if shared.kept_bytes == 0 { shared.rest.size_hint().exact() } else { None }, shared.attempt)
        };
        Body::replay(Replay { source: self.clone(), attempt, next: 0, hint })
    }

    /// Whether another attempt would see the whole body.
    pub fn can_replay(&self) -> bool {
        let shared = self.lock();
        shared.kept.is_some() && !shared.broken
    }

    /// Whether the caller broke off: then nothing about the attempt is anybody else's fault.
    pub fn is_broken(&self) -> bool {
        self.lock().broken
    }

    /// How far it has come.
    pub(crate) fn progress(&self) -> UploadProgress {
        let shared = self.lock();
        let ended = shared.ended || shared.rest.is_end_stream();
        UploadProgress { moved: shared.moved, bytes: shared.bytes, ended, starved: shared.starved }
    }

    /// Whether all of it was read.
    pub fn has_ended(&self) -> bool {
        self.progress().ended
    }

    /// When the body last moved, if it ever did: its end, once that has come.
    pub fn moved(&self) -> Instant {
        self.lock().moved
    }

    #[cfg(test)]
    pub(crate) fn move_for_test(&self, later: std::time::Duration) {
        self.lock().moved += later;
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One attempt's view of the body: what was kept, then the rest.
pub(crate) struct Replay {
    source: Source,
    attempt: u32,
    next: usize,
    hint: Option<u64>,
}

impl Replay {
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut shared = self.source.lock();
        if shared.attempt != self.attempt {
            return Poll::Ready(Some(Err(BodyError::Broken("another attempt has begun".into()))));
        }
        if let Some(chunk) = shared.kept.as_ref().and_then(|kept| kept.get(self.next)) {
            self.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        if shared.sent_once {
            shared.kept = None;
        }
        if shared.broken {
            return Poll::Ready(Some(Err(BodyError::Broken("the request's body broke off".into()))));
        }
        if shared.ended {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut shared.rest).poll_frame(cx);
        shared.starved = polled.is_pending();
        let frame = ready!(polled);
        shared.moved = Instant::now();
        match &frame {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(data) => {
                    shared.bytes += data.len() as u64;
                    shared.kept_bytes += data.len() + CHUNK_BYTES;
                    if shared.kept_bytes > KEEP_BYTES {
                        shared.kept = None;
                    } else if let Some(kept) = &mut shared.kept {
                        // A small piece must not keep the packet alive that it came in.
                        kept.push(if data.len() < COPY_BYTES { Bytes::copy_from_slice(data) } else { data.clone() });
                        self.next += 1;
                    }
                }
                // Trailers are not kept, so a body with trailers is sent once.
                None => shared.kept = None,
            },
            Some(Err(_)) => {
                shared.broken = true;
                shared.ended = true;
            }
            None => shared.ended = true,
        }
        Poll::Ready(frame)
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        let shared = self.source.lock();
        let kept = shared.kept.as_ref().map_or(0, Vec::len);
        self.next >= kept && (shared.ended && !shared.broken || shared.rest.is_end_stream())
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        self.hint.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        // An attempt that ends while it waits for data leaves nobody waiting.
        let mut shared = self.source.lock();
        if shared.attempt == self.attempt {
            shared.starved = false;
            shared.rest.pause();
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_short_body_is_sent_again_whole() {
        let source = Source::new(Body::full("hello"));
        assert_eq!(source.attempt().collect().await.unwrap().to_bytes(), "hello");
        assert!(source.can_replay());
        assert_eq!(source.attempt().collect().await.unwrap().to_bytes(), "hello");
    }

    #[tokio::test]
    async fn a_long_body_is_sent_once() {
        let source = Source::new(Body::full(vec![0u8; KEEP_BYTES + 1]));
        assert!(source.can_replay());
        source.attempt().collect().await.unwrap();
        assert!(!source.can_replay());
    }

    #[tokio::test]
    async fn a_broken_body_is_the_callers_fault() {
        let source = Source::new(Body::full("hello").with_length(Some(9)));
        assert!(source.attempt().collect().await.is_err());
        assert!(source.is_broken() && !source.can_replay());
    }
}
