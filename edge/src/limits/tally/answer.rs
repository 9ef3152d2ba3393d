//! What other edges are told, and lent.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use bytes::Bytes;
use starling_node::{Answering, Colleague};
use starling_protocol::{AskCounts, Framed, KnownCount, NodeId, TakeCount, TakenCount, TellCounts, decode, frame};

use super::{
    super::{counter::Change, counts::Counts, quota::Span, share::STORE},
    Tally,
};

/// Things in a question of another edge, and bytes in an answer.
pub(super) const MAX_ASKED: usize = 1024;
const MAX_ANSWER_BYTES: usize = 512 << 10;
/// Most that a counter can be asked for.
pub(super) const MAX_COUNT: u64 = 1 << 52;

impl Colleague for Answerer {
    fn answer<'a>(&'a self, from: NodeId, kind: u64, body: &'a Bytes) -> Answering<'a> {
        Box::pin(async move {
            if kind != AskCounts::KIND {
                return None;
            }
            let told = self.0.clone().hear(from, decode(body).ok()?).await?;
            Some(frame(&told))
        })
    }
}

/// Answers other edges.
pub(crate) struct Answerer(pub(crate) Arc<Tally>);

impl Tally {
    /// What another edge is told; `None` if it does not ask well, or if this process does not know yet what it is to say.
    pub(super) async fn hear(self: Arc<Self>, from: NodeId, ask: AskCounts) -> Option<TellCounts> {
        let AskCounts { takes, knows, finds } = ask;
        if [takes.len(), knows.len(), finds.len()].iter().any(|count| *count > MAX_ASKED) {
            return None;
        }
        self.counter.begin(false);
        if !self.in_charge.load(Relaxed) || !self.counter.is_open() {
            return None;
        }
        // What is not in memory is read from the disk.
        let (tally, keys) = (self.clone(), takes.iter().map(|take| take.key.clone()).collect::<Vec<_>>());
        let unsettled = tokio::task::spawn_blocking(move || {
            let edges = tally.edges.load();
            for KnownCount { key, counts } in knows {
                let counts = Counts::decode(&counts).unwrap_or_default();
                tally.counter.with(&key, |entry| {
                    entry.share.hope();
                    // Whoever said it may not reach the owner.
                    let is_of_third = entry.share.is_of_another(&key, &edges).is_some_and(|owner| owner != from);
                    let change = match entry.counts.merge(&counts) {
                        true if is_of_third => Change::PassedOn,
                        true => Change::Heard,
                        false => Change::Nothing,
                    };
                    ((), change)
                });
            }
            let is_unsettled =
                |key: &String| tally.counter.with(key, |entry| (!entry.share.is_settled(&edges), Change::Nothing));
            keys.into_iter().filter(is_unsettled).collect::<Vec<String>>()
        });
        let unsettled = unsettled.await.ok()?;
        if !unsettled.is_empty() {
            self.settle(&unsettled).await;
        }
        let edges = self.edges.load_full();
        if edges.has_store() {
            // Whoever asks does not reach the store, and is not to be lent what was used up there.
            let found = takes.iter().map(|take| self.say(&STORE, |line| line.find(&take.key))).collect();
            self.settled(&[], &edges, found).await;
        }
        let told = tokio::task::spawn_blocking(move || {
            let (mut told, mut bytes) = (TellCounts::default(), 0);
            for take in &takes {
                let (taken, counts) = self.lend(take);
                bytes += counts.len();
                let counts = if bytes > MAX_ANSWER_BYTES { Bytes::new() } else { counts.into() };
                told.taken.push(TakenCount { taken, counts });
            }
            for key in finds {
                let counts = self.counter.with(&key, |entry| (entry.counts.clone(), Change::Nothing)).encode();
                bytes += key.len() + counts.len();
                told.cut |= bytes > MAX_ANSWER_BYTES;
                if !counts.is_empty() && !told.cut {
                    told.found.push(KnownCount { key, counts: counts.into() });
                }
            }
            told
        });
        told.await.ok()
    }

    /// Gives a lease, and tells what is known of the counter.
    fn lend(&self, take: &TakeCount) -> (u64, Vec<u8>) {
        let span = Span { part: take.part, since: take.since.min(take.part), part_seconds: 1 };
        self.counter.with(&take.key, |entry| {
            let free = take.limit.min(MAX_COUNT).saturating_sub(entry.counts.sum(span));
            let taken = if free < take.least { 0 } else { free.min(take.most) };
            if taken > 0 {
                entry.counts.add(take.part, self.counter.life(), taken);
            }
            let change = if taken > 0 { Change::Counted } else { Change::Nothing };
            ((taken, entry.counts.encode()), change)
        })
    }
}
