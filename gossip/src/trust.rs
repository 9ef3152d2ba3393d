//! What members sent that was not believed, and what follows for them: nobody is put out for it, but nobody has to look at
//! everything that one member sends, or to act whenever one member says so.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use starling_protocol::{Life, NodeId};

use crate::records::Records;

/// Bad signatures that are looked at before a member is not listened to for a while. Each costs a verification, and a member
/// that works as it should sends none, because it verifies before it passes on.
const PATIENCE: f64 = 8.0;
/// How long it takes until one of them is forgotten.
const PATIENCE_RETURNS: Duration = Duration::from_secs(10);
/// How long a member is not listened to whose signatures used up the patience.
const DEAF_EAR: Duration = Duration::from_secs(60);
/// Complaints about others that turned out to be wrong, after which those of a member cause no check for a while.
const WRONG_COMPLAINTS: u32 = 3;
/// How long; doubles with each further one.
const MISTRUST: Duration = Duration::from_secs(30);
const MAX_MISTRUST: Duration = Duration::from_secs(600);
/// How long it takes until one of them is forgotten, and for how long a further one about the same member says nothing new:
/// it may be that member who comes and goes.
const WRONG_PASSES: Duration = Duration::from_secs(120);
const SAME_SUBJECT: Duration = Duration::from_secs(600);
/// Members about whom complaints of one are remembered.
const MAX_SUBJECTS: usize = 16;
/// Refutations and inquiries about this node's own life that one member can cause at once, and how often one more.
const PROVOCATIONS: f64 = 5.0;
const PROVOCATION_RETURNS: Duration = Duration::from_secs(10);
/// Words of one member that are believed and passed on at once, and how often one more. Every liar can make an honest member
/// refute as often as [`PROVOCATIONS`] allows; there is room for more of them than a mesh should have.
const WORDS: f64 = 64.0;
const WORD_RETURNS: Duration = Duration::from_millis(250);
/// Editions of its record that are passed on at once, and how often one more; the newest gets round all the same when nodes
/// compare.
const EDITIONS: f64 = 8.0;
const EDITION_RETURNS: Duration = Duration::from_secs(1);
/// Pings and requests for pings of one member that are answered in full at once, and how often one more.
const REQUESTS: f64 = 50.0;
const REQUEST_RETURNS: Duration = Duration::from_millis(100);
/// How long the record of a member may take that was mentioned, and how many such of one are waited for.
const RECORD_DUE: Duration = Duration::from_secs(10);
const MAX_AWAITED: usize = 32;
/// Members that accounts are kept of.
const MAX_ACCOUNTS: usize = 16_384;

/// Things of one member that were refused, counted since this node's start. All stay 0 for a member that behaves, but that
/// a bad link can make it complain about others in vain, and that its news can be a moment ahead of a record.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// Records, documents, strikes and words whose signature, certificate or content is wrong.
    pub forged: u64,
    /// Packets and messages that are not in the protocol's form, or speak for somebody else, and what is more than a member has
    /// to say.
    pub malformed: u64,
    /// Mentions of members, or of lives of members, of which there is no record.
    pub strangers: u64,
    /// Complaints about members that turned out to be there.
    pub complaints: u64,
}

impl Refused {
    /// All together.
    pub fn total(&self) -> u64 {
        self.forged + self.malformed + self.strangers + self.complaints
    }
}

#[derive(Debug)]
struct Account {
    refused: Refused,
    patience: Allowance,
    provocations: Allowance,
    deaf_until: Option<Instant>,
    words: Allowance,
    editions: Allowance,
    requests: Allowance,
    wrong: u32,
    wrong_at: Instant,
    subjects: Vec<(NodeId, Instant)>,
    mistrusted_until: Option<Instant>,
    /// Lives that it has mentioned, and of which there was no record.
    awaited: Vec<(Life, Instant)>,
}

/// A bucket of tokens.
#[derive(Debug)]
struct Allowance {
    left: f64,
    at: Instant,
}

impl Allowance {
    fn has(&mut self, most: f64, returns: Duration, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() / returns.as_secs_f64();
        self.left = (self.left + earned).min(most);
        self.at = now;
        self.left >= 1.0
    }

    fn take(&mut self, most: f64, returns: Duration, now: Instant) -> bool {
        let fine = self.has(most, returns, now);
        self.left -= if fine { 1.0 } else { 0.0 };
        fine
    }
}

