//! What comes from others is verified here before it is stored, and so before it is passed on.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use starling_protocol::{
    DocumentEdition, Items, MAX_DOCUMENTS, MemberHealth, MemberState, MeshDocument, NodeId, NodeRecord, Phase,
    RecordEdition, SignedDocument, SignedRecord,
};

use super::Gossip;
use crate::{DocumentError, Outgoing, RecordError, membership::MAX_AHEAD_S};

/// Wrong items in one message after which the rest is not looked at.
const MAX_WRONG: usize = 8;
/// Pause between two log lines about refused items.
const WARNING_PERIOD: Duration = Duration::from_secs(1);

impl Gossip {
    /// Verifies and stores; returns what was news. Looks no further after a few that are wrong: members verify before they
    /// pass on, so whoever sends many wrong ones means to keep this node busy.
    pub(super) fn store(&mut self, items: Items, now: Instant) -> Items {
        let mut news = Items::default();
        let unix = self.unix(now);
        let mut patience = MAX_WRONG;
        for signed in newest_of_each(items.records) {
            match self.take_record(&signed, unix) {
                Ok(true) => news.records.push(signed),
                Ok(false) => {}
                Err(error) => {
                    self.counters.records_refused += 1;
                    self.warn(&error, now);
                    patience -= 1;
                }
            }
            if patience == 0 {
                break;
            }
        }
        let documents = items.documents.into_iter().take(2 * MAX_DOCUMENTS);
        for signed in documents {
            if patience == 0 {
                break;
            }
            match self.take_document(signed.clone()) {
                Ok(true) => news.documents.push(signed),
                Ok(false) => {}
                Err(error) => {
                    self.warn(&error, now);
                    patience -= 1;
                }
            }
        }
        for forgotten in items.forgotten {
            let ahead = forgotten.generation > unix.saturating_add(MAX_AHEAD_S);
            let known = self.roster.get(&forgotten.id).is_some();
            if known && !ahead && self.roster.forget(forgotten) {
                self.changed = true;
                news.forgotten.push(forgotten);
            }
        }
        if !news.records.is_empty() || !news.documents.is_empty() {
            self.settled_at = now;
        }
        self.meet(&news.records, now);
        news
    }

    /// Says what was refused, but not so often that saying it becomes the harm.
    fn warn(&mut self, error: &dyn std::error::Error, now: Instant) {
        if self.next_warning <= now {
            self.next_warning = now + WARNING_PERIOD;
            tracing::warn!(%error, "refused from a member; more of the kind within the second is only counted");
        }
    }

    /// A node that signs a record is there: whoever has not heard of it by gossip has now.
    fn meet(&mut self, records: &[Arc<SignedRecord>], now: Instant) {
        let records = records.iter().filter_map(|signed| signed.peek_edition().ok());
        let records = records.filter_map(|edition| self.records.get(&edition.id));
        let unknown = |r: &&Arc<NodeRecord>| {
            r.phase != Phase::Left && self.roster.get(&r.id).is_none_or(|peer| peer.state.generation < r.generation)
        };
        let states: Vec<MemberState> = records
            .filter(unknown)
            .map(|r| {
                let (id, addr, generation, health) = (r.id, r.addr, r.generation, MemberHealth::Alive);
                MemberState { id, addr, generation, incarnation: 0, health, down_s: 0 }
            })
            .collect();
        if !states.is_empty() {
            self.learn(self.membership.me().id, &states, now);
        }
    }

    /// Whether the record was news, and is stored.
    fn take_record(&mut self, signed: &Arc<SignedRecord>, unix: u64) -> Result<bool, RecordError> {
        let claimed = signed.peek_edition().map_err(|e| RecordError(e.to_string()))?;
        if claimed.id == self.membership.me().id {
            return Ok(false);
        }
        let edition = (claimed.generation, claimed.seq);
        if let Some(known) =
            self.records.get(&claimed.id).map(|known| known.edition()).filter(|known| edition <= *known)
        {
            self.counters.records_stale += u64::from(edition < known);
            return Ok(false);
        }
        if claimed.generation > unix.saturating_add(MAX_AHEAD_S) {
            let RecordEdition { id, generation, .. } = claimed;
            return Err(RecordError(format!("record of {id:?} is of the future generation {generation}")));
        }
        let record = self.credentials.verify(signed)?;
        self.records.put(record, signed.clone());
        self.changed = true;
        Ok(true)
    }

    /// Whether the document was news, and is stored.
    pub(super) fn take_document(&mut self, signed: Arc<SignedDocument>) -> Result<bool, DocumentError> {
        let outcome = self.judge_document(&signed);
        match &outcome {
            Ok(Some(document)) => {
                let view = self.documents.put(document.clone(), signed);
                self.outgoing.push(Outgoing::Document(view));
            }
            Ok(None) => {}
            Err(_) => self.counters.documents_refused += 1,
        }
        outcome.map(|taken| taken.is_some())
    }

    /// Verifies; the document if it is news.
    fn judge_document(&self, signed: &SignedDocument) -> Result<Option<MeshDocument>, DocumentError> {
        let claimed = signed.peek().map_err(|e| DocumentError::Unverified(e.to_string()))?;
        let edition = DocumentEdition { kind: claimed.kind.clone(), version: claimed.version, hash: signed.hash() };
        if self.documents.has(&edition) {
            return Ok(None);
        }
        let document = self.credentials.verify_document(signed)?;
        self.documents.admits(&document)?;
        Ok(self.documents.is_news(&edition).then_some(document))
    }
}

/// One record of each node, the newest: only that one can be news, and signatures are dear.
fn newest_of_each(records: Vec<Arc<SignedRecord>>) -> Vec<Arc<SignedRecord>> {
    if records.len() < 2 {
        return records;
    }
    let mut newest: BTreeMap<NodeId, (u64, u64)> = BTreeMap::new();
    for edition in records.iter().filter_map(|signed| signed.peek_edition().ok()) {
        let known = newest.entry(edition.id).or_default();
        *known = (edition.generation, edition.seq).max(*known);
    }
    let mut wanted = |signed: &Arc<SignedRecord>| match signed.peek_edition() {
        // Taken out, so that of equals only the first is looked at.
        Ok(edition) if newest.get(&edition.id) == Some(&(edition.generation, edition.seq)) => {
            newest.remove(&edition.id);
            true
        }
        Ok(_) => false,
        Err(_) => true,
    };
    records.into_iter().filter(|signed| wanted(signed)).collect()
}
