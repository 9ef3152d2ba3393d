//! Edges that count together in simulated time.

use std::{
    pin::Pin,
    sync::{Weak, atomic::AtomicU64},
};

use jiff::tz::TimeZone;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_protocol::{AskCounts, TellCounts};

use super::{
    answer::{MAX_ASKED, MAX_COUNT},
    peers::MAX_SILENCE,
    *,
};

const NOW: u64 = 1_800_000_000;

/// One edge, of which there is no other.
pub(in crate::limits) fn alone(counter: Arc<Counter>) -> Arc<Tally> {
    let stage = Arc::new(Stage::default());
    Tally::new(counter, Arc::new(Seat { stage, own: NodeId([0; 16]) }))
}

/// Edges that talk to one another in simulated time.
#[derive(Default)]
struct Stage {
    tallies: Mutex<HashMap<NodeId, Weak<Tally>>>,
    /// Which of two parts of the network an edge is in.
    part: Mutex<HashMap<NodeId, u8>>,
    /// Links that carry nothing, while gossip holds both ends for alive.
    broken: Mutex<Vec<(NodeId, NodeId)>>,
    /// Whom gossip knows to be apart.
    noticed: Mutex<HashMap<NodeId, u8>>,
    questions: AtomicU64,
}

struct Seat {
    stage: Arc<Stage>,
    own: NodeId,
}

impl Peers for Seat {
    fn own(&self) -> NodeId {
        self.own
    }

    fn others(&self) -> Vec<NodeId> {
        let noticed = lock(&self.stage.noticed);
        let part = noticed.get(&self.own);
        lock(&self.stage.tallies).keys().filter(|e| **e != self.own && noticed.get(e) == part).copied().collect()
    }

    fn is_settled(&self) -> bool {
        true
    }

    fn ask<'a>(
        &'a self,
        edge: &'a NodeId,
        ask: &'a AskCounts,
    ) -> Pin<Box<dyn Future<Output = Result<TellCounts, String>> + Send + 'a>> {
        Box::pin(async move {
            self.stage.questions.fetch_add(1, Relaxed);
            let is_apart = || {
                let part = lock(&self.stage.part);
                let broken = lock(&self.stage.broken);
                part.get(edge) != part.get(&self.own) || broken.contains(&(self.own, *edge))
            };
            let tally = lock(&self.stage.tallies).get(edge).and_then(Weak::upgrade);
            let way = || tokio::time::sleep(Duration::from_millis(rand::rng().random_range(1..5)));
            way().await;
            if is_apart() {
                return std::future::pending().await;
            }
            let told = tally.ok_or("it is gone")?.hear(self.own, ask.clone()).await.ok_or("it does not understand")?;
            way().await;
            if is_apart() { std::future::pending().await } else { Ok(told) }
        })
    }
}

struct Edge {
    tally: Arc<Tally>,
    run: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.run.abort();
    }
}

impl Stage {
    /// An edge without memory.
    fn edge(self: &Arc<Self>, n: u8) -> Edge {
        let dir = tempfile::tempdir().unwrap();
        let own = NodeId([n; 16]);
        let counter = Counter::new(dir.path().join("quota.redb"));
        counter.begin(true);
        let tally = Tally::new(counter, Arc::new(Seat { stage: self.clone(), own }));
        lock(&self.tallies).insert(own, Arc::downgrade(&tally));
        let run = tokio::spawn(tally.clone().run());
        Edge { tally, run, _dir: dir }
    }

    async fn edges(self: &Arc<Self>, count: u8) -> Vec<Edge> {
        let edges = (0..count).map(|n| self.edge(n)).collect();
        tokio::time::sleep(LOOK * 2).await;
        edges
    }

    /// Cuts the network so that these are alone; gossip notices later.
    async fn cut(&self, apart: &[u8]) {
        *lock(&self.part) = apart.iter().map(|n| (NodeId([*n; 16]), 1)).collect();
    }

    fn notice(&self) {
        let part = lock(&self.part).clone();
        *lock(&self.noticed) = part;
    }
}

struct Calls {
    quota: Quota,
    clock: Clock,
    passed: AtomicU64,
}

impl Calls {
    fn of(quota: &str) -> Arc<Self> {
        let quota = Quota::try_from(quota).unwrap();
        let clock = Clock::new(quota.period, TimeZone::UTC);
        Arc::new(Self { quota, clock, passed: AtomicU64::new(0) })
    }

