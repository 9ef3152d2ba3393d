//! The quotas of callers, counted over all edges without a store: each counter is owned by one edge, which the others find without
//! asking ([`crate::rendezvous`]); they get leases of it. What an edge has counted, it also tells another one, so that nothing more
//! than a second is lost with it.

mod answer;
mod peers;
mod talk;
#[cfg(test)]
pub(super) mod tests;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use starling_protocol::{KnownCount, NodeId, TakeCount};
use tokio::{runtime::Handle, time::Instant};

pub(crate) use self::{
    answer::Answerer,
    peers::{Members, PATIENCE, Peers},
};
use super::{
    counter::{Change, Counter, Entry},
    counts::Counts,
    line::{Heard, Line},
    quota::{Clock, Quota, Span},
    share::{Edges, Held, Role},
};

/// How often the edges are looked at that are alive.
const LOOK: Duration = Duration::from_millis(200);
/// How often other edges are told what was counted, and given back what lies.
const TELL: Duration = Duration::from_secs(1);
/// How often the store is asked whether it is there, also when nobody calls.
const GREET: Duration = Duration::from_secs(2);
/// How long calls wait at the start of the process until the mesh has been heard.
const START: Duration = Duration::from_secs(3);
/// How long it is waited for what others have counted: whoever asks for a lease waits, too.
const SETTLE: Duration = Duration::from_millis(300);
/// How long a call may take to get what it needs, of whoever owns the counter by then.
const DEADLINE: Duration = Duration::from_millis(1200);

/// How it stands with a caller's quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) allowed: bool,
    /// What all edges have let through, and hold in leases.
    pub(crate) used: u64,
    /// Seconds until there is room again, or more of it.
    pub(crate) reset: u64,
    /// The part of time for which a call is counted.
    part: u64,
    /// Whether nobody knows, and it is not to pass then.
    pub(crate) unknown: bool,
}

/// What all edges have counted.
pub(crate) struct Tally {
    counter: Arc<Counter>,
    peers: Arc<dyn Peers>,
    /// Where edges are talked to.
    runtime: Handle,
    edges: ArcSwap<Edges>,
    lines: Mutex<HashMap<NodeId, Line>>,
    /// Edges that are alive and do not answer: until when they are left out, and for how long next time.
    silent: Mutex<HashMap<NodeId, (Instant, Duration)>>,
    begun: Instant,
    /// Whether the mesh has been heard, or long enough listened to.
    heard: AtomicBool,
    /// Whether this process has the edge's place, and answers others.
    in_charge: AtomicBool,
    /// Up to where the counts on disk were told to whom they concern since the edges changed; `None` when all were.
    swept: Mutex<Option<String>>,
}

/// What a call needs before it may pass or not.
enum Step {
    Done(Left),
    /// To know what others have counted.
    Settle,
    /// More of the counter's owner, who may have to be told something first.
    Lease(NodeId, TakeCount, Option<KnownCount>),
}

impl Tally {
    /// Shares what the counter knows with the others. Needs a runtime.
    pub(crate) fn new(counter: Arc<Counter>, peers: Arc<dyn Peers>) -> Arc<Self> {
        let tally = Arc::new(Self {
            counter,
            edges: ArcSwap::from_pointee(Edges::only(peers.own())),
            peers,
            runtime: Handle::current(),
            lines: Mutex::default(),
            silent: Mutex::default(),
            begun: Instant::now(),
            heard: AtomicBool::new(false),
            in_charge: AtomicBool::new(false),
            swept: Mutex::default(),
        });
        tally.look();
        tally
    }

