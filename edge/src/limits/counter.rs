//! What is known of the quotas of callers: in memory, and on disk a second later at most.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;

use super::{
    counts::{Counts, Life},
    share::Share,
    store::{Store, StoreError},
};

/// How often counts go to disk: what a process may lose that is killed.
const SAVE: Duration = Duration::from_secs(1);
/// How long a start waits for the file.
const OPEN: Duration = Duration::from_secs(30);
/// Pause before the file is opened again that failed.
const REOPEN: Duration = Duration::from_secs(10);
/// How often counts are removed that nobody needs any more.
const PRUNE: Duration = Duration::from_secs(60 * 60);
/// Callers in memory; of others the counts are on disk.
const MAX_KEYS: usize = 100_000;
/// Locks over which the callers are spread.
const SHARDS: usize = 16;

/// The counts of all callers.
pub(crate) struct Counter {
    path: PathBuf,
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
    store: ArcSwapOption<Store>,
    begun: Once,
    /// Whether the store was opened, or could not be.
    opened: (Mutex<bool>, Condvar),
    /// Another process counts.
    closed: AtomicBool,
    /// One at a time writes to the store.
    saving: Mutex<()>,
    /// Under what this process counts; that of the one before, if everything it had counted was known first.
    life: OnceLock<Life>,
    /// How often callers were forgotten that are on disk.
    evictions: AtomicU64,
    /// The shard whose news are told next.
    turn: AtomicUsize,
}

#[derive(Default)]
struct Shard {
    entries: HashMap<String, Entry>,
    /// Those that are not as they are on disk.
    changed: HashSet<String>,
    /// Those of which this process has counted something that others do not know.
    news: HashSet<String>,
}

/// What is known of one caller's quota.
#[derive(Default)]
pub(super) struct Entry {
    pub(super) counts: Counts,
    pub(super) share: Share,
}

/// What was done to an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Nothing,
    /// It knows what others have counted.
    Heard,
    /// That, and somebody else is to know it, too.
    PassedOn,
    /// This process has counted.
    Counted,
}

