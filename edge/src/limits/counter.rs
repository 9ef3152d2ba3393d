//! What callers have used of their quotas: counted in memory, and kept on disk a second later at most.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, Once, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;

use super::{
    quota::{Clock, Counts, Quota, Span},
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
    /// One at a time writes to the store, or forgets what it has.
    saving: Mutex<()>,
    /// How often something was forgotten.
    resets: AtomicU64,
}

#[derive(Default)]
struct Shard {
    entries: HashMap<String, Entry>,
    /// Those that have something unsaved.
    changed: HashSet<String>,
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
            resets: AtomicU64::new(0),
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

    /// Takes from a caller's quota, unless there is not enough: a refused call costs nothing.
    pub(crate) fn take(&self, key: &str, quota: &Quota, clock: &Clock, cost: u64, now: u64) -> Left {
        let span = clock.span(now);
        self.with(key, |entry| {
            let allowed = entry.used(span).saturating_add(cost) <= quota.count.get();
            if allowed {
                entry.unsaved.add(span.part, cost);
            }
            (Left { allowed, used: entry.used(span), reset: entry.all().reset(span, now) }, allowed)
        })
    }

    /// How it stands with a caller's quota, and whether a call of that cost may pass.
    pub(crate) fn look(&self, key: &str, quota: &Quota, clock: &Clock, cost: u64, now: u64) -> Left {
        let span = clock.span(now);
        self.with(key, |entry| {
            let used = entry.used(span);
            let allowed = used.saturating_add(cost) <= quota.count.get();
            (Left { allowed, used, reset: entry.all().reset(span, now) }, false)
        })
    }

    /// Forgets what callers have used.
    pub(crate) fn reset(&self, keys: &[String]) -> Result<(), String> {
        let _one = lock(&self.saving);
        match &*self.store.load() {
            Some(store) => store.remove(keys).map_err(|e| e.to_string())?,
            None if self.begun.is_completed() => return Err("the counts on disk are not there yet; try again".into()),
            None => {}
        }
        self.resets.fetch_add(1, Relaxed);
        for key in keys {
            let mut shard = self.shard(key);
            shard.entries.remove(key);
            shard.changed.remove(key);
        }
        Ok(())
    }

    /// Callers whose counts are not on disk yet.
    pub(crate) fn unsaved(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).changed.len()).sum()
    }

    /// Keeps what there is, and lets go of the file: another process counts from here on, or nobody.
    pub(crate) fn close(&self) {
        if !self.closed.swap(true, Relaxed) {
            self.save();
            let _one = lock(&self.saving);
            self.store.store(None);
        }
    }

    fn shard(&self, key: &str) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.hasher.hash_one(key) as usize % SHARDS])
    }

    /// Does something with what is known of a caller; `true` beside the result says that it has changed.
    fn with<T>(&self, key: &str, then: impl FnOnce(&mut Entry) -> (T, bool)) -> T {
        let mut shard = self.shard(key);
        while !shard.entries.contains_key(key) {
            // Read while nobody waits for the lock; what was forgotten meanwhile must not come back.
            drop(shard);
            let resets = self.resets.load(Relaxed);
            let store = self.store.load_full();
            let kept = store.as_ref().and_then(|store| store.get(key)).unwrap_or_default();
            shard = self.shard(key);
            let is_same = match (&store, &*self.store.load()) {
                (Some(store), Some(now)) => Arc::ptr_eq(store, now),
                (None, None) => true,
                _ => false,
            };
            if is_same && self.resets.load(Relaxed) == resets {
                shard.entries.entry(key.to_owned()).or_insert(Entry { kept, ..Entry::default() });
            }
        }
        let Shard { entries, changed } = &mut *shard;
        let entry = entries.get_mut(key).expect("it is there by now");
        let (result, has_changed) = then(entry);
        if has_changed && !changed.contains(key) {
            changed.insert(key.to_owned());
        }
        result
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
                entry.kept = store.get(key).unwrap_or_default();
            }
        }
        Ok(())
    }

    fn is_opened(&self) {
        *lock(&self.opened.0) = true;
        self.opened.1.notify_all();
    }

    /// Brings what changed to disk; whether that worked.
    fn save(&self) -> bool {
        let _one = lock(&self.saving);
        let store = self.store.load_full();
        let mut fine = true;
        for shard in &self.shards {
            if let Some(store) = store.as_ref().filter(|_| fine) {
                let changes = lock(shard).begin_to_save();
                let saved = match changes.is_empty() {
                    true => Ok(Vec::new()),
                    false => store.add(&changes),
                };
                let mut shard = lock(shard);
                match saved {
                    Ok(saved) => shard.saved(changes.into_iter().map(|(key, _)| key).zip(saved)),
                    Err(error) => {
                        tracing::error!(%error, "the counts of quotas cannot be kept; they stay in memory");
                        shard.not_saved(changes.into_iter().map(|(key, _)| key));
                        fine = false;
                    }
                }
            }
            make_room(&mut lock(shard));
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
        let saving = |key: String| {
            let entry = self.entries.get_mut(&key)?;
            entry.saving = std::mem::take(&mut entry.unsaved);
            Some((key, entry.saving.clone()))
        };
        changed.filter_map(saving).collect()
    }

    fn saved(&mut self, saved: impl Iterator<Item = (String, Counts)>) {
        for (key, kept) in saved {
            if let Some(entry) = self.entries.get_mut(&key) {
                (entry.kept, entry.saving) = (kept, Counts::default());
            }
        }
    }

    fn not_saved(&mut self, keys: impl Iterator<Item = String>) {
        for key in keys {
            if let Some(entry) = self.entries.get_mut(&key) {
                let saving = std::mem::take(&mut entry.saving);
                entry.unsaved.merge(&saving);
                self.changed.insert(key);
            }
        }
    }
}

