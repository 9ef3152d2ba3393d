//! What callers have used of their quotas: counted in memory, and kept on disk a second later at most.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, Once, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;

use super::{
    quota::{Clock, Counts, Quota},
    store::Store,
};

/// How often counts go to disk: what a process may lose that is killed.
const SAVE: Duration = Duration::from_secs(1);
/// How long a start waits for the file.
const OPEN: Duration = Duration::from_secs(5);
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
    /// Whether the store was opened, or cannot be.
    opened: (Mutex<bool>, Condvar),
    /// Another process counts.
    closed: AtomicBool,
    saving: Mutex<()>,
}

#[derive(Default)]
struct Shard {
    entries: HashMap<String, Entry>,
    /// Those that have something unsaved.
    changed: Vec<String>,
}

#[derive(Default)]
struct Entry {
    /// What is on disk, as far as it was read.
    kept: Counts,
    /// What is on its way there.
    saving: Counts,
    unsaved: Counts,
}

/// How it stands with a caller's quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) allowed: bool,
    pub(crate) used: u64,
    /// Seconds until there is room again, or more of it.
    pub(crate) reset: u64,
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
        })
    }

    /// Begins to keep counts, if that was not begun before, and waits until those of the last life are there; or only until another process
    /// has let go of them, if it `waits` for none.
    pub(crate) fn begin(self: &Arc<Self>, waits: bool) {
        self.begun.call_once(|| {
            let counter = Arc::downgrade(self);
            let path = self.path.clone();
            let keeping = move || {
                let store = Store::open(&path);
                let Some(this) = counter.upgrade() else { return };
                match store {
                    Ok(store) => this.store.store(Some(Arc::new(store))),
                    Err(error) => tracing::error!(%error, "quotas are counted in memory only"),
                }
                *lock(&this.opened.0) = true;
                this.opened.1.notify_all();
                drop(this);
                keep(&counter);
            };
            if let Err(error) = std::thread::Builder::new().name("quotas".into()).spawn(keeping) {
                tracing::error!(%error, "quotas are counted in memory only");
            }
        });
        if waits {
            let opened = lock(&self.opened.0);
            let _ = self.opened.1.wait_timeout_while(opened, OPEN, |opened| !*opened);
        }
    }

    /// Takes from a caller's quota, unless there is not enough: a refused call costs nothing.
    pub(crate) fn take(&self, key: &str, quota: &Quota, clock: &Clock, cost: u64, now: u64) -> Left {
        let span = clock.span(now);
        let mut shard = self.shard(key);
        let entry = self.entry(&mut shard, key);
        let used = entry.used(span);
        let allowed = used.saturating_add(cost) <= quota.count.get();
        if allowed {
            let was_saved = entry.unsaved.is_empty();
            entry.unsaved.add(span.part, cost);
            if was_saved {
                shard.changed.push(key.to_owned());
            }
        }
        let entry = self.entry(&mut shard, key);
        Left { allowed, used: entry.used(span), reset: entry.all().reset(span, now) }
    }

    /// How much a caller has used.
    pub(crate) fn look(&self, key: &str, clock: &Clock, now: u64) -> Left {
        let span = clock.span(now);
        let mut shard = self.shard(key);
        let entry = self.entry(&mut shard, key);
        Left { allowed: true, used: entry.used(span), reset: entry.all().reset(span, now) }
    }

    /// Forgets what callers have used.
    pub(crate) fn reset(&self, keys: &[String]) -> Result<(), String> {
        let _one = lock(&self.saving);
        for key in keys {
            self.shard(key).entries.remove(key);
        }
        match &*self.store.load() {
            Some(store) => store.remove(keys).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    /// Keeps what there is, and lets go of the file: another process counts from here on, or nobody.
    pub(crate) fn close(&self) {
        if !self.closed.swap(true, Relaxed) {
            self.save();
            self.store.store(None);
        }
    }

    fn shard(&self, key: &str) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.hasher.hash_one(key) as usize % SHARDS])
    }

    fn entry<'a>(&self, shard: &'a mut Shard, key: &str) -> &'a mut Entry {
        if !shard.entries.contains_key(key) {
            let kept = self.store.load().as_ref().and_then(|store| store.get(key)).unwrap_or_default();
            shard.entries.insert(key.to_owned(), Entry { kept, ..Entry::default() });
        }
        shard.entries.entry(key.to_owned()).or_default()
    }

    /// Brings what changed to disk.
    fn save(&self) {
        let _one = lock(&self.saving);
        let store = self.store.load_full();
        for shard in &self.shards {
            let changes: Vec<(String, Counts)> = {
                let mut shard = lock(shard);
                let Shard { entries, changed } = &mut *shard;
                let Some(_) = &store else { continue };
                let changed = std::mem::take(changed).into_iter();
                changed
                    .filter_map(|key| {
                        let entry = entries.get_mut(&key)?;
                        entry.saving = std::mem::take(&mut entry.unsaved);
                        Some((key, entry.saving.clone()))
                    })
                    .collect()
            };
            let saved = match &store {
                Some(store) if !changes.is_empty() => store.add(&changes),
                _ => Ok(Vec::new()),
            };
            let mut shard = lock(shard);
            match saved {
                Ok(saved) => {
                    for ((key, _), kept) in changes.into_iter().zip(saved) {
                        if let Some(entry) = shard.entries.get_mut(&key) {
                            (entry.kept, entry.saving) = (kept, Counts::default());
                        }
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "the counts of quotas cannot be kept; they stay in memory");
                    for (key, _) in changes {
                        if let Some(entry) = shard.entries.get_mut(&key) {
                            let saving = std::mem::take(&mut entry.saving);
                            entry.unsaved.merge(&saving);
                            shard.changed.push(key);
                        }
                    }
                }
            }
            make_room(&mut shard);
        }
    }
}