impl Counter {
    /// Keeps counts in that file, from [`Counter::begin`] on.
    pub(crate) fn new(path: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            path,
            hasher: RandomState::new(),
            shards: std::array::from_fn(|_| Mutex::default()),
            store: ArcSwapOption::empty(),
            begun: Once::new(),
            opened: Default::default(),
            closed: AtomicBool::new(false),
            saving: Mutex::default(),
            life: OnceLock::new(),
            evictions: AtomicU64::new(0),
            turn: AtomicUsize::new(0),
        })
    }

    /// Begins to keep counts, if that was not begun before. Blocks until those of the last life are there, if it is to wait for them: another
    /// process that has them lets go only once this one is in charge.
    pub(crate) fn begin(self: &Arc<Self>, waits: bool) {
        if self.closed.load(Relaxed) {
            return;
        }
        self.begun.call_once(|| {
            let (counter, path) = (Arc::downgrade(self), self.path.clone());
            let keeping = move || keep(&counter, &path);
            if let Err(error) = std::thread::Builder::new().name("quotas".into()).spawn(keeping) {
                tracing::error!(%error, "quotas are counted in memory only");
                self.is_opened();
            }
        });
        if waits {
            let opened = lock(&self.opened.0);
            let _ = self.opened.1.wait_timeout_while(opened, OPEN, |opened| !*opened);
        }
    }

    /// Under what this process counts.
    pub(super) fn life(&self) -> Life {
        *self.life.get_or_init(|| Life(rand::random_range(1..=u64::MAX)))
    }

    /// Does something with what is known of a caller.
    pub(super) fn with<T>(&self, key: &str, then: impl FnOnce(&mut Entry) -> (T, Change)) -> T {
        let mut shard = self.shard(key);
        while !shard.entries.contains_key(key) {
            // Read while nobody waits for the lock; what came and went meanwhile is read again.
            drop(shard);
            let evictions = self.evictions.load(Relaxed);
            let store = self.store.load_full();
            let counts = store.as_ref().and_then(|store| store.get(key)).unwrap_or_default();
            shard = self.shard(key);
            let is_same = match (&store, &*self.store.load()) {
                (Some(store), Some(now)) => Arc::ptr_eq(store, now),
                (None, None) => true,
                _ => false,
            };
            if is_same && self.evictions.load(Relaxed) == evictions {
                shard.entries.entry(key.to_owned()).or_insert(Entry { counts, ..Entry::default() });
            }
        }
        let Shard { entries, changed, news } = &mut *shard;
        let entry = entries.get_mut(key).expect("it is there by now");
        let (result, change) = then(entry);
        for keys in [
            (change != Change::Nothing).then_some(changed),
            matches!(change, Change::Counted | Change::PassedOn).then_some(news),
        ] {
            if let Some(keys) = keys.filter(|keys| !keys.contains(key)) {
                keys.insert(key.to_owned());
            }
        }
        result
    }

    /// Learns what others have counted.
    pub(super) fn merge(&self, key: &str, counts: &Counts) {
        self.with(key, |entry| match entry.counts.merge(counts) {
            true => ((), Change::Heard),
            false => ((), Change::Nothing),
        });
    }

    /// What this process has counted and others are to know, of so many callers at most, all in turn. It is told; where that fails,
    /// [`Counter::untold`].
    pub(super) fn news(&self, most: usize) -> Vec<(String, Counts)> {
        let mut news = Vec::new();
        let first = self.turn.fetch_add(1, Relaxed);
        for nth in 0..SHARDS {
            let mut shard = lock(&self.shards[(first + nth) % SHARDS]);
            let keys: Vec<String> = shard.news.iter().take(most - news.len()).cloned().collect();
            for key in keys {
                shard.news.remove(&key);
                let counts = shard.entries.get(&key).map(|entry| entry.counts.clone());
                news.extend(counts.map(|counts| (key, counts)));
            }
        }
        news
    }

    /// Others do not know it after all.
    pub(super) fn untold(&self, key: &str) {
        let mut shard = self.shard(key);
        if shard.entries.contains_key(key) {
            shard.news.insert(key.to_owned());
        }
    }

    /// Others are to know everything in memory that this process has counted.
    pub(super) fn tell_all(&self) {
        let life = self.life();
        for shard in &self.shards {
            let Shard { entries, news, .. } = &mut *lock(shard);
            news.extend(entries.iter().filter(|(_, entry)| entry.counts.has(life)).map(|(key, _)| key.clone()));
        }
    }

    /// What is on disk behind a key.
    pub(super) fn stored_behind(&self, key: Option<&str>, most: usize) -> Vec<(String, Counts)> {
        self.store.load_full().map_or_else(Vec::new, |store| store.behind(key, most))
    }

    /// Whether what was counted in former lives is known, or cannot be.
    pub(super) fn is_open(&self) -> bool {
        *lock(&self.opened.0) && !self.closed.load(Relaxed)
    }

    /// Goes through everything in memory of which there may be something to be given back.
    pub(super) fn for_each_lease(&self, mut look: impl FnMut(&str, &mut Entry)) {
        for shard in &self.shards {
            lock(shard).entries.iter_mut().filter(|(_, e)| e.share.has_lease()).for_each(|(key, e)| look(key, e));
        }
    }

    /// Callers whose counts are not on disk yet.
    pub(crate) fn unsaved(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).changed.len()).sum()
    }

    /// Keeps what there is, and lets go of the file: another process counts from here on, or nobody.
    pub(crate) fn close(&self) {
        if !self.closed.swap(true, Relaxed) {
            let life = self.life();
            for shard in &self.shards {
                let Shard { entries, changed, .. } = &mut *lock(shard);
                // Whoever counts on has no use for leases of this process.
                for (key, entry) in entries.iter_mut().filter(|(_, entry)| entry.share.has_lease()) {
                    entry
                        .share
                        .take_all()
                        .into_iter()
                        .for_each(|(part, left)| entry.counts.give_back(part, life, left));
                    changed.insert(key.clone());
                }
            }
            let is_saved = self.save();
            let _one = lock(&self.saving);
            if let Some(store) = self.store.swap(None).filter(|_| is_saved)
                && let Err(error) = store.leave_life(self.life())
            {
                tracing::warn!(%error, "the counts of quotas will have one process more than they need");
            }
        }
    }

    fn shard(&self, key: &str) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.hasher.hash_one(key) as usize % SHARDS])
    }

    /// Opens the file, and adds what it has to what was counted before.
    fn open(&self, path: &Path) -> Result<(), StoreError> {
        let store = Arc::new(Store::open(path, || self.closed.load(Relaxed))?);
        let _one = lock(&self.saving);
        if self.closed.load(Relaxed) {
            return Ok(());
        }
        self.store.store(Some(store.clone()));
        for shard in &self.shards {
            for (key, entry) in &mut lock(shard).entries {
                entry.counts.merge(&store.get(key).unwrap_or_default());
            }
        }
        // Whoever has counted by now did so under a number of its own, which must not be that of the file.
        if let Some(before) = store.take_life() {
            let _ = self.life.set(before);
        }
        Ok(())
    }

    fn is_opened(&self) {
        *lock(&self.opened.0) = true;
        self.opened.1.notify_all();
    }

    /// Brings what changed to disk; whether that worked.
    pub(super) fn save(&self) -> bool {
        let _one = lock(&self.saving);
        let store = self.store.load_full();
        let mut fine = true;
        for shard in &self.shards {
            if let Some(store) = store.as_ref().filter(|_| fine) {
                let changed = lock(shard).begin_to_save();
                let saved = if changed.is_empty() { Ok(()) } else { store.merge(&changed) };
                if let Err(error) = saved {
                    tracing::error!(%error, "the counts of quotas cannot be kept; they stay in memory");
                    lock(shard).changed.extend(changed.into_iter().map(|(key, _)| key));
                    fine = false;
                }
            }
            if make_room(&mut lock(shard)) {
                self.evictions.fetch_add(1, Relaxed);
            }
        }
        if !fine {
            // It does nothing more after an error, also when there is room on the disk again.
            self.store.store(None);
        }
        fine
    }
}

