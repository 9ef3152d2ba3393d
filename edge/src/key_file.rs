//! The keys of an edge: its own on disk, `keys.json` in its state directory, shared with `starling keys`; and those that are
//! published for all edges.

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
    name: &'static str,
    current: ArcSwap<KeyStore>,
    /// Those for all edges.
    published: ArcSwap<KeyStore>,
    /// One change at a time: read, change, store, publish.
    changing: Mutex<()>,
}

impl KeyFile {
    pub(crate) const NAME: &str = "keys.json";

    /// The mesh document of the keys that hold on all edges.
    pub const DOCUMENT: &str = "keys";
    /// What is published, beside the admin key that signs it.
    const PUBLISHED: &str = "published-keys.json";

    /// Reads an edge's file; none is an empty one.
    pub fn open(state: StateDir) -> Result<Self, KeyError> {
        Self::read(state, Self::NAME)
    }

    /// Reads the keys for all edges, in the directory from which they are published; a document is made of them by
    /// [`KeyFile::document`].
    pub fn open_published(state: StateDir) -> Result<Self, KeyError> {
        Self::read(state, Self::PUBLISHED)
    }

    fn read(state: StateDir, name: &'static str) -> Result<Self, KeyError> {
        let current = ArcSwap::from_pointee(read(&state, name)?);
        Ok(Self { state, name, current, published: ArcSwap::default(), changing: Mutex::new(()) })
    }

    /// The document that has these keys, without their secrets.
    pub fn document(&self) -> Result<Vec<u8>, KeyError> {
        let document = serde_json::to_vec(&**self.current.load());
        document.map_err(|e| self.state.damaged(self.name, e).into())
    }

    /// Takes the keys for all edges from their document; without one there are none.
    pub(crate) fn publish(&self, document: Option<&[u8]>) -> Result<(), String> {
        let keys = document.map(KeyStore::parse).transpose().map_err(|e| e.to_string())?;
        self.published.store(Arc::new(keys.unwrap_or_default()));
        Ok(())
    }

    /// The key that a caller presents, if there is such a one: of this edge, or of all.
    pub(crate) fn verify(&self, presented: &str) -> Option<StoredKey> {
        let own = self.current.load().verify(presented).cloned();
        let published = self.published.load().verify(presented).cloned();
        own.or(published)
    }

    /// Reads the file again; on an error the keys in memory stay.
    pub fn reload(&self) -> Result<(), KeyError> {
        let fresh = read(&self.state, self.name)?;
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

    /// All keys, without their secrets; an edge's own, and then those for all edges.
    pub fn list(&self) -> Vec<Key> {
        let published = self.published.load();
        let of_all = published.keys().iter().map(|stored| Key { published: true, ..shown(stored) });
        self.current.load().keys().iter().map(shown).chain(of_all).collect()
    }

    /// Revokes a key, at once; `false` if there is none of that id.
    pub fn revoke(&self, id: &str) -> Result<bool, KeyError> {
        self.change(|keys| keys.revoke(id))
    }

    fn change<T>(&self, change: impl FnOnce(&mut KeyStore) -> T) -> Result<T, KeyError> {
        let _one = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        // From disk, not from memory: the command line may have changed it meanwhile.
        let mut keys = read(&self.state, self.name)?;
        let outcome = change(&mut keys);
        let bytes = keys.serialize().map_err(|e| self.state.damaged(self.name, e))?;
        self.state.write(self.name, &bytes)?;
        self.current.store(Arc::new(keys));
        Ok(outcome)
    }
}

fn read(state: &StateDir, name: &str) -> Result<KeyStore, KeyError> {
    match state.read(name)? {
        Some(bytes) => Ok(KeyStore::parse(&bytes).map_err(|e| match e {
            ParseError::Newer => state.newer(name),
            ParseError::Json(_) => state.damaged(name, e),
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
        published: false,
        key: None,
    }
}