/// Forgets whose counts are on disk; if those are not enough, because nothing can be kept, whoever comes.
fn make_room(shard: &mut Shard) {
    const MAX: usize = MAX_KEYS / SHARDS;
    if shard.entries.len() > MAX {
        shard.entries.retain(|_, entry| !entry.unsaved.is_empty());
    }
    if shard.entries.len() > 4 * MAX {
        let mut nth = 0;
        shard.entries.retain(|_, _| {
            nth += 1;
            nth % 2 == 0
        });
        let Shard { entries, changed } = shard;
        changed.retain(|key| entries.contains_key(key));
    }
}

impl Entry {
    fn used(&self, span: super::quota::Span) -> u64 {
        [&self.kept, &self.saving, &self.unsaved].iter().fold(0, |sum, counts| sum.saturating_add(counts.sum(span)))
    }

    fn all(&self) -> Counts {
        let mut all = self.kept.clone();
        all.merge(&self.saving);
        all.merge(&self.unsaved);
        all
    }
}

/// Saves once a second, for as long as anybody counts.
fn keep(counter: &Weak<Counter>) {
    loop {
        std::thread::sleep(SAVE);
        let Some(counter) = counter.upgrade() else { return };
        if counter.closed.load(Relaxed) {
            return;
        }
        counter.save();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;

    #[test]
    fn counts_survive_and_are_not_lost_or_doubled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quota.redb");
        let quota = Quota::try_from("10/day").unwrap();
        let clock = Clock::new(quota.period, TimeZone::UTC);
        let now = 1_800_000_000;
        let counter = Counter::new(path.clone());
        counter.begin(true);
        let take = |counter: &Counter, key: &str, cost| counter.take(key, &quota, &clock, cost, now);
        assert_eq!(take(&counter, "a", 3).used, 3);
        counter.save();
        assert_eq!(take(&counter, "a", 4).used, 7);
        assert!(!take(&counter, "a", 4).allowed, "a call that costs more than is left");
        assert!(take(&counter, "a", 3).allowed && !take(&counter, "a", 1).allowed);
        assert!(take(&counter, "b", 1).allowed);
        counter.close();

        // A process that takes over counts before it has the file.
        let next = Counter::new(path.clone());
        assert!(take(&next, "b", 2).allowed);
        next.begin(true);
        next.save();
        assert_eq!(take(&next, "b", 1).used, 4, "what both have counted");
        assert!(!take(&next, "a", 1).allowed);
        next.reset(&["a".into()]).unwrap();
        assert_eq!(take(&next, "a", 1).used, 1);
        next.close();
        let last = Counter::new(path);
        last.begin(true);
        assert_eq!((take(&last, "a", 1).used, take(&last, "b", 1).used), (2, 5));
    }

    #[test]
    fn many_callers_are_counted_in_little_memory() {
        let dir = tempfile::tempdir().unwrap();
        let counter = Counter::new(dir.path().join("quota.redb"));
        counter.begin(true);
        let quota = Quota::try_from("10/7d").unwrap();
        let clock = Clock::new(quota.period, TimeZone::UTC);
        for n in 0..MAX_KEYS + 20_000 {
            counter.take(&format!("caller {n}"), &quota, &clock, 1, 1_800_000_000);
        }
        counter.save();
        let known: usize = counter.shards.iter().map(|shard| lock(shard).entries.len()).sum();
        assert!(known <= MAX_KEYS, "{known}");
        for n in (0..MAX_KEYS).step_by(1009) {
            assert_eq!(counter.look(&format!("caller {n}"), &clock, 1_800_000_000).used, 1, "{n}");
        }
    }
}