impl Shard {
    fn begin_to_save(&mut self) -> Vec<(String, Counts)> {
        let changed = std::mem::take(&mut self.changed).into_iter();
        changed.filter_map(|key| self.entries.get(&key).map(|entry| entry.counts.clone()).map(|c| (key, c))).collect()
    }
}

/// Forgets some whose counts are on disk; if those are not enough, because nothing can be kept, whoever comes. Whether there were any.
fn make_room(shard: &mut Shard) -> bool {
    const MAX: usize = MAX_KEYS / SHARDS;
    let Shard { entries, changed, news } = shard;
    let before = entries.len();
    if entries.len() > MAX {
        let mut too_many = entries.len() - MAX / 4 * 3;
        entries.retain(|key, entry| {
            let stays = too_many == 0 || entry.share.has_lease() || changed.contains(key) || news.contains(key);
            too_many -= usize::from(!stays);
            stays
        });
    }
    if entries.len() > 4 * MAX {
        let mut nth = 0;
        entries.retain(|_, _| {
            nth += 1;
            nth % 2 == 0
        });
        changed.retain(|key| entries.contains_key(key));
        news.retain(|key| entries.contains_key(key));
    }
    entries.len() < before
}

/// Opens the file, and saves once a second, for as long as anybody counts.
fn keep(counter: &Weak<Counter>, path: &Path) {
    let mut failing = false;
    let mut pruned = Instant::now();
    loop {
        let Some(this) = counter.upgrade() else { return };
        if this.closed.load(Relaxed) {
            return;
        }
        if this.store.load().is_none() {
            match this.open(path) {
                Ok(()) => failing = false,
                Err(error) if !std::mem::replace(&mut failing, true) => {
                    tracing::error!(%error, "quotas are counted in memory only, until this works");
                }
                Err(_) => {}
            }
            this.is_opened();
        } else {
            failing |= !this.save();
            if let Some(store) = this.store.load_full().filter(|_| pruned.elapsed() > PRUNE) {
                pruned = Instant::now();
                if let Err(error) = store.prune(starling_node::unix_now()) {
                    tracing::warn!(%error, "old counts of quotas are not removed");
                }
            }
        }
        drop(this);
        std::thread::sleep(if failing { REOPEN } else { SAVE });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(path: PathBuf) -> Arc<Counter> {
        let counter = Counter::new(path);
        counter.begin(true);
        counter
    }

    /// Counts so much, for a part of time; how much there is then.
    fn add(counter: &Counter, key: &str, count: u64) -> u64 {
        counter.with(key, |entry| {
            entry.counts.add(100, counter.life(), count);
            (sum(&entry.counts), Change::Counted)
        })
    }

    fn sum(counts: &Counts) -> u64 {
        counts.sum(crate::limits::quota::Span { part: 100, since: 100, part_seconds: 100 })
    }

    #[test]
    fn counts_survive_and_are_not_lost_or_doubled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quota.redb");
        let first = counter(path.clone());
        assert_eq!(add(&first, "a", 3), 3);
        first.save();
        assert_eq!((add(&first, "a", 4), add(&first, "b", 1)), (7, 1));
        first.close();

        // A process that takes over counts before it has the file.
        let next = Counter::new(path.clone());
        assert_eq!((add(&next, "b", 2), add(&next, "a", 1)), (2, 1));
        next.begin(true);
        assert_eq!((add(&next, "a", 1), add(&next, "b", 1)), (9, 4), "what both have counted");
        assert_ne!(next.life(), first.life());
        next.close();
        let last = counter(path);
        assert_eq!((add(&last, "a", 1), add(&last, "b", 1)), (10, 5));
        assert_eq!(last.life(), next.life(), "a process in the place of another counts on");
    }

    #[test]
    fn many_callers_are_counted_in_little_memory() {
        let dir = tempfile::tempdir().unwrap();
        let counter = counter(dir.path().join("quota.redb"));
        for n in 0..MAX_KEYS + 20_000 {
            add(&counter, &format!("caller {n}"), 1);
        }
        while !counter.news(usize::MAX).is_empty() {}
        counter.save();
        let known: usize = counter.shards.iter().map(|shard| lock(shard).entries.len()).sum();
        assert!(known <= MAX_KEYS, "{known}");
        for n in (0..MAX_KEYS).step_by(1009) {
            assert_eq!(add(&counter, &format!("caller {n}"), 1), 2, "{n}");
        }
    }

    #[test]
    fn news_are_what_this_process_has_counted_and_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let counter = counter(dir.path().join("quota.redb"));
        add(&counter, "a", 3);
        add(&counter, "b", 1);
        let mut others = Counts::default();
        others.add(100, Life(7), 5);
        counter.merge("c", &others);
        let mut news = [counter.news(1), counter.news(1)].concat();
        news.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(news.iter().map(|(key, c)| (key.as_str(), sum(c))).collect::<Vec<_>>(), [("a", 3), ("b", 1)]);
        assert!(counter.news(9).is_empty());
        assert_eq!(counter.unsaved(), 3);
        counter.save();
        assert_eq!(counter.unsaved(), 0);
    }
}
