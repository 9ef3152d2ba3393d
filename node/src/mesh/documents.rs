//! Mesh documents on this node: kept on disk, in force or not, and given to whoever reads them.
//!
//! Gossip brings a verified edition; here it is stored, read by everybody who follows its kind, and comes into force if
//! they all understand it. For a while after that it is on trial: should the process die, the next start leaves that
//! edition alone and goes back to the one before.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use starling_gossip::{DocumentError, DocumentView, Durable, GossipHandle};
use starling_protocol::{
    DocumentEdition, DocumentHash, DocumentSight, DocumentState, Floor, MeshDocument, Name, SignedDocument,
};
use tokio::sync::watch;

use crate::{
    identity::unix_now,
    state::{StateDir, StateError},
};

/// How long an edition is on trial after it came into force.
const TRIAL: Duration = Duration::from_secs(30);
/// Deaths on the trial of an edition that are blamed on it: one can have any cause.
const DEATHS: u32 = 2;
/// Kinds that say what is forbidden. They are never left alone: without them, more would be allowed.
const FAIL_CLOSED: [&str; 4] = ["keys", "policy", "revocations", "trust"];
/// How often the clock is looked at, for editions whose time comes or ends.
const LOOK: Duration = Duration::from_secs(1);
/// What is known of documents beside their bytes.
const INDEX: &str = "documents/index.json";
const INDEX_VERSION: u32 = 1;

/// Reads the content of one kind: `None` if there is no such document. An error keeps the edition out of force.
type Reader = Box<dyn Fn(Option<&[u8]>) -> Result<(), String> + Send>;

/// The documents of a node. Cheap to clone.
#[derive(Clone)]
pub struct Documents(Arc<DocumentsState>);

struct DocumentsState {
    state: StateDir,
    table: Mutex<Table>,
    /// A copy for those who must not wait while the table is being stored.
    sights: Mutex<Vec<DocumentSight>>,
    /// Whether what was kept has been looked at.
    looked: watch::Sender<bool>,
}

#[derive(Default)]
struct Table {
    kinds: BTreeMap<Name, Kind>,
    readers: HashMap<Name, Vec<Reader>>,
    index: Index,
}

struct Kind {
    newest: DocumentView,
    state: DocumentState,
    in_force: Option<Arc<MeshDocument>>,
    /// Of the edition in force, which need not be the newest.
    trial: Option<Trial>,
    /// The edition that stood its trial last.
    good: Option<DocumentHash>,
}

struct Trial {
    until: Instant,
    signed: Arc<SignedDocument>,
    hash: DocumentHash,
}

/// On disk: which versions are too old, which editions are left alone, which are on trial.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
struct Index {
    version: u32,
    floors: BTreeMap<Name, u64>,
    quarantined: BTreeSet<String>,
    on_trial: BTreeMap<Name, String>,
    /// How often the process has died on the trial of an edition, by hash.
    #[serde(default)]
    deaths: BTreeMap<String, u32>,
}

/// What a node has kept: the newest editions, for gossip, and the versions below which it takes nothing.
pub(crate) struct Kept {
    pub(crate) newest: Vec<Arc<SignedDocument>>,
    pub(crate) floors: HashMap<Name, u64>,
}

impl Index {
    fn read(state: &StateDir) -> Result<Self, StateError> {
        let index: Self = match state.read(INDEX)? {
            // Going on without it would undo the protection from old editions: a person has to decide that.
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| state.damaged(INDEX, e))?,
            None => Self { version: INDEX_VERSION, ..Self::default() },
        };
        if index.version > INDEX_VERSION {
            return Err(state.newer(INDEX));
        }
        Ok(index)
    }
}

/// Stores versions that the mesh has reached, as a node that comes in is told: it takes none that is older. One that is too high
/// to be true is left out, or the node would take nothing at all.
pub(crate) fn keep_floors(state: &StateDir, floors: &[Floor]) -> Result<(), StateError> {
    const TOO_HIGH: u64 = 1 << 32;
    let mut index = Index::read(state)?;
    for Floor { kind, version } in floors.iter().filter(|floor| floor.version < TOO_HIGH) {
        let floor = index.floors.entry(kind.clone()).or_default();
        *floor = (*floor).max(*version);
    }
    state.write(INDEX, &serde_json::to_vec_pretty(&index).expect("names and numbers are JSON"))
}

