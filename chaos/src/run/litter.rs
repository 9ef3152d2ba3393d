//! The directory of a run, and what a runner that was killed has left behind.
//!
//! Processes end with their runner, by the kernel's hand; packets have nobody to carry them. What stays is a directory, whose
//! lock shows that nobody is using it any more.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

const PREFIX: &str = "starling-chaos-";
const LOCK: &str = "in-use";

/// The directory of a run. It goes when dropped, unless it is to be kept.
pub(super) struct Dir {
    temporary: Option<tempfile::TempDir>,
    kept: Option<PathBuf>,
    _lock: File,
}

impl Dir {
    /// A new one, in the system's place for such, or `keep`.
    pub(super) fn new(keep: Option<PathBuf>) -> Result<Self> {
        let temporary = match &keep {
            Some(path) => {
                // Of an earlier run of the same name: its state is another mesh's.
                let _ = std::fs::remove_dir_all(path);
                std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
                None
            }
            None => Some(tempfile::Builder::new().prefix(PREFIX).tempdir()?),
        };
        let path = keep.as_deref().or_else(|| temporary.as_ref().map(|dir| dir.path())).unwrap_or(Path::new("."));
        let lock = File::create(path.join(LOCK))?;
        lock.lock()?;
        Ok(Self { temporary, kept: keep, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        match (&self.temporary, &self.kept) {
            (Some(dir), _) => dir.path(),
            (None, Some(path)) => path,
            (None, None) => Path::new("."),
        }
    }
}

/// Removes the directories of runners that are no more. Returns them.
pub fn sweep() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return Vec::new() };
    let ours = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX)));
    ours.filter(|path| is_abandoned(path) && std::fs::remove_dir_all(path).is_ok()).collect()
}

fn is_abandoned(dir: &Path) -> bool {
    match File::open(dir.join(LOCK)) {
        Ok(lock) => !matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}
