//! Looks after one certificate: has it issued, or gets it from another edge, and again in good time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use instant_acme::CertificateIdentifier;
use starling_node::unix_now;
use tokio::sync::Notify;

use super::{
    Acme,
    fleet::{self, Others},
    issue::{IssueError, Wanted},
    schedule::{self, Tries},
    store::{Id, Pair},
};
use crate::{config, config::ChallengeKind, key_pair};

/// How often it is looked whether it is time: clocks jump, and machines sleep.
const LOOK: Duration = Duration::from_secs(10 * 60);
/// The same where another edge may have it any moment: first, and at last.
const FIRST_LOOK: Duration = Duration::from_secs(2);
const LAST_LOOK: Duration = Duration::from_secs(60);
/// How long a whole order may take.
const ORDER: Duration = Duration::from_secs(10 * 60);
/// How often an order is begun anew at once, where only the authority was met wrongly: with an account that it has forgotten, or with
/// one nonce after the other that it does not take.
const AT_ONCE_AGAIN: u32 = 2;
/// How long an authority may take to say when it wants a certificate renewed.
const SUGGESTION: Duration = Duration::from_secs(10);
/// How often it is asked that, whatever it says itself, in seconds.
const ASK_AGAIN: [u64; 2] = [60 * 60, 24 * 60 * 60];
/// How long an authority is left alone that says that it was asked too often, in seconds, if it does not say how long.
const RATE_LIMITED: u64 = 60 * 60;

/// Why nothing was issued, and for how many seconds the authority wants to be left alone.
type Failure = (IssueError, Option<u64>);

pub(super) struct Keeper {
    pub(super) acme: Arc<Acme>,
    pub(super) id: Id,
    pub(super) hosts: Vec<String>,
    pub(super) settings: config::Acme,
    /// Somebody does not want to wait.
    pub(super) wake: Arc<Notify>,
}

/// When an authority wants a certificate renewed.
struct Suggestion {
    of: CertificateIdentifier<'static>,
    /// Seconds since 1970.
    window: Option<(u64, u64)>,
    /// When to ask again, in seconds since 1970.
    again: u64,
}

impl Keeper {
    /// Looks after it for as long as it is polled.
    pub(super) async fn run(self) {
        let store = &self.acme.store;
        let mut tries = store.tries(&self.id);
        // The process before may have had one issued after this one has read the files.
        if let Some(kept) = store.pair(&self.id, &starling_node::crypto_provider()) {
            self.show_if_newer(&kept);
        }
        // To go on with an order is no new try.
        let mut goes_on = store.begun(&self.id).is_some();
        let mut suggested = None;
        let mut look = FIRST_LOOK;
        let mut due_since = None;
        loop {
            let now = unix_now();
            let have = self.acme.certificates.issued(&self.id);
            let wanted = match &have {
                None => now,
                Some(have) => {
                    let window = match &have.identifier {
                        Some(identifier) if now < have.until => self.window(&mut suggested, identifier, now).await,
                        _ => None,
                    };
                    schedule::renewal(have.from, have.until, window, self.id.dice())
                }
            };
            let due = if std::mem::take(&mut goes_on) { wanted } else { wanted.max(tries.next(now)) };
            self.acme.note(&self.id, &tries, due);
            let waited = match due <= now {
                true => due_since.get_or_insert_with(Instant::now).elapsed(),
                false => {
                    due_since = None;
                    Duration::ZERO
                }
            };
            let others = self.ask(have.as_ref().map_or(0, |have| have.from)).await;
            if self.adopt(&others.newer) {
                (tries, look) = (Tries::default(), FIRST_LOOK);
                store.keep_tries(&self.id, &tries);
                continue;
            }
            if due > now || !others.leave_it_to_us(waited) {
                let until = Duration::from_secs(due.saturating_sub(now).max(1));
                let pause = match have.is_some() && due > now {
                    true => until.min(LOOK),
                    false => look,
                };
                look = (look * 2).min(LAST_LOOK);
                if tokio::time::timeout(pause, self.wake.notified()).await.is_err() {
                    continue;
                }
            }
            let _turn = self.acme.ordering.acquire().await;
            let _under_way = self.acme.under_way(&self.id);
            // Also if it is killed in the middle: a process that is restarted again and again does not order each time.
            tries.begun(now);
            store.keep_tries(&self.id, &tries);
            let former = have.and_then(|have| have.identifier);
            match self.obtain(former, tries.failures).await {
                Ok(()) => tries = Tries::succeeded(unix_now()),
                Err((error, asked)) => {
                    tries.failed(unix_now(), error.to_string(), asked, rand::random());
                    let (hosts, wait) = (self.hosts.join(", "), tries.next(now).saturating_sub(unix_now()));
                    tracing::warn!(hosts, %error, failures = tries.failures, next_try_in_s = wait, "no certificate was issued");
                }
            }
            (look, due_since) = (FIRST_LOOK, None);
            store.keep_tries(&self.id, &tries);
            // Who was impatient meanwhile has got what he wanted, or hears why not.
            let _ = tokio::time::timeout(Duration::ZERO, self.wake.notified()).await;
        }
    }

    /// What other edges say, asked one after the other, so that many certificates are no flood.
    async fn ask(&self, newer_than: u64) -> Others {
        let _turn = self.acme.asking.lock().await;
        let others = fleet::ask(&self.acme.fleet, &self.id, newer_than).await;
        if !others.are_none() {
            tokio::time::sleep(fleet::BETWEEN_QUESTIONS).await;
        }
        others
    }

