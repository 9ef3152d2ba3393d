//! Where quotas survive the process: `quota.redb` in the state directory.

use std::{
    io::ErrorKind::{InvalidData, UnexpectedEof},
    ops::Bound,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use super::counts::{Counts, Life};

const COUNTS: TableDefinition<&str, &[u8]> = TableDefinition::new("counts by life");
const LIFE: TableDefinition<(), u64> = TableDefinition::new("life");
/// Most that is kept; the longest unused go first.
const MAX_STORED: u64 = 1_000_000;
/// Pause between looks whether the process before has let go.
const LOOK: Duration = Duration::from_millis(20);
/// After how long it is said that it has not.
const SAID: Duration = Duration::from_secs(10);
/// For how long a count is needed, in seconds: twice the longest time.
const NEEDED_S: u64 = 62 * 24 * 60 * 60;
/// Memory for what was read.
const CACHE_BYTES: usize = 8 << 20;

/// Counts on disk.
pub(crate) struct Store(Database);

/// Why nothing is kept.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", .path.display())]
pub(crate) struct StoreError {
    path: PathBuf,
    #[source]
    source: redb::Error,
}

impl Store {
    /// Opens it, as soon as no other process has it, unless that is `given_up`. One that is damaged is put aside, which is said, and counting
    /// begins anew.
    pub(crate) fn open(path: &Path, given_up: impl Fn() -> bool) -> Result<Self, StoreError> {
        let failed = |source: redb::Error| StoreError { path: path.to_path_buf(), source };
        let open = || -> Result<Self, redb::Error> {
            let mut builder = Database::builder();
            builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
            Ok(Self(builder.create(path)?))
        };
        let mut waits_since = Some(Instant::now());
        loop {
            match open() {
                Ok(store) => return Ok(store),
                Err(redb::Error::DatabaseAlreadyOpen) if !given_up() => {
                    if waits_since.is_some_and(|since: Instant| since.elapsed() > SAID) {
                        waits_since = None;
                        tracing::warn!(path = %path.display(), "another process still counts quotas here; this one waits for it");
                    }
                    std::thread::sleep(LOOK);
                }
                Err(error @ redb::Error::DatabaseAlreadyOpen) => return Err(failed(error)),
                Err(redb::Error::Io(error)) if !matches!(error.kind(), InvalidData | UnexpectedEof) => {
                    return Err(failed(redb::Error::Io(error)));
                }
                Err(error) => {
                    let aside = path.with_extension("redb.damaged");
                    std::fs::rename(path, &aside).map_err(|e| failed(redb::Error::Io(e)))?;
                    let (shown, aside) = (path.display(), aside.display());
                    tracing::error!(path = %shown, %error, %aside, "the counts of quotas are damaged: they begin anew");
                    return open().map_err(failed);
                }
            }
        }
    }

    /// What is kept of a caller.
    pub(crate) fn get(&self, key: &str) -> Option<Counts> {
        let read = || -> Result<Option<Counts>, redb::Error> {
            let reading = self.0.begin_read()?;
            let table = match reading.open_table(COUNTS) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            Ok(table.get(key)?.and_then(|bytes| Counts::decode(bytes.value())))
        };
        read().unwrap_or_else(|error| {
            tracing::error!(%error, "the counts of quotas cannot be read");
            None
        })
    }

    /// Under what the process before has counted, if everything that it had counted is here. Told once: whoever is killed has counted
    /// more than is here, and others may know of it.
    pub(crate) fn take_life(&self) -> Option<Life> {
        let take = || -> Result<Option<Life>, redb::Error> {
            let writing = self.0.begin_write()?;
            let life = writing.open_table(LIFE)?.remove(())?.map(|life| Life(life.value()));
            writing.commit()?;
            Ok(life)
        };
        take().ok().flatten()
    }

    /// Says that everything is here that was counted under that.
    pub(crate) fn leave_life(&self, life: Life) -> Result<(), redb::Error> {
        let writing = self.0.begin_write()?;
        writing.open_table(LIFE)?.insert((), life.0)?;
        Ok(writing.commit()?)
    }

    /// What is kept behind a key, or from the first on, of so many callers at most.
    pub(crate) fn behind(&self, key: Option<&str>, most: usize) -> Vec<(String, Counts)> {
        let read = || -> Result<Vec<(String, Counts)>, redb::Error> {
            let table = match self.0.begin_read()?.open_table(COUNTS) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
            let mut found = Vec::new();
            let from = key.map_or(Bound::Unbounded, Bound::Excluded);
            for entry in table.range::<&str>((from, Bound::Unbounded))?.take(most) {
                let (key, counts) = entry?;
                found.push((key.value().to_owned(), Counts::decode(counts.value()).unwrap_or_default()));
            }
            Ok(found)
        };
        read().unwrap_or_else(|error| {
            tracing::error!(%error, "the counts of quotas cannot be read");
            Vec::new()
        })
    }

    /// Adds what is known to what is kept, all or nothing.
    pub(crate) fn merge(&self, known: &[(String, Counts)]) -> Result<(), redb::Error> {
        let mut writing = self.0.begin_write()?;
        writing.set_durability(Durability::Immediate)?;
        {
            let mut table = writing.open_table(COUNTS)?;
            for (key, counts) in known {
                let kept = table.get(key.as_str())?.and_then(|bytes| Counts::decode(bytes.value()));
                let mut all = kept.unwrap_or_default();
                if all.merge(counts) {
                    table.insert(key.as_str(), all.encode().as_slice())?;
                }
            }
        }
        Ok(writing.commit()?)
    }

    /// Forgets what nobody needs any more, at `now` in seconds since 1970; and the longest unused, if there is too much.
    pub(crate) fn prune(&self, now: u64) -> Result<(), redb::Error> {
        self.prune_to(now.saturating_sub(NEEDED_S), MAX_STORED)
    }

    fn prune_to(&self, since: u64, most: u64) -> Result<(), redb::Error> {
        let mut ages = Vec::new();
        {
            let reading = self.0.begin_read()?;
            let table = match reading.open_table(COUNTS) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            for entry in table.iter()? {
                let (key, counts) = entry?;
                ages.push(age(key.value(), counts.value()));
            }
        }
        let is_needed = |age: &Age| age.latest >= since;
        let too_many = ages.iter().filter(|age| is_needed(age)).count().saturating_sub(most as usize);
        if too_many == 0 && ages.iter().all(is_needed) {
            return Ok(());
        }
        ages.retain(is_needed);
        // All before this one, and of those that are like it as many as it takes.
        let last = too_many.checked_sub(1).map(|nth| *ages.select_nth_unstable(nth).1);
        let mut ties = last.map_or(0, |last| too_many - ages.iter().filter(|age| **age < last).count());
        let writing = self.0.begin_write()?;
        writing.open_table(COUNTS)?.retain(|key, counts| {
            let age = age(key, counts);
            let goes = match last {
                _ if !is_needed(&age) => true,
                Some(last) if age == last && ties > 0 => {
                    ties -= 1;
                    true
                }
                Some(last) => age < last,
                None => false,
            };
            !goes
        })?;
        Ok(writing.commit()?)
    }
}

/// What goes first, where there is too much: addresses before consumers, whose number nobody can raise at will, and of each the longest
/// unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Age {
    is_consumer: bool,
    /// The last part of time for which there is a count.
    latest: u64,
}