impl Documents {
    /// Reads the state directory. What was on trial when the process died is quarantined.
    pub(crate) fn open(state: &StateDir) -> Result<(Self, Kept), StateError> {
        let mut index = Index::read(state)?;
        for (kind, hash) in std::mem::take(&mut index.on_trial) {
            if FAIL_CLOSED.contains(&kind.as_str()) {
                // Whoever can make a node die must not be able to make it forget what it must refuse.
                continue;
            }
            let deaths = index.deaths.entry(hash.clone()).or_default();
            *deaths += 1;
            if *deaths < DEATHS {
                tracing::warn!(%kind, hash, "the node died soon after this document came into force; once more, and it is quarantined");
                continue;
            }
            tracing::error!(%kind, hash, "the node died twice soon after this document came into force; it is quarantined");
            index.deaths.remove(&hash);
            index.quarantined.insert(hash);
        }
        let read = |name: String| -> Option<Arc<SignedDocument>> {
            let bytes = state.read(&name).ok().flatten()?;
            starling_protocol::decode(&bytes).map(Arc::new).ok()
        };
        let newest = index.floors.keys().filter_map(|kind| read(newest_file(kind))).collect();
        let floors = index.floors.iter().map(|(kind, version)| (kind.clone(), *version)).collect();
        let documents = Self(Arc::new(DocumentsState {
            state: state.clone(),
            table: Mutex::default(),
            sights: Mutex::default(),
            looked: watch::Sender::default(),
        }));
        documents.store_index(&index);
        documents.table().index = index;
        Ok((documents, Kept { newest, floors }))
    }

    /// Follows the document of a kind: `read` acts upon its content, and upon its end (`None`): when it was deleted, or its time is
    /// over. An edition that `read` refuses, or in which it panics, does not come into force: it is given the one before again.
    pub fn follow(&self, kind: Name, read: impl Fn(Option<&[u8]>) -> Result<(), String> + Send + 'static) {
        let reader: Reader = Box::new(move |content| {
            catch_unwind(AssertUnwindSafe(|| read(content))).unwrap_or_else(|_| Err("its reader panicked".into()))
        });
        let mut table = self.table();
        let Table { kinds, readers, index } = &mut *table;
        if let Some(known) = kinds.get_mut(&kind)
            && let Some(document) = known.in_force.clone()
            && let Err(error) = reader(Some(&document.content))
        {
            // It came before anybody could say so.
            tracing::error!(%kind, version = document.version, error, "a document is not understood");
            known.state = DocumentState::Refused;
            known.trial = None;
            index.on_trial.remove(&kind);
            self.store_index(index);
            let good = self.last_good(&kind).filter(|(_, hash)| *hash != known.newest.hash);
            known.in_force = good.map(|(document, _)| document);
            give(std::slice::from_ref(&reader), known.in_force.as_ref().map(|document| &document.content[..]));
        }
        readers.entry(kind).or_default().push(reader);
    }

    /// Has the newest edition of a kind read again if it was refused: whoever follows it may understand it now. That takes a second.
    pub fn read_again(&self, kind: &Name) {
        if let Some(known) = self.table().kinds.get_mut(kind).filter(|known| known.state == DocumentState::Refused) {
            known.state = DocumentState::Pending;
        }
    }

    /// Waits until what was kept from the life before has been looked at.
    pub async fn looked_at(&self) {
        // The sender lives as long as this.
        let _ = self.0.looked.subscribe().wait_for(|looked| *looked).await;
    }

