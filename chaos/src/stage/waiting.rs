//! Packets that are on their way: those that are due later, in order, and those that are held until somebody lets go.

use std::{cmp::Reverse, collections::BinaryHeap, sync::Mutex, time::Instant};

use tokio::sync::Notify;

/// Packets held at most; those beyond are lost, as in any queue.
const MOST_HELD: usize = 50_000;

struct Due<P> {
    at: Instant,
    seq: u64,
    packet: P,
}

impl<P> PartialEq for Due<P> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl<P> Eq for Due<P> {}
impl<P> PartialOrd for Due<P> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<P> Ord for Due<P> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

struct Queues<P> {
    seq: u64,
    due: BinaryHeap<Reverse<Due<P>>>,
    held: Vec<P>,
}

/// Both queues.
pub(super) struct Waiting<P> {
    queues: Mutex<Queues<P>>,
    changed: Notify,
}

impl<P> Waiting<P> {
    pub(super) fn new() -> Self {
        let queues = Queues { seq: 0, due: BinaryHeap::new(), held: Vec::new() };
        Self { queues: Mutex::new(queues), changed: Notify::new() }
    }

    fn queues(&self) -> std::sync::MutexGuard<'_, Queues<P>> {
        self.queues.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn push(&self, at: Instant, packet: P) {
        let mut queues = self.queues();
        queues.seq += 1;
        let seq = queues.seq;
        let is_next = queues.due.peek().is_none_or(|Reverse(next)| at < next.at);
        queues.due.push(Reverse(Due { at, seq, packet }));
        if is_next {
            self.changed.notify_one();
        }
    }

    pub(super) fn hold(&self, packet: P) {
        let mut queues = self.queues();
        if queues.held.len() < MOST_HELD {
            queues.held.push(packet);
        }
    }

    /// What is held is due now.
    pub(super) fn release(&self) {
        let held = std::mem::take(&mut self.queues().held);
        let now = Instant::now();
        for packet in held {
            self.push(now, packet);
        }
    }

    /// The next packet, when it is due.
    pub(super) async fn next(&self) -> P {
        loop {
            let next = {
                let mut queues = self.queues();
                match queues.due.peek() {
                    Some(Reverse(next)) if next.at <= Instant::now() => {
                        if let Some(Reverse(due)) = queues.due.pop() {
                            return due.packet;
                        }
                        None
                    }
                    next => next.map(|Reverse(next)| next.at),
                }
            };
            match next {
                Some(at) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(at.into()) => {}
                        () = self.changed.notified() => {}
                    }
                }
                None => self.changed.notified().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn packets_come_when_due_in_order_and_held_ones_when_released() {
        let waiting = Waiting::new();
        let now = Instant::now();
        waiting.push(now + Duration::from_millis(20), 3);
        waiting.push(now, 1);
        waiting.push(now, 2);
        waiting.hold(4);
        for expected in [1, 2, 3] {
            assert_eq!(waiting.next().await, expected);
        }
        assert!(tokio::time::timeout(Duration::from_millis(30), waiting.next()).await.is_err());
        waiting.release();
        assert_eq!(waiting.next().await, 4);
    }
}