fn age(key: &str, counts: &[u8]) -> Age {
    let is_consumer = key.split(' ').nth(2) != Some("address");
    Age { is_consumer, latest: Counts::decode(counts).map_or(0, |counts| counts.latest()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pairs: &[(u64, u64)]) -> Counts {
        let mut counts = Counts::default();
        pairs.iter().for_each(|(part, count)| counts.add(*part, Life(1), *count));
        counts
    }

    #[test]
    fn what_is_added_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quota.redb");
        let store = Store::open(&path, || false).unwrap();
        assert_eq!(store.get("a"), None);
        store.merge(&[("a".into(), counts(&[(10, 1)])), ("b".into(), counts(&[(10, 7)]))]).unwrap();
        store.merge(&[("a".into(), counts(&[(10, 2), (20, 3)]))]).unwrap();
        assert_eq!(store.take_life(), None);
        store.leave_life(Life(8)).unwrap();
        drop(store);
        let store = Store::open(&path, || false).unwrap();
        assert_eq!(store.get("a"), Some(counts(&[(10, 2), (20, 3)])));
        assert_eq!((store.take_life(), store.get("b")), (Some(Life(8)), Some(counts(&[(10, 7)]))));
        assert_eq!(store.take_life(), None);
        store.merge(&[("c".into(), counts(&[(5, 1)])), ("d".into(), counts(&[(30, 1)]))]).unwrap();
        store.prune_to(0, 3).unwrap();
        assert_eq!((store.get("c"), store.get("d").is_some()), (None, true), "the longest unused go first");
        store.prune_to(20, 2).unwrap();
        assert_eq!((store.get("b"), store.get("d").is_some()), (None, true), "and what nobody needs");
    }

    #[test]
    fn no_more_goes_than_has_to_and_addresses_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("quota.redb"), || false).unwrap();
        // All of a month have the same part, and those of a day come later.
        let all = (0..10).flat_map(|n| {
            [
                (format!("p month consumer {n}"), counts(&[(100, 1)])),
                (format!("p day address {n}"), counts(&[(200, 1)])),
            ]
        });
        store.merge(&all.collect::<Vec<_>>()).unwrap();
        let left = |who: &str| (0..10).filter(|n| store.get(&format!("p {who} {n}")).is_some()).count();
        store.prune_to(0, 13).unwrap();
        assert_eq!((left("month consumer"), left("day address")), (10, 3));
        store.prune_to(0, 7).unwrap();
        assert_eq!((left("month consumer"), left("day address")), (7, 0));
        store.prune_to(101, 7).unwrap();
        assert_eq!(left("month consumer"), 0);
    }

    #[test]
    fn a_damaged_file_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quota.redb");
        let good = {
            let store = Store::open(&path, || false).unwrap();
            let many: Vec<_> = (0..5000).map(|n| (format!("key {n}"), counts(&[(10, n)]))).collect();
            store.merge(&many).unwrap();
            drop(store);
            std::fs::read(&path).unwrap()
        };
        let mut scribbled = good.clone();
        scribbled[4096..].iter_mut().step_by(97).for_each(|byte| *byte ^= 0x55);
        for bad in [&b"no database"[..], &good[..good.len() / 2], &good[..100], &scribbled] {
            std::fs::write(&path, bad).unwrap();
            let store = Store::open(&path, || false).unwrap();
            assert!(store.get("key 1").is_none());
            store.merge(&[("a".into(), counts(&[(10, 1)]))]).unwrap();
            assert!(path.with_extension("redb.damaged").exists());
        }
    }
}