    /// Which edition of each kind this node has, and what it does with it.
    pub fn sights(&self) -> Vec<DocumentSight> {
        self.0.sights.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Takes what gossip brings, for as long as the node runs.
    pub(crate) async fn run(self, mut durable: watch::Receiver<Durable>) {
        loop {
            let brought = durable.borrow_and_update().documents.clone();
            let documents = self.clone();
            // Reading and storing may take a while, and this thread must answer probes.
            let done = tokio::task::spawn_blocking(move || documents.take(brought.into_values(), unix_now())).await;
            if let Err(error) = done {
                tracing::error!(%error, "mesh documents");
            }
            self.0.looked.send_replace(true);
            if let Ok(Err(_)) = tokio::time::timeout(LOOK, durable.changed()).await {
                return;
            }
        }
    }

    /// The process ends as it should: nothing that is on trial is to blame.
    pub(crate) fn acquit(&self) {
        let mut table = self.table();
        table.index.on_trial.clear();
        self.store_index(&table.index);
    }

    fn take(&self, brought: impl Iterator<Item = DocumentView>, now: u64) {
        let mut table = self.table();
        let table = &mut *table;
        let before = table.index.clone();
        for view in brought {
            let kind = view.document.kind.clone();
            if table.kinds.get(&kind).is_none_or(|known| known.newest.hash != view.hash) {
                self.store(&newest_file(&kind), &view.signed);
                let floor = table.index.floors.entry(kind.clone()).or_default();
                *floor = view.document.version.max(*floor);
                let (in_force, trial, good) = match table.kinds.remove(&kind) {
                    Some(known) => (known.in_force, known.trial, known.good),
                    None => {
                        let good = self.last_good(&kind);
                        let hash = good.as_ref().map(|(_, hash)| *hash);
                        // The newest is judged below; until then, and if it does not come into force, the last good one holds.
                        let document = &view.document;
                        let is_over = document.deleted || document.expires.is_some_and(|expires| expires <= now);
                        let old = good.filter(|(_, hash)| *hash != view.hash && !is_over).map(|(document, _)| document);
                        let readers = table.readers.get(&kind).map_or(&[][..], Vec::as_slice);
                        if let Some(old) = &old {
                            give(readers, Some(&old.content));
                        }
                        (old, None, hash)
                    }
                };
                let state = DocumentState::Pending;
                table.kinds.insert(kind, Kind { newest: view, state, in_force, trial, good });
            }
        }
        // The floor must be on disk before the edition has any effect.
        if table.index != before {
            self.store_index(&table.index);
        }
        let names: Vec<Name> = table.kinds.keys().cloned().collect();
        names.iter().for_each(|name| self.judge(table, name, now));
        let sight = |k: &Kind| DocumentSight { edition: k.newest.edition(), state: k.state };
        *self.0.sights.lock().unwrap_or_else(|e| e.into_inner()) = table.kinds.values().map(sight).collect();
    }

    /// Decides what to do with the newest edition of a kind.
    fn judge(&self, table: &mut Table, name: &Name, now: u64) {
        let Some(kind) = table.kinds.get_mut(name) else { return };
        let document = kind.newest.document.clone();
        let hash = kind.newest.hash;
        if let Some(trial) = kind.trial.take_if(|trial| Instant::now() >= trial.until) {
            self.store(&good_file(name), &trial.signed);
            kind.good = Some(trial.hash);
            table.index.on_trial.remove(name);
            table.index.deaths.remove(&trial.hash.to_string());
            self.store_index(&table.index);
        }
        let readers = table.readers.get(name).map_or(&[][..], Vec::as_slice);
        if kind.in_force.take_if(|old| old.expires.is_some_and(|expires| expires <= now)).is_some() {
            give(readers, None);
        }
        let next = if table.index.quarantined.contains(&hash.to_string()) {
            DocumentState::Quarantined
        } else if !document.understood {
            // Of a later version: kept and passed on, and the one before stays in force.
            DocumentState::Refused
        } else if document.deleted {
            DocumentState::Deleted
        } else if document.not_before > now {
            DocumentState::Pending
        } else if document.expires.is_some_and(|expires| expires <= now) {
            DocumentState::Expired
        } else {
            DocumentState::Active
        };
        match next {
            DocumentState::Active if kind.state == DocumentState::Active || kind.state == DocumentState::Refused => {
                return;
            }
            DocumentState::Active => {
                // What has stood its trial once is not tried again at each start.
                let tried = kind.good == Some(hash);
                if !tried {
                    table.index.on_trial.insert(name.clone(), hash.to_string());
                    self.store_index(&table.index);
                }
                match readers.iter().try_for_each(|read| read(Some(&document.content[..]))) {
                    Ok(()) => {
                        kind.in_force = Some(document.clone());
                        let (until, signed) = (Instant::now() + TRIAL, kind.newest.signed.clone());
                        kind.trial = (!tried).then_some(Trial { until, signed, hash });
                    }
                    Err(error) => {
                        tracing::error!(kind = %name, version = document.version, error, "a document is not understood");
                        kind.state = DocumentState::Refused;
                        // Those that had read it already go back to what was in force.
                        let old = kind.in_force.as_ref().map(|d| &d.content[..]);
                        give(readers, old);
                        match &kind.trial {
                            // The edition in force is still on its own.
                            Some(trial) => table.index.on_trial.insert(name.clone(), trial.hash.to_string()),
                            None => table.index.on_trial.remove(name),
                        };
                        self.store_index(&table.index);
                        return;
                    }
                }
            }
            DocumentState::Deleted | DocumentState::Expired if kind.in_force.take().is_some() => {
                give(readers, None);
            }
            _ => {}
        }
        if kind.state != next {
            tracing::info!(kind = %name, version = document.version, %hash, "document {next:?}");
        }
        kind.state = next;
    }

    /// The edition that stood its trial last.
    fn last_good(&self, kind: &Name) -> Option<(Arc<MeshDocument>, DocumentHash)> {
        let bytes = self.0.state.read(&good_file(kind)).ok().flatten()?;
        // Verified when it came; the directory is this node's own.
        let signed: SignedDocument = starling_protocol::decode(&bytes).ok()?;
        let document = signed.peek().ok().filter(|document| !document.deleted)?;
        Some((Arc::new(document), signed.hash()))
    }

    fn store(&self, name: &str, signed: &SignedDocument) {
        self.0.state.keep(name, &starling_protocol::encode(signed));
    }

    fn store_index(&self, index: &Index) {
        let bytes = serde_json::to_vec_pretty(index).expect("names and numbers are JSON");
        self.0.state.keep(INDEX, &bytes);
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Gives readers what they have understood before, or nothing: there is no error to expect.
fn give(readers: &[Reader], content: Option<&[u8]>) {
    for read in readers {
        if let Err(error) = read(content) {
            tracing::error!(error, "a document that was understood is not any more");
        }
    }
}

/// Sends a signed document to the mesh from this node.
pub(crate) async fn publish(gossip: &GossipHandle, signed: SignedDocument) -> Result<DocumentEdition, DocumentError> {
    let claimed = signed.peek().map_err(|e| DocumentError::Unverified(e.to_string()))?;
    let edition = DocumentEdition { kind: claimed.kind, version: claimed.version, hash: signed.hash() };
    match gossip.publish(signed).await {
        Some(outcome) => outcome.map(|()| edition),
        None => Err(DocumentError::Unverified("the node is going away".into())),
    }
}

fn newest_file(kind: &Name) -> String {
    format!("documents/{kind}.newest")
}

fn good_file(kind: &Name) -> String {
    format!("documents/{kind}.good")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(version: u64, content: &[u8], deleted: bool) -> DocumentView {
        let document = MeshDocument {
            kind: "plans".parse().unwrap(),
            version,
            previous: DocumentHash::default(),
            not_before: 100,
            expires: Some(200),
            deleted,
            content: content.to_vec().into(),
            understood: true,
        };
        let body = SignedDocument::encode_body(&document);
        let signed = SignedDocument { body, signature: Default::default(), certificate: Default::default() };
        DocumentView { document: Arc::new(document), hash: signed.hash(), signed: Arc::new(signed) }
    }

    /// Follows a number.
    fn follow(documents: &Documents) -> watch::Receiver<Option<u32>> {
        let (publish, value) = watch::channel(None);
        documents.follow("plans".parse().unwrap(), move |content| {
            publish.send_replace(content.map(number).transpose()?);
            Ok(())
        });
        value
    }

    fn number(bytes: &[u8]) -> Result<u32, String> {
        assert_ne!(bytes, b"bomb");
        std::str::from_utf8(bytes).ok().and_then(|t| t.parse().ok()).ok_or_else(|| "not a number".into())
    }

    fn state_of(documents: &Documents) -> DocumentState {
        documents.sights()[0].state
    }

    #[test]
    fn editions_come_into_force_when_they_are_understood_and_their_time_has_come() {
        let dir = tempfile::tempdir().unwrap();
        let (documents, _) = Documents::open(&StateDir::open(dir.path()).unwrap()).unwrap();
        let value = follow(&documents);
        let read = || *value.borrow();
        documents.take([view(1, b"7", false)].into_iter(), 99);
        assert_eq!((state_of(&documents), read()), (DocumentState::Pending, None));
        documents.take([].into_iter(), 100);
        assert_eq!((state_of(&documents), read()), (DocumentState::Active, Some(7)));
        for (version, bad) in [(2, &b"seven"[..]), (3, b"bomb")] {
            documents.take([view(version, bad, false)].into_iter(), 100);
            assert_eq!((state_of(&documents), read()), (DocumentState::Refused, Some(7)));
        }
        documents.take([view(4, b"8", false)].into_iter(), 100);
        assert_eq!((state_of(&documents), read()), (DocumentState::Active, Some(8)));
        documents.take([].into_iter(), 200);
        assert_eq!((state_of(&documents), read()), (DocumentState::Expired, None));
        documents.take([view(5, b"", true)].into_iter(), 150);
        assert_eq!((state_of(&documents), read()), (DocumentState::Deleted, None));
    }

    #[test]
    fn an_edition_that_was_refused_is_read_again_when_its_reader_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let (documents, _) = Documents::open(&StateDir::open(dir.path()).unwrap()).unwrap();
        let (allows, allowed) = watch::channel(1);
        let (publish, value) = watch::channel(None);
        let plans: Name = "plans".parse().unwrap();
        documents.follow(plans.clone(), move |content| {
            let read = content.map(number).transpose()?;
            if read.is_some_and(|read| read > *allowed.borrow()) {
                return Err("too much".into());
            }
            publish.send_replace(read);
            Ok(())
        });
        let take = |views: Vec<DocumentView>| {
            documents.take(views.into_iter(), 100);
            (state_of(&documents), *value.borrow())
        };
        assert_eq!(take(vec![view(1, b"1", false)]), (DocumentState::Active, Some(1)));
        assert_eq!(take(vec![view(2, b"2", false)]), (DocumentState::Refused, Some(1)));
        documents.read_again(&plans);
        assert_eq!(take(vec![]), (DocumentState::Refused, Some(1)));
        allows.send_replace(2);
        assert_eq!(take(vec![]), (DocumentState::Refused, Some(1)));
        documents.read_again(&plans);
        assert_eq!(take(vec![]), (DocumentState::Active, Some(2)));
        documents.read_again(&plans);
        assert_eq!(take(vec![]), (DocumentState::Active, Some(2)));
    }

    #[test]
    fn an_edition_on_whose_trial_the_process_died_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let (first_life, _) = Documents::open(&state).unwrap();
        first_life.take([view(1, b"1", false)].into_iter(), 150);
        let over = |k: &mut Kind| k.trial.iter_mut().for_each(|trial| trial.until = Instant::now());
        first_life.table().kinds.values_mut().for_each(over);
        first_life.take([].into_iter(), 150);
        first_life.take([view(2, b"2", false)].into_iter(), 150);
        assert_eq!(state_of(&first_life), DocumentState::Active);
        // A later edition that is not yet in force does not end the trial of the one that is.
        let mut later = view(3, b"9", false);
        Arc::get_mut(&mut later.document).unwrap().not_before = 170;
        first_life.take([later].into_iter(), 150);
        assert!(first_life.table().kinds.values().all(|k| k.trial.is_some()));
        assert_eq!(first_life.table().index.on_trial.len(), 1);
        drop(first_life);
        // Once may be chance.
        let (unlucky, _) = Documents::open(&state).unwrap();
        unlucky.take([view(2, b"2", false)].into_iter(), 150);
        assert_eq!(state_of(&unlucky), DocumentState::Active);
        drop(unlucky);

        let (second_life, kept) = Documents::open(&state).unwrap();
        assert_eq!((kept.newest.len(), kept.floors[&"plans".parse::<Name>().unwrap()]), (1, 3));
        let value = follow(&second_life);
        second_life.take([view(2, b"2", false)].into_iter(), 150);
        assert_eq!((state_of(&second_life), *value.borrow()), (DocumentState::Quarantined, Some(1)));
        second_life.take([view(3, b"3", false)].into_iter(), 150);
        assert_eq!((state_of(&second_life), *value.borrow()), (DocumentState::Active, Some(3)));
        second_life.acquit();
        let (third_life, _) = Documents::open(&state).unwrap();
        third_life.take([view(3, b"3", false)].into_iter(), 150);
        assert_eq!(state_of(&third_life), DocumentState::Active);
    }
}
