//! When an answer is late, and whose fault that is.

use std::time::{Duration, Instant};

use crate::Source;

/// Longest limit that is counted: beyond it, clocks overflow.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);
/// An upload prolongs the wait for the answer as far as it moves at this rate, in bytes a second. Slower ones do not pass for
/// progress: a byte now and then would hold a place for ever.
const SLOWEST_UPLOAD: f64 = 512.0;

/// When the head of an answer is due.
#[derive(Clone)]
pub struct Due {
    started: Instant,
    limit: Option<Duration>,
    idle: Option<Duration>,
    until: Option<Instant>,
    source: Option<Source>,
}

/// Why there is no answer in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Late {
    /// Nobody has answered.
    Answer,
    /// The caller has not sent the rest of its request.
    Upload,
}

impl Due {
    /// Due `limit` after now, or after the end of the upload, if there is one; and by `until`, whatever happens.
    pub fn new(limit: Option<Duration>, until: Option<Instant>, source: Option<&Source>) -> Self {
        let limit = limit.map(|limit| limit.min(LONGEST));
        Self { started: Instant::now(), limit, idle: None, until, source: source.cloned() }
    }

    /// Where there is no other limit: due so long after the upload has moved last.
    #[must_use]
    pub fn or_idle(mut self, idle: Option<Duration>) -> Self {
        self.idle = idle.map(|idle| idle.min(LONGEST)).filter(|_| self.limit.is_none());
        self
    }

    /// When, as things stand. Never, if there is no limit.
    pub fn at(&self) -> Option<Instant> {
        let idle = self.idle.map(|idle| {
            let moved = self.source.as_ref().map(|source| source.progress().moved);
            moved.map_or(self.started, |moved| moved.max(self.started)) + idle
        });
        [self.answer_at(), idle].into_iter().flatten().min()
    }

    /// The same without regard to silence.
    fn answer_at(&self) -> Option<Instant> {
        let due = self.limit.map(|limit| {
            let start = self.started + limit;
            let Some(upload) = self.source.as_ref().map(Source::progress) else { return start };
            let earned = Duration::from_secs_f64(upload.bytes as f64 / SLOWEST_UPLOAD).min(LONGEST);
            let moved = upload.moved + limit;
            if upload.ended { moved.max(start) } else { moved.min(start + earned).max(start) }
        });
        [due, self.until].into_iter().flatten().min()
    }

    /// How long whoever is asked has for an answer, as it is to be told; `None` if there is no limit but to silence.
    pub fn left_for_answer(&self) -> Option<Duration> {
        self.answer_at().map(|due| due.saturating_duration_since(Instant::now()))
    }

    /// How long there is still to wait; `None` if there is no limit, nothing if it has passed.
    pub fn left(&self) -> Option<Duration> {
        self.at().map(|due| due.saturating_duration_since(Instant::now()))
    }

    /// Whether it has passed.
    pub fn is_over(&self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }

    /// Resolves when it has passed. Cancel safe.
    pub async fn passed(&self) -> Late {
        loop {
            match self.at() {
                None => std::future::pending().await,
                Some(due) if due <= Instant::now() => break,
                Some(due) => tokio::time::sleep_until(due.into()).await,
            }
        }
        let starved = self.source.as_ref().map(Source::progress).is_some_and(|upload| !upload.ended && upload.starved);
        if starved { Late::Upload } else { Late::Answer }
    }

    /// The limit, to be told.
    pub fn limit(&self) -> Duration {
        let whole = self.until.map(|until| until.saturating_duration_since(self.started));
        [self.limit, self.idle, whole].into_iter().flatten().min().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::Pin, task::Poll};

    use http_body::Body as _;

    use super::*;
    use crate::Body;

    const LIMIT: Duration = Duration::from_secs(15);

    fn seconds(due: &Due) -> f64 {
        (due.at().unwrap() - due.started).as_secs_f64()
    }

    #[tokio::test]
    async fn an_upload_earns_time_by_moving() {
        let source = Source::new(Body::full(vec![0u8; 51_200]).with_length(Some(100_000)));
        let due = Due::new(Some(LIMIT), None, Some(&source));
        assert!((seconds(&due) - 15.0).abs() < 0.1, "nothing has moved");
        let mut attempt = source.attempt();
        poll_fn(|cx| Pin::new(&mut attempt).poll_frame(cx).map(drop)).await;
        assert!((seconds(&due) - 15.0).abs() < 0.1, "from the last movement on, not more than what it has earned");
        source.move_for_test(Duration::from_secs(60));
        assert!((seconds(&due) - 75.0).abs() < 0.1, "{}", seconds(&due));
        source.move_for_test(Duration::from_secs(600));
        assert!((seconds(&due) - 115.0).abs() < 0.1, "as much as 100 s: {}", seconds(&due));
    }

    #[tokio::test]
    async fn the_answer_is_waited_for_from_the_end_of_the_upload() {
        let source = Source::new(Body::full("x"));
        let due = Due::new(Some(LIMIT), None, Some(&source));
        let mut attempt = source.attempt();
        for _ in 0..2 {
            poll_fn(|cx| match Pin::new(&mut attempt).poll_frame(cx) {
                Poll::Ready(_) => Poll::Ready(()),
                Poll::Pending => Poll::Pending,
            })
            .await;
        }
        source.move_for_test(Duration::from_secs(3600));
        assert!((seconds(&due) - 3615.0).abs() < 0.1, "{}", seconds(&due));
        let until = Due::new(Some(LIMIT), Some(Instant::now() + Duration::from_secs(1)), Some(&source));
        assert!(seconds(&until) < 1.1, "the whole has a limit of its own");
    }

    #[tokio::test]
    async fn no_limit_is_none() {
        assert_eq!(Due::new(None, None, None).left(), None);
        assert!(Due::new(None, None, None).or_idle(Some(LIMIT)).left().is_some_and(|left| left > LIMIT / 2));
        let due = Due::new(Some(LIMIT * 2), None, None).or_idle(Some(LIMIT));
        assert!(seconds(&due) > 29.0, "an answer has the time that it is given");
        assert!(Due::new(Some(Duration::ZERO), None, None).is_over());
        assert!(!Due::new(Some(Duration::MAX), None, None).is_over());
    }
}
