//! The state directory: every file is written whole to a temporary name, synced and renamed, so that a kill at any point
//! leaves the old file or the new one.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

/// Says in which form the files of the directory are.
const FORMAT: &str = "format";
/// The form that this version writes. Files in JSON have a version of their own as well.
const VERSION: u32 = 1;

/// A problem with the state directory: which file, what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    // With its cause: logs say no more of an error than its own text.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("{path} is in use by another running node; give each node a --state directory of its own")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The process that is taken over has another one.
    #[error("{path} is not the state directory of the running process; a process that takes over has the same")]
    Another {
        /// The directory.
        path: PathBuf,
    },
    /// A newer version wrote it.
    #[error("{path} was written by a newer version of starling; use that version, or restore an older backup")]
    Newer {
        /// The file.
        path: PathBuf,
    },
    /// A file is not what it should be.
    #[error("{path} is damaged ({problem}); restore it from a backup, or remove it and join again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// A directory of small files that survive a crash. Made with mode 0700, its files with 0600.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

/// Holds the directory for one process; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct StateLock {
    file: File,
}

impl StateLock {
    /// The same lock, for another process: it holds until both have let go.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }
}

impl StateDir {
    /// Opens, and makes if need be.
    ///
    /// A directory that others may look into is closed to them: it holds keys. One that a newer version has written into is
    /// refused.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StateError> {
        let dir = Self { root: root.into() };
        dir.make_dir(&dir.root)?;
        if !dir.check_format()? {
            dir.keep_to_ourselves();
            dir.write(FORMAT, format!("{VERSION}\n").as_bytes())?;
        }
        dir.keep_to_ourselves();
        Ok(dir)
    }

    /// Opens one that is there, to read keys from it; changes nothing about it.
    pub fn existing(root: impl Into<PathBuf>) -> Result<Self, StateError> {
        let dir = Self { root: root.into() };
        fs::metadata(&dir.root).map_err(|source| StateError::Io { action: "open", path: dir.root.clone(), source })?;
        dir.check_format()?;
        Ok(dir)
    }

    /// Whether it says which form it has; an error if it is a later one.
    fn check_format(&self) -> Result<bool, StateError> {
        match self.read_text(FORMAT)?.map(|text| text.trim().parse::<u32>()) {
            None => Ok(false),
            Some(Ok(version)) if version <= VERSION => Ok(true),
            Some(Ok(_)) => Err(self.newer(FORMAT)),
            Some(Err(e)) => Err(self.damaged(FORMAT, e)),
        }
    }

    fn keep_to_ourselves(&self) {
        let path = self.root.display();
        let Ok(mode) = fs::metadata(&self.root).map(|metadata| metadata.permissions().mode() & 0o7777) else { return };
        // One that others share on purpose is theirs as well: a directory for temporary files, say.
        let shared = mode & 0o1000 != 0;
        if mode & 0o077 == 0 {
            return;
        }
        if shared {
            tracing::warn!(%path, "the state directory is shared with other users; give the node its own");
            return;
        }
        match fs::set_permissions(&self.root, fs::Permissions::from_mode(mode & 0o700)) {
            Ok(()) => tracing::warn!(%path, "the state directory was open to other users; it is not any more"),
            Err(error) => tracing::warn!(%path, %error, "other users can look into the state directory"),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Keeps other nodes out.
    pub fn lock(&self) -> Result<StateLock, StateError> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| StateError::Io { action: "open", path: path.clone(), source })?;
        match file.try_lock() {
            Ok(()) => Ok(StateLock { file }),
            Err(TryLockError::WouldBlock) => Err(StateError::InUse { path: self.root.clone() }),
            Err(TryLockError::Error(source)) => Err(StateError::Io { action: "lock", path, source }),
        }
    }

    /// The lock that another process shares with this one, if it is the one of this directory.
    pub(crate) fn shared_lock(&self, shared: OwnedFd) -> Result<StateLock, StateError> {
        use std::os::unix::fs::MetadataExt;
        let (file, path) = (File::from(shared), self.root.join("lock"));
        let io = |source| StateError::Io { action: "look at", path: path.clone(), source };
        let [there, here] = [file.metadata().map_err(io)?, fs::metadata(&path).map_err(io)?];
        match (there.dev(), there.ino()) == (here.dev(), here.ino()) {
            true => Ok(StateLock { file }),
            false => Err(StateError::Another { path: self.root.clone() }),
        }
    }

    /// Whether the file is there.
    pub fn has(&self, name: &str) -> bool {
        self.root.join(name).exists()
    }

    /// The file's bytes; `None` if it is not there.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.root.join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateError::Io { action: "read", path, source }),
        }
    }

    /// The file as text; `None` if it is not there.
    pub fn read_text(&self, name: &str) -> Result<Option<String>, StateError> {
        self.read(name)?.map(|bytes| String::from_utf8(bytes).map_err(|_| self.damaged(name, "not text"))).transpose()
    }

    /// Replaces the file as a whole.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.root.join(name);
        let dir = path.parent().unwrap_or(&self.root).to_path_buf();
        self.make_dir(&dir)?;
        let io = |action, source| StateError::Io { action, path: path.clone(), source };
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(fs::Permissions::from_mode(0o600))
            .tempfile_in(&dir)
            .map_err(|e| io("create a file beside", e))?;
        file.write_all(bytes).map_err(|e| io("write", e))?;
        file.as_file().sync_all().map_err(|e| io("sync", e))?;
        file.persist(&path).map_err(|e| io("replace", e.error))?;
        // The rename is durable only once the directory is.
        File::open(&dir).and_then(|d| d.sync_all()).map_err(|e| io("sync the directory of", e))
    }

    /// Replaces the file, or says in the log why not: a full disk must not take a running node out of the mesh, which serves
    /// from memory.
    pub fn keep(&self, name: &str, bytes: &[u8]) {
        if let Err(error) = self.write(name, bytes) {
            tracing::error!(%error, "cannot store {name}");
        }
    }

    /// An error about a file of a later version.
    pub fn newer(&self, name: &str) -> StateError {
        StateError::Newer { path: self.root.join(name) }
    }

    /// An error about the file's content.
    pub fn damaged(&self, name: &str, problem: impl ToString) -> StateError {
        StateError::Damaged { path: self.root.join(name), problem: problem.to_string() }
    }

    fn make_dir(&self, path: &Path) -> Result<(), StateError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| StateError::Io {
            action: "create",
            path: path.to_path_buf(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_private_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path().join("s")).unwrap();
        assert_eq!(state.read("identity/key").unwrap(), None);
        state.write("identity/key", b"one").unwrap();
        state.write("identity/key", b"two").unwrap();
        assert_eq!(state.read("identity/key").unwrap().unwrap(), b"two");
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.path().join("identity/key")), 0o600);
        assert_eq!(mode(&state.path().join("identity")), 0o700);
        assert_eq!(fs::read_dir(state.path().join("identity")).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let lock = state.lock().unwrap();
        assert!(matches!(state.lock(), Err(StateError::InUse { .. })));
        drop(lock);
        state.lock().unwrap();
    }
}