    async fn one(&self, edge: &Edge, key: &str) -> Left {
        let left = edge.tally.take(key, &self.quota, &self.clock, 1, NOW).await;
        self.passed.fetch_add(u64::from(left.allowed), Relaxed);
        left
    }

    /// So many calls over these edges, some at once, a millisecond apart.
    async fn many(self: &Arc<Self>, edges: &[&Edge], key: &'static str, count: u64) {
        let mut rng = StdRng::seed_from_u64(3);
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..count {
            let tally = edges[rng.random_range(0..edges.len())].tally.clone();
            let calls = self.clone();
            running.spawn(async move {
                let left = tally.take(key, &calls.quota, &calls.clock, 1, NOW).await;
                calls.passed.fetch_add(u64::from(left.allowed), Relaxed);
            });
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        while running.join_next().await.is_some() {}
    }

    fn passed(&self) -> u64 {
        self.passed.load(Relaxed)
    }

    fn used(&self, edge: &Edge, key: &str) -> u64 {
        edge.tally.stands(key, &self.quota, &self.clock, 1, NOW).used
    }
}

#[tokio::test(start_paused = true)]
async fn several_edges_let_pass_what_one_would() {
    for (count, limit) in [(3, "3000/day"), (10, "3000/day"), (3, "20/day"), (2, "1/month")] {
        let stage = Arc::new(Stage::default());
        let edges = stage.edges(count).await;
        let all: Vec<&Edge> = edges.iter().collect();
        let calls = Calls::of(limit);
        let limit = calls.quota.count.get();
        calls.many(&all, "a", limit + 200).await;
        let passed = calls.passed();
        assert!(passed <= limit && passed >= limit * 95 / 100, "{passed} of {limit} over {count}");
        let questions = stage.questions.load(Relaxed);
        assert!(questions < 600 + limit / 3, "{questions} over {count}");
        // What lay in leases somewhere comes back.
        tokio::time::sleep(Duration::from_secs(5)).await;
        calls.many(&all, "a", 2000).await;
        assert_eq!(calls.passed(), limit, "over {count}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_edge_that_dies_takes_no_more_than_a_second_with_it() {
    for dies in 0..3 {
        let stage = Arc::new(Stage::default());
        let mut edges = stage.edges(3).await;
        let calls = Calls::of("6000/day");
        calls.many(&edges.iter().collect::<Vec<_>>(), "a", 2000).await;
        assert_eq!(calls.passed(), 2000);
        // Without a word. Gossip does not know for a while.
        let dead = edges.remove(dies);
        let left: Vec<&Edge> = edges.iter().collect();
        stage.cut(&[dies as u8]).await;
        calls.many(&left, "a", 1000).await;
        stage.notice();
        calls.many(&left, "a", 1000).await;
        assert!(calls.passed() >= 3950, "{}", calls.passed());
        // It comes again, with nothing that it knew.
        drop(dead);
        let again = stage.edge(dies as u8);
        stage.cut(&[]).await;
        stage.notice();
        tokio::time::sleep(Duration::from_secs(4)).await;
        calls.many(&[left[0], left[1], &again], "a", 6000).await;
        // A second of calls over three edges, and the leases of one.
        assert!((5700..=6400).contains(&calls.passed()), "{} when {dies} dies", calls.passed());
    }
}

#[tokio::test(start_paused = true)]
async fn each_side_of_a_cut_lets_pass_what_was_left_and_both_know_it_afterwards() {
    let stage = Arc::new(Stage::default());
    let edges = stage.edges(4).await;
    let all: Vec<&Edge> = edges.iter().collect();
    let (here, there) = all.split_at(2);
    let calls = Calls::of("4000/day");
    calls.many(&all, "a", 3000).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    stage.cut(&[2, 3]).await;
    calls.many(&all, "a", 500).await;
    stage.notice();
    calls.many(here, "a", 1500).await;
    calls.many(there, "a", 1500).await;
    let passed = calls.passed();
    assert!((3900..=5050).contains(&passed), "{passed}: two times what was left at most");
    stage.cut(&[]).await;
    stage.notice();
    tokio::time::sleep(MAX_SILENCE).await;
    for edge in &edges {
        assert!(!calls.one(edge, "a").await.allowed);
        edge.tally.learn(&["a".into()]).await;
        let used = calls.used(edge, "a");
        assert!((passed..=passed + 80).contains(&used), "{used} of {passed}");
    }
}

/// One way, so that the one edge notices nothing: what was counted in its place must reach it all the same.
#[tokio::test(start_paused = true)]
async fn an_edge_that_only_one_leaves_out_learns_what_was_counted_meanwhile() {
    for count in [2, 3] {
        let stage = Arc::new(Stage::default());
        let edges = stage.edges(count).await;
        let calls = Calls::of("1000/day");
        let [a, b] = [NodeId([0; 16]), NodeId([1; 16])];
        for round in 0..3 {
            *lock(&stage.broken) = vec![(b, a)];
            calls.many(&[&edges[1]], "a", 100).await;
            lock(&stage.broken).clear();
            tokio::time::sleep(Duration::from_secs(10)).await;
            calls.many(&[&edges[0]], "a", 100).await;
            assert_eq!(calls.passed(), (round + 1) * 200, "over {count}");
        }
        calls.many(&edges.iter().collect::<Vec<_>>(), "a", 1000).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        calls.many(&[&edges[0]], "a", 100).await;
        assert_eq!(calls.passed(), 1000, "over {count}");
    }
}

/// One after the other is replaced by one without memory; who called before they came is known by whoever is left.
#[tokio::test(start_paused = true)]
async fn quiet_callers_are_remembered_by_edges_that_come() {
    let stage = Arc::new(Stage::default());
    let mut edges = stage.edges(2).await;
    let calls = Calls::of("100/month");
    for n in 0..50 {
        let key: &'static str = Box::leak(format!("caller {n}").into_boxed_str());
        calls.many(&[&edges[n % 2]], key, 1).await;
    }
    for n in 2..6 {
        // On disk, and told.
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(edges.iter().all(|edge| edge.tally.counter.save()));
        edges.push(stage.edge(n));
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(edges.iter().all(|edge| edge.tally.counter.save()));
        drop(edges.remove(0));
        lock(&stage.tallies).remove(&NodeId([n - 2; 16]));
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    for n in 0..50 {
        let key = format!("caller {n}");
        edges[0].tally.learn(std::slice::from_ref(&key)).await;
        assert_eq!(calls.used(&edges[0], &key), 1, "{key}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_on_any_edge_holds_on_all() {
    let stage = Arc::new(Stage::default());
    let edges = stage.edges(3).await;
    let all: Vec<&Edge> = edges.iter().collect();
    let calls = Calls::of("50/day");
    for edge in &edges {
        let before = calls.passed();
        calls.many(&all, "a", 60).await;
        assert_eq!(calls.passed() - before, 50);
        edge.tally.reset(&["a".into()]).await;
    }
    for edge in &edges {
        edge.tally.learn(&["a".into()]).await;
        assert_eq!(calls.used(edge, "a"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_says_nothing_is_left_out_and_holds_nobody_up() {
    let stage = Arc::new(Stage::default());
    let edges = stage.edges(3).await;
    let calls = Calls::of("1000/day");
    stage.cut(&[2]).await;
    let begun = Instant::now();
    for n in 0..300 {
        let key = format!("caller {n}");
        assert!(calls.one(&edges[0], &key).await.allowed);
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(edges[0].tally.silent(), 1);
    stage.cut(&[]).await;
    tokio::time::sleep(MAX_SILENCE).await;
    for n in 0..30 {
        calls.one(&edges[0], &format!("caller {n}")).await;
    }
    assert_eq!(edges[0].tally.silent(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_question_that_asks_for_too_much_is_none() {
    let stage = Arc::new(Stage::default());
    let edges = stage.edges(2).await;
    let finds = vec![String::new(); MAX_ASKED + 1];
    assert_eq!(edges[0].tally.clone().hear(NodeId([1; 16]), AskCounts { finds, ..AskCounts::default() }).await, None);
    let take = TakeCount { key: "k".into(), part: 7, since: 9, limit: u64::MAX, least: 0, most: u64::MAX };
    let told = edges[0]
        .tally
        .clone()
        .hear(NodeId([1; 16]), AskCounts { takes: vec![take.clone(), take], ..AskCounts::default() });
    assert_eq!(told.await.unwrap().taken.iter().map(|t| t.taken).collect::<Vec<_>>(), [MAX_COUNT, 0]);
}
