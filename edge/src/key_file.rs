//! The keys of an edge on disk: `keys.json` in its state directory, shared with `starling keys`.

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use starling_node::{StateDir, StateError, rfc3339, unix_now};
use starling_protocol::admin::{Key, NewKey};

use crate::api_key::{Consumer, KeyStore, ParseError, StoredKey};

/// Why keys cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The request.
    #[error("{0}")]
    Invalid(String),
    /// The file.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Keys in memory as on disk.
pub struct KeyFile {
    state: StateDir,
    current: ArcSwap<KeyStore>,
    /// One change at a time: read, change, store, publish.
    changing: Mutex<()>,
}

impl KeyFile {
    pub(crate) const NAME: &str = "keys.json";

    /// Reads the file; none is an empty one.
    pub fn open(state: StateDir) -> Result<Self, KeyError> {
        let current = ArcSwap::from_pointee(read(&state)?);
        Ok(Self { state, current, changing: Mutex::new(()) })
    }

    /// Reads the file again; on an error the keys in memory stay.
    pub fn reload(&self) -> Result<(), KeyError> {
        let fresh = read(&self.state)?;
        if fresh != **self.current.load() {
            self.current.store(Arc::new(fresh));
        }
        Ok(())
    }

    /// Makes a key; the answer is the only place where it is ever shown.
    pub fn create(&self, new: NewKey) -> Result<Key, KeyError> {
        let consumer: Consumer = new.consumer.parse().map_err(KeyError::Invalid)?;
        let (stored, key) = self.change(|keys| keys.create(consumer, new.plan, unix_now()))?;
        Ok(Key { key: Some(key), ..shown(&stored) })
    }

    /// All keys, without their secrets.
    pub fn list(&self) -> Vec<Key> {
        self.current.load().keys().iter().map(shown).collect()
    }

    /// Revokes a key, at once; `false` if there is none of that id.
    pub fn revoke(&self, id: &str) -> Result<bool, KeyError> {
        self.change(|keys| keys.revoke(id))
    }

    pub(crate) fn current(&self) -> Arc<KeyStore> {
        self.current.load_full()
    }

    fn change<T>(&self, change: impl FnOnce(&mut KeyStore) -> T) -> Result<T, KeyError> {
        let _one = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        // From disk, not from memory: the command line may have changed it meanwhile.
        let mut keys = read(&self.state)?;
        let outcome = change(&mut keys);
        let bytes = keys.serialize().map_err(|e| self.state.damaged(Self::NAME, e))?;
        self.state.write(Self::NAME, &bytes)?;
        self.current.store(Arc::new(keys));
        Ok(outcome)
    }
}

fn read(state: &StateDir) -> Result<KeyStore, KeyError> {
    match state.read(KeyFile::NAME)? {
        Some(bytes) => Ok(KeyStore::parse(&bytes).map_err(|e| match e {
            ParseError::Newer => state.newer(KeyFile::NAME),
            ParseError::Json(_) => state.damaged(KeyFile::NAME, e),
        })?),
        None => Ok(KeyStore::default()),
    }
}

fn shown(stored: &StoredKey) -> Key {
    Key {
        id: stored.id.to_string(),
        consumer: stored.consumer.to_string(),
        plan: stored.plan.clone(),
        created: rfc3339(stored.created),
        key: None,
    }
}