/// Accounts by member.
#[derive(Debug, Default)]
pub(crate) struct Trust(BTreeMap<NodeId, Account>);

impl Trust {
    /// What was refused of that member.
    pub(crate) fn refused(&self, id: &NodeId) -> Refused {
        self.0.get(id).map(|account| account.refused).unwrap_or_default()
    }

    /// A signed thing from that member was wrong. It may be somebody else's, but who passes it on should have looked.
    pub(crate) fn forged(&mut self, from: NodeId, now: Instant) {
        let Some(account) = self.account(from, now) else { return };
        account.refused.forged += 1;
        if !account.patience.take(PATIENCE, PATIENCE_RETURNS, now) && account.deaf_until.is_none_or(|until| until < now)
        {
            account.deaf_until = Some(now + DEAF_EAR);
            tracing::warn!(member = ?from, "sends things with wrong signatures; not listened to for a minute");
        }
    }

    /// A message was not in the protocol's form.
    pub(crate) fn malformed(&mut self, from: NodeId, now: Instant) {
        self.account(from, now).into_iter().for_each(|account| account.refused.malformed += 1);
    }

    /// It mentioned a life of which there is no record. That counts unless the record comes before long: news of whoever has
    /// just started may be quicker.
    pub(crate) fn stranger(&mut self, from: NodeId, life: Life, records: &Records, now: Instant) {
        let Some(account) = self.account(from, now) else { return };
        let has_come = |life: &Life| records.life(&life.id).is_some_and(|known| known.generation >= life.generation);
        account.awaited.retain(|(life, since)| {
            let overdue = now.saturating_duration_since(*since) >= RECORD_DUE;
            let has_come = has_come(life);
            account.refused.strangers += u64::from(overdue && !has_come);
            !overdue && !has_come
        });
        if account.awaited.len() >= MAX_AWAITED {
            account.refused.strangers += 1;
        } else if account.awaited.iter().all(|(known, _)| *known != life) {
            account.awaited.push((life, now));
        }
    }

