//! What an issuer must not forget: which name belongs to which key, and which tokens were used by whom.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use starling_protocol::{Name, NodeId, Refusal, Reservation, SignedReservation, TokenClaims, decode, encode};

use super::{authority::CLOCK_SKEW, grant::MAX_CERT_LIFE, sha256, tls::EXPIRED_GRACE};
use crate::state::{StateDir, StateError};

const FILE: &str = "issuer/ledger.json";
const VERSION: u32 = 1;
/// Most names that are kept.
const MAX_NAMES: usize = 16_384;

/// Names and uses of one issuer, as on its disk. Every change is stored before it has any effect.
#[derive(Debug)]
pub(crate) struct Ledger {
    state: StateDir,
    content: Content,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Content {
    version: u32,
    names: BTreeMap<Name, Entry>,
    /// Uses by token id, hex.
    tokens: BTreeMap<String, Spent>,
    /// Tokens that ended before this time and are not listed are forgotten, and so over, whatever the clock says; unix
    /// seconds.
    #[serde(default)]
    forgotten_until: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    /// Hex.
    key: String,
    since: u64,
    until: u64,
    freed: u64,
    /// The reservation as an issuer signed it, base64.
    signed: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Spent {
    expires: u64,
    /// Hashes of the requests that it was used for, hex. The very same request may be repeated: its answer may have been
    /// lost.
    uses: Vec<String>,
}

/// How long a token's uses are kept after its end.
const KEPT_S: u64 = 7 * 86400;

impl Content {
    /// Drops names whose time is over; if there are still too many, those first whose certificate has ended.
    fn prune(&mut self, now: u64) {
        self.names.retain(|_, entry| entry.until >= now);
        if self.names.len() >= MAX_NAMES {
            self.names.retain(|_, entry| entry.until >= now + EXPIRED_GRACE.as_secs());
        }
    }
}

impl Entry {
    fn new(reservation: &Reservation, signed: &SignedReservation) -> Self {
        Self {
            key: reservation.key.to_string(),
            since: reservation.since,
            until: reservation.until,
            freed: reservation.freed,
            signed: STANDARD.encode(encode(signed)),
        }
    }

    fn holds(&self, now: u64) -> bool {
        self.freed < self.since && self.until >= now
    }
}

impl Ledger {
    pub(crate) fn open(state: &StateDir) -> Result<Self, StateError> {
        let content: Content = match state.read(FILE)? {
            // Going on without it would give names and uses away: a person has to decide that.
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| state.damaged(FILE, e))?,
            None => Content { version: VERSION, ..Content::default() },
        };
        if content.version > VERSION {
            return Err(state.newer(FILE));
        }
        Ok(Self { state: state.clone(), content })
    }

    /// Counts a use of a token on disk, unless that very request was counted before.
    pub(crate) fn spend(&mut self, claims: &TokenClaims, request: &[u8; 32], now: u64) -> Result<(), Refusal> {
        let id = NodeId(claims.id).to_string();
        let request: String = request.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut next = self.content.clone();
        if !next.tokens.contains_key(&id) && claims.expires <= next.forgotten_until {
            return Err(Refusal::expired());
        }
        let over: Vec<String> =
            next.tokens.iter().filter(|(_, spent)| spent.expires + KEPT_S < now).map(|(id, _)| id.clone()).collect();
        for id in over {
            let ended = next.tokens.remove(&id).map_or(0, |spent| spent.expires);
            next.forgotten_until = next.forgotten_until.max(ended);
        }
        let spent = next.tokens.entry(id).or_insert(Spent { expires: claims.expires, uses: Vec::new() });
        if spent.uses.contains(&request) {
            return Ok(());
        }
        if spent.uses.len() >= claims.uses as usize {
            return Err(Refusal::used());
        }
        spent.uses.push(request);
        self.keep(next).map_err(Refusal::issuer)
    }

    /// Gives a use back: what it was for came to nothing.
    pub(crate) fn unspend(&mut self, claims: &TokenClaims, request: &[u8; 32]) {
        let request: String = request.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut next = self.content.clone();
        if let Some(spent) = next.tokens.get_mut(&NodeId(claims.id).to_string()) {
            spent.uses.retain(|known| *known != request);
            if let Err(error) = self.keep(next) {
                tracing::error!(error, "a use of a token is lost");
            }
        }
    }

    /// Whose the name is, if it is anybody's.
    pub(crate) fn holder(&self, name: &Name, now: u64) -> Option<String> {
        self.content.names.get(name).filter(|entry| entry.holds(now)).map(|entry| entry.key.clone())
    }

    /// Makes the name that key's, or keeps it so for longer; `sign` makes the issuer's word for it.
    pub(crate) fn reserve(
        &mut self,
        name: &Name,
        key: NodeId,
        until: u64,
        now: u64,
        sign: impl Fn(&Reservation) -> SignedReservation,
    ) -> Result<(), Refusal> {
        let known = self.content.names.get(name).filter(|entry| entry.holds(now));
        if known.is_some_and(|entry| entry.key != key.to_string()) {
            return Err(Refusal::name_taken(name));
        }
        // A name that was freed is free from the second after.
        let freed = self.content.names.get(name).map_or(0, |entry| entry.freed);
        let since = known.map_or(now.max(freed.saturating_add(1)), |entry| entry.since);
        let until = known.map_or(until, |entry| entry.until.max(until));
        let reservation = Reservation { name: name.clone(), key, since, until, freed };
        let mut next = self.content.clone();
        next.prune(now);
        if next.names.len() >= MAX_NAMES && !next.names.contains_key(name) {
            return Err(Refusal::issuer(format!("there are {MAX_NAMES} names already")));
        }
        next.names.insert(name.clone(), Entry::new(&reservation, &sign(&reservation)));
        self.keep(next).map_err(Refusal::issuer)
    }

    /// Whether the name was freed since that key had it: then it is not that key's any more.
    pub(crate) fn was_freed(&self, name: &Name, key: NodeId) -> bool {
        self.content.names.get(name).is_some_and(|entry| entry.key == key.to_string() && entry.freed >= entry.since)
    }

    /// Frees a name, for whoever asks for it next; `false` if nobody has it.
    pub(crate) fn free(
        &mut self,
        name: &Name,
        now: u64,
        sign: impl Fn(&Reservation) -> SignedReservation,
    ) -> Result<bool, String> {
        let Some(entry) = self.content.names.get(name).filter(|entry| entry.holds(now)) else { return Ok(false) };
        let key = entry.key.parse().unwrap_or(NodeId([0; 16]));
        let freed = now.max(entry.since);
        let reservation = Reservation { name: name.clone(), key, since: entry.since, until: entry.until, freed };
        let mut next = self.content.clone();
        next.names.insert(name.clone(), Entry::new(&reservation, &sign(&reservation)));
        self.keep(next).map(|()| true)
    }

    /// Takes what another issuer has, which the caller has verified; whether anything was news.
    pub(crate) fn merge(&mut self, entries: Vec<(Reservation, SignedReservation)>, now: u64) -> Result<bool, String> {
        let mut next = self.content.clone();
        next.prune(now);
        let mut changed = false;
        for (theirs, signed) in entries {
            let soon = now.saturating_add(CLOCK_SKEW.as_secs());
            let longest = soon + MAX_CERT_LIFE.as_secs() + EXPIRED_GRACE.as_secs();
            if theirs.since > soon || theirs.freed > soon || theirs.until > longest {
                // No issuer whose clock is right can have meant that.
                continue;
            }
            let new = Entry::new(&theirs, &signed);
            let better = match next.names.get(&theirs.name) {
                None => theirs.until >= now && next.names.len() < MAX_NAMES,
                Some(ours) => is_better(&new, ours, now),
            };
            if better {
                next.names.insert(theirs.name, new);
                changed = true;
            }
        }
        if changed {
            self.keep(next)?;
        }
        Ok(changed)
    }

    /// What another issuer should have of those names, or of all.
    pub(crate) fn signed(&self, of: Option<&Name>) -> Vec<SignedReservation> {
        let decoded = |entry: &Entry| decode(&STANDARD.decode(&entry.signed).ok()?).ok();
        let wanted = self.content.names.iter().filter(|(name, _)| of.is_none_or(|of| of == *name));
        wanted.filter_map(|(_, entry)| decoded(entry)).collect()
    }

    /// Whether it has that very entry.
    pub(crate) fn has(&self, name: &Name, signed: &SignedReservation) -> bool {
        self.content.names.get(name).is_some_and(|entry| entry.signed == STANDARD.encode(encode(signed)))
    }

    /// The same for the same entries: SHA-256.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let all: String = self.content.names.values().map(|entry| format!("{}\n", entry.signed)).collect();
        sha256(all.as_bytes())
    }