    /// Keeps in touch with the others, for as long as it is polled.
    pub(crate) async fn run(self: Arc<Self>) {
        self.in_charge.store(true, Relaxed);
        let (mut told, mut greeted, mut known) = (Instant::now(), None, 0);
        loop {
            self.look();
            let version = self.edges.load().version();
            let changed = std::mem::replace(&mut known, version) != version;
            if changed {
                // Who has come, or has come to a counter, is to know what was counted here meanwhile.
                self.counter.tell_all();
                *lock(&self.swept) = Some(String::new());
            }
            if greeted.is_none_or(|greeted: Instant| greeted.elapsed() >= GREET) {
                greeted = Some(Instant::now());
                self.greet_the_store();
            }
            if changed || told.elapsed() >= TELL {
                told = Instant::now();
                self.tell();
            }
            if lock(&self.swept).is_some() {
                let this = self.clone();
                let _ = tokio::task::spawn_blocking(move || this.sweep()).await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Takes a call of that cost from a caller's quota, unless there is not enough: a refused call costs nothing. Waits for another
    /// edge only where that has to give a lease, or is to say what it has counted; a second at most. Cancel safe: what is then taken
    /// of another edge is there for the next call.
    pub(crate) async fn take(self: &Arc<Self>, key: &str, quota: &Quota, clock: &Clock, cost: u64, now: u64) -> Left {
        self.hear_the_mesh().await;
        let (span, until) = (clock.span(now), Instant::now() + DEADLINE);
        while Instant::now() < until && !self.waits_for_the_store() {
            let heard = match self.step(key, quota, span, cost, now) {
                Step::Done(left) => return left,
                Step::Settle => match self.settle(&[key.to_owned()]).await {
                    true => continue,
                    false => break,
                },
                Step::Lease(owner, take, know) => self.say(&owner, |line| line.take(take, know)),
            };
            // Where it is not heard, the owner is another one; or there is too much to be said.
            if let Ok(Err(_)) | Err(_) = tokio::time::timeout_at(until, heard).await
                && self.is_owned_as_before(key)
            {
                break;
            }
        }
        if self.peers.needs_the_store() {
            return self.counter.with(key, |entry| {
                let left = left(&entry.counts, 0, span, now, false);
                (Left { unknown: true, ..left }, Change::Nothing)
            });
        }
        // Nobody says anything in time: by what is known here.
        self.counter.with(key, |entry| self.count(entry, quota.count.get(), span, cost, now))
    }

    /// Takes a call from what is left by what is known here.
    fn count(&self, entry: &mut Entry, limit: u64, span: Span, cost: u64, now: u64) -> (Left, Change) {
        let allowed = entry.counts.sum(span).saturating_add(cost) <= limit;
        if allowed {
            entry.counts.add(span.part, self.counter.life(), cost);
        }
        (left(&entry.counts, 0, span, now, allowed), if allowed { Change::Counted } else { Change::Nothing })
    }

    /// Waits until the others are known, as long as the process is young.
    async fn hear_the_mesh(&self) {
        while !self.heard.load(Relaxed) {
            if self.peers.is_settled() || self.begun.elapsed() >= START {
                self.heard.store(true, Relaxed);
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether nothing may be counted until the store answers again.
    fn waits_for_the_store(&self) -> bool {
        self.peers.needs_the_store() && !self.edges.load().has_store()
    }

    /// Whether a counter's owner is the same as when it was looked for last.
    fn is_owned_as_before(&self, key: &str) -> bool {
        let edges = self.edges.load();
        self.counter.with(key, |entry| (entry.share.is_found(&edges), Change::Nothing))
    }

    fn step(self: &Arc<Self>, key: &str, quota: &Quota, span: Span, cost: u64, now: u64) -> Step {
        let (edges, limit, at) = (self.edges.load(), quota.count.get(), Instant::now());
        let (step, early) = self.counter.with(key, |entry| match entry.share.role(key, &edges) {
            Role::Unsettled => ((Step::Settle, None), Change::Nothing),
            Role::Own => {
                let (left, change) = self.count(entry, limit, span, cost, now);
                ((Step::Done(left), None), change)
            }
            Role::Of(owner) => {
                let lease = entry.share.lease();
                let held = lease.take(span.part, cost, at);
                let asked = match held {
                    Held::Enough => lease.ask(key, (span, limit), None, &edges, at),
                    Held::Denied => None,
                    Held::Short => lease.ask(key, (span, limit), Some(cost), &edges, at),
                };
                let unused = entry.share.left(span.part);
                let done = |allowed| Step::Done(left(&entry.counts, unused, span, now, allowed));
                let step = match (held, asked) {
                    (Held::Short, Some(take)) => {
                        let know = entry.share.tells(&edges).then(|| entry.counts.encode().into());
                        let know = know.map(|counts| KnownCount { key: key.to_owned(), counts });
                        (Step::Lease(owner, take, know), None)
                    }
                    (Held::Denied | Held::Short, _) => (done(false), None),
                    (Held::Enough, early) => (done(true), early.map(|take| (owner, take))),
                };
                (step, Change::Nothing)
            }
        });
        if let Some((owner, take)) = early {
            drop(self.say(&owner, |line| line.take(take, None)));
        }
        step
    }

    /// Takes what a call has cost besides, also more than there is. The counter's owner hears of it within a second.
    pub(crate) fn charge(&self, key: &str, quota: &Quota, clock: &Clock, cost: u64, now: u64) {
        let (span, cost) = (clock.span(now), cost.min(quota.count.get()));
        self.counter.with(key, |entry| (entry.counts.add(span.part, self.counter.life(), cost), Change::Counted));
    }

    /// How it stands with a caller's quota as far as is known here, and whether a call of that cost may pass.
    pub(crate) fn stands(&self, key: &str, quota: &Quota, clock: &Clock, cost: u64, now: u64) -> Left {
        let span = clock.span(now);
        self.counter.with(key, |entry| {
            let unused = entry.share.left(span.part);
            let used = entry.counts.sum(span).saturating_sub(unused);
            let allowed = used.saturating_add(cost) <= quota.count.get();
            (left(&entry.counts, unused, span, now, allowed), Change::Nothing)
        })
    }

    /// Gives back a call that was taken, and did not pass for another reason.
    pub(crate) fn give_back(&self, key: &str, taken: Left, cost: u64) {
        let edges = self.edges.load();
        self.counter.with(key, |entry| {
            let is_leased = matches!(entry.share.role(key, &edges), Role::Of(_));
            if is_leased && entry.share.lease().give_back(taken.part, cost) {
                return ((), Change::Nothing);
            }
            entry.counts.give_back(taken.part, self.counter.life(), cost);
            ((), Change::Counted)
        });
    }

    /// Learns what the other edges have counted that may have counted something unknown; whether all of them said so.
    pub(crate) async fn settle(self: &Arc<Self>, keys: &[String]) -> bool {
        let edges = self.edges.load_full();
        let mut asked = Vec::new();
        for key in keys {
            let unsettled = self.counter.with(key, |entry| (entry.share.unsettled(&edges), Change::Nothing));
            asked.extend(unsettled.iter().map(|edge| self.say(edge, |line| line.find(key))));
        }
        self.settled(keys, &edges, asked).await
    }

    /// The same, of all of them.
    pub(crate) async fn learn(self: &Arc<Self>, keys: &[String]) -> bool {
        let edges = self.edges.load_full();
        let all = keys.iter().flat_map(|key| edges.others().map(move |edge| (edge, key)));
        let asked = all.map(|(edge, key)| self.say(&edge, |line| line.find(key))).collect();
        self.settled(keys, &edges, asked).await
    }

    async fn settled(&self, keys: &[String], edges: &Edges, asked: Vec<Heard>) -> bool {
        let all = async {
            let mut all = true;
            for heard in asked {
                all &= heard.await.is_ok();
            }
            all
        };
        let all = tokio::time::timeout(SETTLE, all).await.unwrap_or(false);
        // Who has fallen silent meanwhile is not waited for, and asked when it is back.
        if all {
            for key in keys {
                self.counter.with(key, |entry| (entry.share.settle(edges), Change::Nothing));
            }
        }
        all
    }

    /// Forgets what callers have used, on all edges; but for what those hold in leases.
    pub(crate) async fn reset(self: &Arc<Self>, keys: &[String]) {
        self.learn(keys).await;
        let edges = self.edges.load_full();
        let mut heard = Vec::new();
        for key in keys {
            let counts = self.counter.with(key, |entry| {
                entry.counts.clear();
                entry.share.forget_lease();
                (entry.counts.encode(), Change::Counted)
            });
            let known = KnownCount { key: key.clone(), counts: counts.into() };
            heard.extend(edges.others().map(|edge| self.say(&edge, |line| line.tell_at_once(known.clone()))));
        }
        for heard in heard {
            let _ = heard.await;
        }
    }
}

fn left(counts: &Counts, unused: u64, span: Span, now: u64, allowed: bool) -> Left {
    let used = counts.sum(span).saturating_sub(unused);
    Left { allowed, used, reset: counts.reset(span, now), part: span.part, unknown: false }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
