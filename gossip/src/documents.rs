//! The newest verified edition of each mesh document.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use starling_protocol::{DocumentEdition, DocumentHash, MAX_DOCUMENTS, MeshDocument, Name, SignedDocument};

/// How far a version may be ahead of the one before: a slip of the hand must not use up all numbers.
pub const MAX_LEAP: u64 = 1 << 20;

/// Why a document is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// Its signature, its certificate or its form.
    #[error("{0}")]
    Unverified(String),
    /// An edition that this node is past.
    #[error("{kind} version {version} is behind version {floor}, which this node has or had")]
    Rollback {
        /// Which document.
        kind: Name,
        /// The version refused.
        version: u64,
        /// The lowest that is taken.
        floor: u64,
    },
    /// A version far ahead of the one before.
    #[error("{kind} version {version} leaps over too many versions from {from}")]
    Leap {
        /// Which document.
        kind: Name,
        /// The version refused.
        version: u64,
        /// The present one.
        from: u64,
    },
    /// Its time is over. Only whoever publishes is told so; other nodes keep such a document, so that all have the same set.
    #[error("{kind} version {version} has expired")]
    Expired {
        /// Which document.
        kind: Name,
        /// The version refused.
        version: u64,
    },
    /// Another one of that version is there, and goes before it.
    #[error("another edition of {kind} version {version} is there already: look at it, and publish again")]
    Twin {
        /// Which document.
        kind: Name,
        /// The version of both.
        version: u64,
    },
    /// More kinds than a mesh may have.
    #[error("there are {MAX_DOCUMENTS} kinds of documents already")]
    TooMany,
}

/// A verified document.
#[derive(Debug, Clone)]
pub struct DocumentView {
    /// What it says.
    pub document: Arc<MeshDocument>,
    /// The bytes, to store or to pass on.
    pub signed: Arc<SignedDocument>,
    /// Of its body.
    pub hash: DocumentHash,
}

impl DocumentView {
    /// Which edition it is.
    pub fn edition(&self) -> DocumentEdition {
        DocumentEdition { kind: self.document.kind.clone(), version: self.document.version, hash: self.hash }
    }
}

/// Documents by kind, and the version that each kind must not fall behind.
#[derive(Debug, Default)]
pub(crate) struct Documents {
    by_kind: BTreeMap<Name, DocumentView>,
    floors: HashMap<Name, u64>,
    root: u64,
}

impl Documents {
    /// With the versions that this node had reached in its former life.
    pub(crate) fn with_floors(floors: HashMap<Name, u64>) -> Self {
        Self { floors, ..Self::default() }
    }

    pub(crate) fn get(&self, kind: &Name) -> Option<&DocumentView> {
        self.by_kind.get(kind)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &DocumentView> {
        self.by_kind.values()
    }

    /// Whether the edition is the one that is stored.
    pub(crate) fn has(&self, edition: &DocumentEdition) -> bool {
        self.by_kind.get(&edition.kind).is_some_and(|held| held.hash == edition.hash)
    }

    /// Whether that edition is older than the stored one.
    pub(crate) fn is_behind(&self, edition: &DocumentEdition) -> bool {
        let older = |held: &DocumentView| (edition.version, edition.hash) < (held.document.version, held.hash);
        self.by_kind.get(&edition.kind).is_some_and(older)
    }

    /// Whether that edition would replace the stored one, as far as order goes: (version, hash).
    pub(crate) fn is_news(&self, edition: &DocumentEdition) -> bool {
        let newer = |held: &DocumentView| (edition.version, edition.hash) > (held.document.version, held.hash);
        self.by_kind.get(&edition.kind).is_none_or(newer)
    }

    /// Whether the document, which is verified and news, may be taken. Whether its time has come or is over is another
    /// question: nodes that disagree about what is there would never stop comparing.
    pub(crate) fn admits(&self, document: &MeshDocument) -> Result<(), DocumentError> {
        let (kind, version) = (document.kind.clone(), document.version);
        let floor = self.floors.get(&kind).copied().unwrap_or(0);
        if version < floor {
            return Err(DocumentError::Rollback { kind, version, floor });
        }
        if floor > 0 && version > floor.saturating_add(MAX_LEAP) {
            return Err(DocumentError::Leap { kind, version, from: floor });
        }
        if !self.by_kind.contains_key(&kind) && self.by_kind.len() >= MAX_DOCUMENTS {
            return Err(DocumentError::TooMany);
        }
        Ok(())
    }

    /// Stores; the caller has asked [`Documents::admits`].
    pub(crate) fn put(&mut self, document: MeshDocument, signed: Arc<SignedDocument>) -> DocumentView {
        let floor = self.floors.entry(document.kind.clone()).or_default();
        *floor = document.version.max(*floor);
        let hash = signed.hash();
        let view = DocumentView { document: Arc::new(document), signed, hash };
        self.root ^= view.edition().hash();
        if let Some(old) = self.by_kind.insert(view.document.kind.clone(), view.clone()) {
            self.root ^= old.edition().hash();
        }
        view
    }

    /// Hash of all editions; the same for the same set.
    pub(crate) fn root(&self) -> u64 {
        self.root
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(version: u64) -> (MeshDocument, SignedDocument) {
        let document = MeshDocument {
            kind: "policy".parse().unwrap(),
            version,
            previous: DocumentHash::default(),
            not_before: 0,
            expires: Some(1000),
            deleted: false,
            content: vec![version as u8].into(),
            understood: true,
        };
        let body = SignedDocument::encode_body(&document);
        (document, SignedDocument { body, signature: Default::default(), certificate: Default::default() })
    }

    fn taken(documents: &mut Documents, version: u64) -> Result<bool, DocumentError> {
        let (document, signed) = document(version);
        let edition = DocumentEdition { kind: document.kind.clone(), version, hash: signed.hash() };
        if !documents.is_news(&edition) {
            return Ok(false);
        }
        documents.admits(&document)?;
        documents.put(document, Arc::new(signed));
        Ok(true)
    }

    #[test]
    fn versions_only_go_up_and_do_not_leap() {
        let mut documents = Documents::default();
        assert_eq!(taken(&mut documents, 5), Ok(true));
        assert_eq!(taken(&mut documents, 5), Ok(false));
        assert_eq!(taken(&mut documents, 4), Ok(false));
        assert!(matches!(taken(&mut documents, 5 + MAX_LEAP + 1), Err(DocumentError::Leap { .. })));
        assert_eq!(taken(&mut documents, 6), Ok(true));
    }

    #[test]
    fn a_restart_does_not_forget_the_floor() {
        let mut documents = Documents::with_floors(HashMap::from([("policy".parse().unwrap(), 7)]));
        assert!(matches!(taken(&mut documents, 6), Err(DocumentError::Rollback { floor: 7, .. })));
        assert_eq!(taken(&mut documents, 7), Ok(true));
    }

    #[test]
    fn the_root_depends_on_the_set_alone() {
        let (mut one, mut other) = (Documents::default(), Documents::default());
        for version in 1..5 {
            taken(&mut one, version).unwrap();
        }
        taken(&mut other, 4).unwrap();
        assert_eq!(one.root(), other.root());
        taken(&mut other, 5).unwrap();
        assert_ne!(one.root(), other.root());
    }
}
