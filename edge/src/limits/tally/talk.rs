//! What is said to the other edges, and what they answer.

use std::sync::Arc;

use starling_protocol::{AskCounts, KnownCount, NodeId, TakeCount, TakenCount, TellCounts};
use tokio::time::Instant;

use super::{
    super::{
        counter::Change,
        counts::Counts,
        line::{Line, MAX_TOLD},
        share::{Edges, STORE},
    },
    Tally, lock,
    peers::PATIENCE,
};

/// Callers of whom that is told each time, and, after a change of edges, of those on disk.
const MAX_NEWS: usize = MAX_TOLD / 2;
const MAX_SWEPT: usize = 200;
/// A store has nothing else to do.
const STORE_PACE: f64 = 10.0;

impl Tally {
    /// Says what was counted here, and gives back what nobody uses.
    pub(super) fn tell(self: &Arc<Self>) {
        let (edges, now, mut idle) = (self.edges.load_full(), Instant::now(), Vec::new());
        self.counter.for_each_lease(|key, entry| {
            let lies = entry.share.take_idle(now);
            idle.extend(lies.into_iter().map(|(part, count)| (key.to_owned(), part, count)));
        });
        for (key, part, count) in idle {
            let life = self.counter.life();
            self.counter.with(&key, |entry| (entry.counts.give_back(part, life, count), Change::Counted));
        }
        if edges.is_alone() && lock(&self.silent).is_empty() {
            // Whoever comes later is told then.
            while !self.counter.news(MAX_NEWS).is_empty() {}
            return;
        }
        for (key, counts) in self.counter.news(MAX_NEWS) {
            if !self.tell_of(&edges, &key, &counts) {
                self.counter.untold(&key);
            }
        }
    }

    /// Tells the owner of a counter what is known of it, or, where that is this edge, who would own it next; `false` if there is too much to
    /// be said.
    fn tell_of(self: &Arc<Self>, edges: &Edges, key: &str, counts: &Counts) -> bool {
        let known = KnownCount { key: key.to_owned(), counts: counts.encode().into() };
        edges.owner_beside_own(key).is_some_and(|edge| self.say(&edge, |line| line.tell(known)))
    }

    /// After a change of edges: tells some of what is on disk to whom it concerns now, also of callers who do not call.
    pub(super) fn sweep(self: &Arc<Self>) {
        let edges = self.edges.load_full();
        let Some(from) = lock(&self.swept).clone().filter(|_| !edges.is_alone()) else { return };
        let stored = self.counter.stored_behind(Some(from.as_str()).filter(|key| !key.is_empty()), MAX_SWEPT);
        let is_last = stored.is_empty();
        let told = stored.into_iter().take_while(|(key, counts)| self.tell_of(&edges, key, counts));
        let last = told.last().map_or(from, |(key, _)| key);
        *lock(&self.swept) = (!is_last).then_some(last);
    }

    /// Says something to an edge, with what else there is to say.
    pub(super) fn say<T>(self: &Arc<Self>, edge: &NodeId, say: impl FnOnce(&mut Line) -> T) -> T {
        let mut lines = lock(&self.lines);
        let line = lines
            .entry(*edge)
            .or_insert_with(|| Line::new(Instant::now(), if *edge == STORE { STORE_PACE } else { 1.0 }));
        let said = say(line);
        if !std::mem::replace(&mut line.talking, true) {
            let (tally, edge) = (self.clone(), *edge);
            self.runtime.spawn(async move { tally.talk(edge).await });
        }
        said
    }

    /// Says to an edge what there is to say, until there is nothing more.
    async fn talk(self: Arc<Self>, edge: NodeId) {
        loop {
            let pause = lock(&self.lines).get_mut(&edge).and_then(|line| line.pause(Instant::now()));
            let Some(pause) = pause else { return };
            tokio::time::sleep(pause).await;
            let question = lock(&self.lines).get_mut(&edge).map(Line::question).unwrap_or_default();
            match self.put(&edge, &question.ask).await {
                Ok(told) => {
                    let is_whole = !told.cut;
                    self.hear_answer(question.ask.takes, told);
                    // Of what was left out there is more to be known, and whoever waits for it does not know it.
                    for heard in question.waiting.into_iter().filter(|_| is_whole) {
                        let _ = heard.send(());
                    }
                }
                Err(why) => {
                    self.falls_silent(edge, &why);
                    let unsaid = lock(&self.lines).get_mut(&edge).map(Line::clear).unwrap_or_default();
                    for take in question.ask.takes.iter().chain(&unsaid.takes) {
                        self.counter.with(&take.key, |entry| (entry.share.lease().unheard(), Change::Nothing));
                    }
                    for known in question.ask.knows.iter().chain(&unsaid.knows) {
                        self.counter.untold(&known.key);
                    }
                    // Those who wait are told by its end.
                    drop(question.waiting);
                }
            }
        }
    }

    /// Asks an edge; once more, where its connection was of no use.
    pub(super) async fn put(&self, edge: &NodeId, ask: &AskCounts) -> Result<TellCounts, String> {
        let until = Instant::now() + PATIENCE;
        let mut answer = Err(String::new());
        for _ in 0..2 {
            answer = match tokio::time::timeout_at(until, self.peers.ask(edge, ask)).await {
                Ok(answer) => answer,
                Err(_) => return Err("no answer in time".into()),
            };
            if answer.is_ok() {
                break;
            }
        }
        answer.and_then(|told| match told.taken.len() == ask.takes.len() {
            true => Ok(told),
            false => Err("an answer to something else".into()),
        })
    }

    fn hear_answer(&self, takes: Vec<TakeCount>, told: TellCounts) {
        let now = Instant::now();
        for (take, TakenCount { taken, counts }) in takes.iter().zip(told.taken) {
            let counts = Counts::decode(&counts).unwrap_or_default();
            self.counter.with(&take.key, |entry| {
                entry.share.lease().hear(take, taken.min(take.most), now);
                let change = if entry.counts.merge(&counts) { Change::Heard } else { Change::Nothing };
                if entry.counts != counts {
                    entry.share.tell_again();
                }
                ((), change)
            });
        }
        for KnownCount { key, counts } in told.found {
            if let Some(counts) = Counts::decode(&counts) {
                self.counter.merge(&key, &counts);
            }
        }
    }
}