    /// It complained about a member that is there.
    pub(crate) fn contradicted(&mut self, by: NodeId, subject: NodeId, now: Instant) {
        let Some(account) = self.account(by, now) else { return };
        account.subjects.retain(|(_, at)| now.saturating_duration_since(*at) < SAME_SUBJECT);
        if account.subjects.iter().any(|(known, _)| *known == subject) {
            return;
        }
        if account.subjects.len() < MAX_SUBJECTS {
            account.subjects.push((subject, now));
        }
        account.refused.complaints += 1;
        let passed = now.saturating_duration_since(account.wrong_at).as_secs() / WRONG_PASSES.as_secs();
        account.wrong = account.wrong.saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX)) + 1;
        account.wrong_at = now;
        if account.wrong >= WRONG_COMPLAINTS {
            let doubled = MISTRUST * 2u32.pow((account.wrong - WRONG_COMPLAINTS).min(8));
            account.mistrusted_until = Some(now + doubled.min(MAX_MISTRUST));
        }
    }

    /// It complained about a member that is gone indeed.
    pub(crate) fn confirmed(&mut self, by: NodeId, now: Instant) {
        self.account(by, now).into_iter().for_each(|account| account.wrong = account.wrong.saturating_sub(1));
    }

    /// Whether its signed things are looked at.
    pub(crate) fn listens(&self, to: &NodeId, now: Instant) -> bool {
        self.0.get(to).is_none_or(|account| account.deaf_until.is_none_or(|until| until <= now))
    }

    /// Whether its complaints are reason enough to look after somebody.
    pub(crate) fn trusts(&self, by: &NodeId, now: Instant) -> bool {
        self.0.get(by).is_none_or(|account| account.mistrusted_until.is_none_or(|until| until <= now))
    }

    /// Whether this node refutes, or asks around whether it is thought dead, because that member says so.
    pub(crate) fn may_provoke(&mut self, by: NodeId, now: Instant) -> bool {
        self.account(by, now).is_some_and(|account| account.provocations.take(PROVOCATIONS, PROVOCATION_RETURNS, now))
    }

    /// Whether one more word in its name is looked at. Nothing is taken for that: anybody can write anybody's name.
    pub(crate) fn hears(&mut self, by: NodeId, now: Instant) -> bool {
        self.account(by, now).is_some_and(|account| account.words.has(WORDS, WORD_RETURNS, now))
    }

    /// Whether one more word that it has signed, as was verified, is believed.
    pub(crate) fn may_say(&mut self, by: NodeId, now: Instant) -> bool {
        self.allows(by, now, |account| account.words.take(WORDS, WORD_RETURNS, now))
    }

    /// Whether one more edition of its record is passed on.
    pub(crate) fn may_publish(&mut self, by: NodeId, now: Instant) -> bool {
        self.allows(by, now, |account| account.editions.take(EDITIONS, EDITION_RETURNS, now))
    }

    /// Whether one more of its requests is answered in full.
    pub(crate) fn may_request(&mut self, by: NodeId, now: Instant) -> bool {
        self.allows(by, now, |account| account.requests.take(REQUESTS, REQUEST_RETURNS, now))
    }

    /// What is too much is counted.
    fn allows(&mut self, by: NodeId, now: Instant, take: impl Fn(&mut Account) -> bool) -> bool {
        let Some(account) = self.account(by, now) else { return false };
        let fine = take(account);
        account.refused.malformed += u64::from(!fine);
        fine
    }

    /// Drops members that `remembered` does not name.
    pub(crate) fn retain(&mut self, remembered: impl Fn(&NodeId) -> bool) {
        self.0.retain(|id, _| remembered(id));
    }

    fn account(&mut self, id: NodeId, now: Instant) -> Option<&mut Account> {
        if !self.0.contains_key(&id) && self.0.len() >= MAX_ACCOUNTS {
            return None;
        }
        Some(self.0.entry(id).or_insert_with(|| Account {
            refused: Refused::default(),
            patience: Allowance { left: PATIENCE, at: now },
            provocations: Allowance { left: PROVOCATIONS, at: now },
            words: Allowance { left: WORDS, at: now },
            editions: Allowance { left: EDITIONS, at: now },
            requests: Allowance { left: REQUESTS, at: now },
            deaf_until: None,
            wrong: 0,
            wrong_at: now,
            subjects: Vec::new(),
            mistrusted_until: None,
            awaited: Vec::new(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: NodeId = NodeId([1; 16]);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn bad_signatures_cost_patience_and_time_gives_it_back() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        for _ in 0..PATIENCE as usize {
            trust.forged(ID, now);
            assert!(trust.listens(&ID, now));
        }
        trust.forged(ID, now);
        assert!(!trust.listens(&ID, now + 59 * SECOND) && trust.listens(&ID, now + DEAF_EAR));
        trust.forged(ID, now + DEAF_EAR);
        assert!(trust.listens(&ID, now + DEAF_EAR));
        assert_eq!(trust.refused(&ID).forged, PATIENCE as u64 + 2);
        assert!(trust.listens(&NodeId([2; 16]), now));
    }

    #[test]
    fn who_complains_in_vain_is_heard_less_and_less_and_who_is_right_more() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        let complain = |trust: &mut Trust, about: u8, now| trust.contradicted(ID, NodeId([about; 16]), now);
        for about in [10, 11, 11, 11, 11] {
            complain(&mut trust, about, now);
            assert!(trust.trusts(&ID, now));
        }
        trust.confirmed(ID, now);
        complain(&mut trust, 12, now);
        assert!(trust.trusts(&ID, now));
        complain(&mut trust, 13, now);
        assert!(!trust.trusts(&ID, now) && trust.trusts(&ID, now + MISTRUST));
        assert_eq!(trust.refused(&ID).complaints, 4);
        let later = now + 10 * WRONG_PASSES;
        complain(&mut trust, 14, later);
        assert!(trust.trusts(&ID, later), "it is forgotten in time");
        (20..40).for_each(|about| complain(&mut trust, about, now));
        assert!(!trust.trusts(&ID, now + MAX_MISTRUST - SECOND) && trust.trusts(&ID, now + MAX_MISTRUST));
    }

    #[test]
    fn one_member_cannot_provoke_for_ever() {
        let (mut trust, now) = (Trust::default(), Instant::now());
        assert_eq!((0..100).filter(|_| trust.may_provoke(ID, now)).count(), PROVOCATIONS as usize);
        let minute = (0..60).filter(|s| trust.may_provoke(ID, now + *s * SECOND)).count();
        assert_eq!(minute, 5);
    }
}