    /// Names that are somebody's: the key, since when and until when.
    pub(crate) fn names(&self, now: u64) -> Vec<(Name, String, u64, u64)> {
        let held = self.content.names.iter().filter(|(_, entry)| entry.holds(now));
        held.map(|(name, entry)| (name.clone(), entry.key.clone(), entry.since, entry.until)).collect()
    }

    fn keep(&mut self, next: Content) -> Result<(), String> {
        let bytes = serde_json::to_vec_pretty(&next).map_err(|e| e.to_string())?;
        self.state.write(FILE, &bytes).map_err(|e| e.to_string())?;
        self.content = next;
        Ok(())
    }
}

/// Of two keys the one that had the name first has it; a name that was freed is nobody's until it is reserved again.
fn is_better(new: &Entry, old: &Entry, now: u64) -> bool {
    if new.key == old.key && new.since == old.since {
        return (new.freed, new.until) > (old.freed, old.until);
    }
    match (new.holds(now), old.holds(now)) {
        // One was given after the other had been freed.
        (true, true) if new.freed >= old.since => true,
        (true, true) if old.freed >= new.since => false,
        (true, true) if new.key == old.key => new.until > old.until,
        (true, true) => (new.since, &new.key) < (old.since, &old.key),
        (true, false) => new.since > old.freed,
        (false, true) => new.freed >= old.since,
        _ => new.freed > old.freed,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use starling_protocol::Grants;

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn sign(reservation: &Reservation) -> SignedReservation {
        SignedReservation { body: encode(reservation).into(), signature: Bytes::new(), issuer: Bytes::new() }
    }

    fn pair(reservation: Reservation) -> (Reservation, SignedReservation) {
        let signed = sign(&reservation);
        (reservation, signed)
    }

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&StateDir::open(dir.path()).unwrap()).unwrap();
        (dir, ledger)
    }

    fn key(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    #[test]
    fn a_name_is_one_keys_until_its_time_is_over_or_it_is_freed_also_after_a_restart() {
        let (dir, mut ledger) = ledger();
        ledger.reserve(&name("a"), key(1), 200, 100, sign).unwrap();
        ledger.reserve(&name("a"), key(1), 300, 150, sign).unwrap();
        let mut ledger = Ledger::open(&StateDir::open(dir.path()).unwrap()).unwrap();
        assert_eq!(ledger.reserve(&name("a"), key(2), 300, 250, sign), Err(Refusal::name_taken(&name("a"))));
        assert_eq!(ledger.holder(&name("a"), 300), Some(key(1).to_string()));
        assert_eq!(ledger.holder(&name("a"), 301), None);
        assert_eq!(ledger.free(&name("a"), 260, sign), Ok(true));
        assert_eq!(ledger.free(&name("a"), 260, sign), Ok(false));
        ledger.reserve(&name("a"), key(2), 400, 260, sign).unwrap();
        assert_eq!(ledger.holder(&name("a"), 350), Some(key(2).to_string()));
    }

    #[test]
    fn issuers_agree_about_who_was_first() {
        let (_one, mut one) = ledger();
        let (_other, mut other) = ledger();
        one.reserve(&name("a"), key(1), 200, 100, sign).unwrap();
        other.reserve(&name("a"), key(2), 200, 101, sign).unwrap();
        let all = |ledger: &Ledger| {
            let read = |signed: SignedReservation| (decode::<Reservation>(&signed.body).unwrap(), signed);
            ledger.signed(None).into_iter().map(read).collect::<Vec<_>>()
        };
        assert_eq!(other.merge(all(&one), 110), Ok(true));
        assert_eq!(one.merge(all(&other), 110), Ok(false));
        for ledger in [&one, &other] {
            assert_eq!(ledger.holder(&name("a"), 110), Some(key(1).to_string()));
        }
        // Freed by one, taken again by the other: both see that.
        assert_eq!(one.free(&name("a"), 120, sign), Ok(true));
        assert_eq!(other.merge(all(&one), 120), Ok(true));
        other.reserve(&name("a"), key(2), 220, 121, sign).unwrap();
        assert_eq!(one.merge(all(&other), 121), Ok(true));
        assert_eq!(one.holder(&name("a"), 130), Some(key(2).to_string()));
        // Freed here and taken anew before the other has heard of either: it believes the later one all the same.
        let first = Reservation { name: name("b"), key: key(1), since: 100, until: 200, freed: 0 };
        other.merge(vec![pair(first)], 120).unwrap();
        one.reserve(&name("b"), key(1), 200, 100, sign).unwrap();
        one.free(&name("b"), 130, sign).unwrap();
        assert!(one.was_freed(&name("b"), key(1)));
        one.reserve(&name("b"), key(2), 230, 130, sign).unwrap();
        assert_eq!(other.merge(all(&one), 131), Ok(true));
        assert_eq!(one.merge(all(&other), 131), Ok(false));
        assert_eq!(other.holder(&name("b"), 131), Some(key(2).to_string()));
        // Nor does one from the future, or for ever.
        let far = Reservation { name: name("c"), key: key(3), since: 100, until: u64::MAX, freed: 0 };
        let ahead = Reservation { since: 90_000, until: 91_000, ..far.clone() };
        assert_eq!(one.merge(vec![pair(far), pair(ahead)], 131), Ok(false));
        // The old reservation, told again, changes nothing.
        let old = Reservation { name: name("a"), key: key(1), since: 100, until: 200, freed: 0 };
        assert_eq!(one.merge(vec![pair(old)], 130), Ok(false));
    }

    #[test]
    fn only_the_very_same_request_repeats_and_a_clock_that_jumps_gives_no_use_back() {
        let (_dir, mut ledger) = ledger();
        let claims = TokenClaims {
            issuer: key(9),
            id: [7; 16],
            expires: 1000,
            mesh: "shop".parse().unwrap(),
            root: [0; 32],
            uses: 1,
            grants: Grants::default(),
            seeds: Vec::new(),
        };
        assert_eq!(ledger.spend(&claims, &[1; 32], 10), Ok(()));
        assert_eq!(ledger.spend(&claims, &[1; 32], 10), Ok(()));
        assert_eq!(ledger.spend(&claims, &[2; 32], 10), Err(Refusal::used()));
        let later = TokenClaims { id: [8; 16], expires: 2_000_000, ..claims.clone() };
        assert_eq!(ledger.spend(&later, &[3; 32], 1_500_000), Ok(()));
        assert_eq!(ledger.spend(&claims, &[2; 32], 10), Err(Refusal::expired()));
    }
}