    /// The time in which the authority wants it renewed, asked now and then; `None` if it has no opinion, or does not know us yet.
    async fn window(
        &self,
        suggested: &mut Option<Suggestion>,
        of: &CertificateIdentifier<'static>,
        now: u64,
    ) -> Option<(u64, u64)> {
        let [soonest, latest] = ASK_AGAIN;
        let known = suggested.as_ref().filter(|known| known.of == *of);
        if let Some(known) = known.filter(|known| (now..=now + latest).contains(&known.again)) {
            return known.window;
        }
        let asked = async {
            if !self.acme.authorities.have_account(&self.settings, &self.acme.store) {
                return None;
            }
            let authority = self.acme.authorities.meet(&self.settings, &self.acme.store).await.ok()?;
            authority.suggestion(of).await
        };
        let told = tokio::time::timeout(SUGGESTION, asked).await.ok().flatten();
        let again = now + told.as_ref().map_or(soonest, |(_, again)| again.as_secs().clamp(soonest, latest));
        // What it said last holds until it says something else.
        let window = told.map(|(window, _)| window).or(known.and_then(|known| known.window));
        *suggested = Some(Suggestion { of: of.clone(), window, again });
        window
    }

    /// Has it issued, and shows it from now on.
    async fn obtain(&self, former: Option<CertificateIdentifier<'static>>, failures: u32) -> Result<(), Failure> {
        let Acme { authorities, store, challenges, fleet, .. } = &*self.acme;
        let kinds = self.kinds();
        // What did not work is not tried again at once, if there is something else.
        let kind = kinds[failures as usize % kinds.len()];
        let issue = async || {
            let authority = authorities.meet(&self.settings, store).await?;
            let wanted = Wanted { id: &self.id, hosts: &self.hosts, former: former.clone(), kind };
            match authority.issue(wanted, store, challenges, fleet).await {
                Ok(issued) => Ok(issued),
                Err(error) => {
                    authorities.distrust(&self.settings, &authority, &error, store).await;
                    Err((error, authority.asked()))
                }
            }
        };
        let obtained = async {
            let mut again = AT_ONCE_AGAIN;
            let issued = loop {
                match issue().await {
                    Err((error, _)) if again > 0 && (error.is("accountDoesNotExist") || error.is("badNonce")) => {
                        again -= 1;
                    }
                    outcome => break outcome?,
                }
            };
            let own = |why: String| (IssueError::Own(why), None);
            let pem = format!("{}{}", issued.key, issued.chain);
            let pair = Pair::new(pem.into(), &starling_node::crypto_provider());
            let pair = pair.map_err(|why| own(format!("what was issued cannot be used: {why}")))?;
            if let Some(why) = key_pair::refusal(&pair.key.cert, &self.hosts, unix_now()) {
                return Err(own(format!("what was issued cannot be used: {why}")));
            }
            for why in key_pair::doubts(&pair.key.cert, &self.hosts, unix_now()) {
                tracing::warn!(hosts = self.hosts.join(", "), why, "clients will not like a certificate");
            }
            store.keep_pair(&self.id, &pair);
            self.acme.certificates.put(&self.id, pair);
            tracing::info!(hosts = self.hosts.join(", "), challenge = kind.as_str(), "a certificate was issued");
            match self.acme.certificates.issued(&self.id) {
                Some(have) if schedule::renewal(have.from, have.until, None, 1.0) > unix_now() => Ok(()),
                _ => Err(own("what was issued is due for renewal already: is the clock right?".into())),
            }
        };
        let outcome: Result<(), (IssueError, Option<Duration>)> = match tokio::time::timeout(ORDER, obtained).await {
            Ok(outcome) => outcome,
            Err(_) => Err((IssueError::Own(format!("the authority did not issue within {ORDER:?}")), None)),
        };
        outcome.map_err(|(error, asked)| {
            let limited = error.is("rateLimited").then_some(RATE_LIMITED);
            (error, asked.map(|asked| asked.as_secs()).max(limited))
        })
    }

    /// The ways to show the authority that a name is ours; at least one.
    fn kinds(&self) -> Vec<ChallengeKind> {
        match self.settings.challenge {
            Some(kind) => vec![kind],
            None if self.acme.answers_http => vec![ChallengeKind::Http, ChallengeKind::TlsAlpn],
            None => vec![ChallengeKind::TlsAlpn],
        }
    }

    /// Shows the newest that another edge had issued, if there is one that can be used.
    fn adopt(&self, newer: &[Bytes]) -> bool {
        let provider = starling_node::crypto_provider();
        let usable = |pem: &Bytes| {
            let pair = Pair::new(pem.clone(), &provider)?;
            match key_pair::refusal(&pair.key.cert, &self.hosts, unix_now()) {
                None => Ok(pair),
                Some(why) => Err(why),
            }
        };
        let mut found: Vec<Pair> = Vec::new();
        for pem in newer {
            match usable(pem) {
                Ok(pair) => found.push(pair),
                Err(why) => tracing::warn!(id = %self.id, why, "what another edge had issued is not used"),
            }
        }
        found.sort_by_key(Pair::issued_at);
        let Some(pair) = found.pop().filter(|pair| self.show_if_newer(pair)) else { return false };
        self.acme.store.keep_pair(&self.id, &pair);
        tracing::info!(hosts = self.hosts.join(", "), "a certificate comes from another edge");
        true
    }

    fn show_if_newer(&self, pair: &Pair) -> bool {
        let current = self.acme.certificates.issued(&self.id);
        let is_newer = current.is_none_or(|current| pair.issued_at() > current.from);
        if is_newer {
            self.acme.certificates.put(&self.id, pair.clone());
        }
        is_newer
    }
}
