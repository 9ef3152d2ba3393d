//! What comes from others is verified here before it is stored, and so before it is passed on.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use starling_protocol::{
    DocumentEdition, Items, MAX_DOCUMENTS, MeshDocument, NodeId, NodeRecord, Phase, RecordEdition, SignedDocument,
    SignedRecord,
};

use super::Gossip;
use crate::{
    DocumentError, Outgoing, RecordError,
    membership::{MAX_AHEAD_S, MAX_MEMBERS},
    twins::PEACE,
};

/// Wrong items in one message after which the rest is not looked at.
const MAX_WRONG: usize = 8;
/// Pause between two log lines about refused items.
const WARNING_PERIOD: Duration = Duration::from_secs(1);

impl Gossip {
    /// Verifies and stores; returns what was news. Looks no further after a few that are wrong: members verify before they
    /// pass on, so whoever sends many wrong ones means to keep this node busy.
    pub(super) fn store(&mut self, from: NodeId, items: Items, now: Instant) -> Items {
        let mut news = Items::default();
        if !self.trust.listens(&from, now) {
            self.counters.records_refused += items.records.len() as u64;
            self.counters.documents_refused += items.documents.len() as u64;
            self.counters.strikes_refused += items.strikes.len() as u64;
            return news;
        }
        let unix = self.unix(now);
        let mut patience = MAX_WRONG;
        for signed in newest_of_each(items.records) {
            match self.take_record(&signed, (now, unix)) {
                Ok(true) => news.records.push(signed),
                Ok(false) => {}
                Err(error) => {
                    self.counters.records_refused += 1;
                    self.refuse(from, matches!(error, RecordError::Forged(_)), &error, now);
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
                    self.refuse(from, matches!(error, DocumentError::Unverified(_)), &error, now);
                    patience -= 1;
                }
            }
        }
        if !news.records.is_empty() || !news.documents.is_empty() {
            self.settled_at = now;
        }
        self.meet(&news.records, now);
        if let Some(generation) = self.outlive.take() {
            let effects = self.membership.outlive(generation, now);
            self.apply(effects, now);
        }
        for signed in items.strikes {
            let wanted = signed.peek().is_ok_and(|strike| self.roster.wants(&strike.edition()));
            if !wanted || patience == 0 {
                continue;
            }
            match self.credentials.verify_strike(&signed) {
                Ok(strike) => {
                    self.roster.strike(strike, signed.clone());
                    self.changed = true;
                    news.strikes.push(signed);
                }
                Err(error) => {
                    self.counters.strikes_refused += 1;
                    self.refuse(from, matches!(error, RecordError::Forged(_)), &error, now);
                    patience -= 1;
                }
            }
        }
        if !items.words.is_empty() {
            let effects = self.judge(now, |membership, grounds| membership.take_words(from, &items.words, grounds));
            self.apply(effects, now);
        }
        news
    }

    /// Says what was refused, and of whom, but not so often that saying it becomes the harm.
    fn refuse(&mut self, from: NodeId, forged: bool, error: &dyn std::error::Error, now: Instant) {
        if forged {
            self.trust.forged(from, now);
        }
        if self.next_warning <= now {
            self.next_warning = now + WARNING_PERIOD;
            let member = self.records.get(&from).map_or_else(|| format!("{from:?}"), |record| record.name.to_string());
            tracing::warn!(%error, member, "refused from a member; more of the kind within the second is only counted");
        }
    }

    /// A node that signs a record is there, or says that it has left.
    fn meet(&mut self, records: &[Arc<SignedRecord>], now: Instant) {
        let records = records.iter().filter_map(|signed| signed.peek_edition().ok());
        let records = records.filter_map(|edition| self.records.get(&edition.id));
        let is_news = |record: &&Arc<NodeRecord>| {
            let known = self.roster.get(&record.id).map(|peer| peer.state.generation);
            record.phase == Phase::Left || known.is_none_or(|known| known < record.generation)
        };
        let records: Vec<Arc<NodeRecord>> = records.filter(is_news).cloned().collect();
        if !records.is_empty() {
            let unix = self.unix(now);
            let effects = self.membership.meet(records.iter().map(Arc::as_ref), unix, &self.ages, now);
            self.apply(effects, now);
        }
    }

    /// There is a record of a later life of this node than it remembers: it was restored from an older copy, or its clock was
    /// set back; or another node runs with its key.
    fn outlive(&mut self, later: &NodeRecord, now: Instant) {
        let me = self.membership.me();
        let told = self.twins.of(&me.id, me.addr, now).is_some();
        let found = self.twins.moved(me.id, [me.addr, later.addr], now);
        if found {
            self.changed = true;
            tracing::error!(
                key = %me.id, here = %me.addr, there = %later.addr,
                "another node runs with this node's key, because its state directory was copied; calls go to one of the two at \
                 a time; stop one of them, and let it join anew with an empty --state"
            );
        }
        if !told || later.phase == Phase::Left {
            self.others_turn = None;
            self.outlive = Some(later.generation);
        } else if self.others_turn.is_none_or(|(generation, _)| generation < later.generation) {
            let until = now + PEACE;
            self.others_turn = Some((later.generation, until));
            self.membership.stay_away_until(until);
        }
    }

    /// The turn of the other node that runs with this one's key is over.
    pub(super) fn take_turn(&mut self, now: Instant) {
        if let Some((generation, _)) = self.others_turn.take_if(|(_, until)| *until <= now) {
            let effects = self.membership.outlive(generation, now);
            self.apply(effects, now);
        }
        self.changed |= self.twins.forget(now);
    }

    /// Whether the record was news, and is stored.
    fn take_record(&mut self, signed: &Arc<SignedRecord>, (now, unix): (Instant, u64)) -> Result<bool, RecordError> {
        let claimed = signed.peek_edition().map_err(|e| RecordError::Forged(e.to_string()))?;
        let me = self.membership.me();
        if claimed.id == me.id {
            if claimed.generation > me.generation && claimed.generation <= unix.saturating_add(MAX_AHEAD_S) {
                let record = self.credentials.verify(signed)?;
                self.outlive(&record, now);
            }
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
            return Err(RecordError::Unfit(format!("record of {id:?} is of the future generation {generation}")));
        }
        let mut record = self.credentials.verify(signed)?;
        if let Some(known) = self.records.life(&record.id)
            && known.generation == record.generation
            && known.addr != record.addr
        {
            // Where it is it says once in each life. Others may have heard something else first; so no fault of theirs.
            record = Arc::new(NodeRecord { addr: known.addr, ..NodeRecord::clone(&record) });
        }
        if let Some(known) = self.records.life(&record.id)
            && self.twins.moved(record.id, [known.addr, record.addr], now)
        {
            tracing::warn!(
                member = %record.name, key = %record.id, here = %known.addr, there = %record.addr,
                "two nodes run with one key, because a state directory was copied; stop one of them, and let it join anew with \
                 an empty --state"
            );
        }
        match self.records.life(&record.id) {
            None if self.records.len() >= MAX_MEMBERS => {
                return Err(RecordError::Unfit(format!("there are {MAX_MEMBERS} members already")));
            }
            _ => {}
        }
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
        if self.documents.has(&edition) || self.documents.is_behind(&edition) {
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