/// Forgets some whose counts are on disk; if those are not enough, because nothing can be kept, whoever comes.
fn make_room(shard: &mut Shard) {
    const MAX: usize = MAX_KEYS / SHARDS;
    let Shard { entries, changed } = shard;
    if entries.len() > MAX {
        let mut too_many = entries.len() - MAX / 4 * 3;
        entries.retain(|_, entry| {
            let stays = too_many == 0 || !entry.unsaved.is_empty();
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
    }
}

impl Entry {
    fn used(&self, span: Span) -> u64 {
        [&self.kept, &self.saving, &self.unsaved].iter().fold(0, |sum, counts| sum.saturating_add(counts.sum(span)))
    }

    fn all(&self) -> Counts {
        let mut all = self.kept.clone();
        all.merge(&self.saving);
        all.merge(&self.unsaved);
        all
    }
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
        assert!(take(&next, "b", 2).allowed && take(&next, "a", 1).allowed);
        next.begin(true);
        assert!(!take(&next, "a", 1).allowed, "at once, when it has it");
        assert_eq!(take(&next, "b", 1).used, 4, "what both have counted");
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
            assert_eq!(counter.look(&format!("caller {n}"), &quota, &clock, 1, 1_800_000_000).used, 1, "{n}");
        }
    }

    /// A caller at its limit who asks all the time is the one for whom it is reset.
    #[test]
    fn a_reset_holds_whoever_asks_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let counter = Counter::new(dir.path().join("quota.redb"));
        counter.begin(true);
        let quota = Quota::try_from("10/day").unwrap();
        let clock = Clock::new(quota.period, TimeZone::UTC);
        let now = 1_800_000_000;
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Relaxed) {
                    counter.look("a", &quota, &clock, 1, now);
                }
            });
            for _ in 0..20 {
                assert!(counter.take("a", &quota, &clock, 10, now).allowed);
                counter.save();
                counter.reset(&["a".into()]).unwrap();
            }
            ended.store(true, Relaxed);
        });
    }

    #[test]
    fn what_cannot_be_saved_is_saved_later_and_once() {
        let mut shard = Shard::default();
        let counts = |part, count| {
            let mut counts = Counts::default();
            counts.add(part, count);
            counts
        };
        shard.entries.insert("a".into(), Entry { unsaved: counts(1, 2), ..Entry::default() });
        shard.changed.insert("a".into());
        for _ in 0..3 {
            assert_eq!(shard.begin_to_save(), [("a".to_owned(), counts(1, 2))]);
            shard.not_saved(["a".to_owned()].into_iter());
        }
        assert_eq!(shard.begin_to_save(), [("a".to_owned(), counts(1, 2))]);
        // Counted while it is written.
        shard.entries.get_mut("a").unwrap().unsaved.add(1, 5);
        shard.changed.insert("a".into());
        shard.saved([("a".to_owned(), counts(1, 2))].into_iter());
        assert_eq!(shard.begin_to_save(), [("a".to_owned(), counts(1, 5))]);
    }
}
