//! Certificates that an authority issues to the edge, and that the edge renews (ACME, RFC 8555).
//!
//! Each has a task of its own, which waits until it is time ([`schedule`]), has one issued ([`issue`]) while the authority finds
//! here what it looks for ([`challenge`]), keeps it ([`store`]) and shows it to clients from then on. Files are read only at a
//! start: what is shown is what was issued, also where the disk is full. Where several edges have the same certificate, one of
//! them has it issued ([`fleet`]).

mod challenge;
mod fleet;
mod issue;
mod schedule;
mod store;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use instant_acme::CertificateIdentifier;
use starling_node::{Colleague, Fleet, rfc3339, unix_now};
use starling_protocol::{
    ChallengeShown, FindCertificate, FoundCertificate, Framed as _, ShowChallenge, admin, decode, frame,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

pub(crate) use self::{
    challenge::{ALPN, Challenges},
    store::{Id, Pair, Store},
};
use self::{
    fleet::{Held, Others},
    issue::{Authority, IssueError},
    schedule::Tries,
};
use crate::{
    certificates::Certificates,
    config::{self, Certificate, ChallengeKind, Source},
    key_pair,
};

/// How often it is looked whether it is time: clocks jump, and machines sleep.
const LOOK: Duration = Duration::from_secs(10 * 60);
/// The same while there is none, and another edge may get it, or is to.
const BUSY_LOOK: Duration = Duration::from_secs(2);
/// How long an edge that has just started waits until it knows the others.
const SETTLE: Duration = Duration::from_secs(10);
const SETTLE_LOOK: Duration = Duration::from_millis(50);
/// How long a whole order may take.
const ORDER: Duration = Duration::from_secs(5 * 60);
/// How often an order is begun anew at once, where only the authority was met wrongly: with an account that it has forgotten, or with
/// one nonce after the other that it does not take.
const AT_ONCE_AGAIN: u32 = 2;
/// How often an authority is asked when it wants a certificate renewed, whatever it says itself.
const ASK_AGAIN: [Duration; 2] = [Duration::from_secs(60 * 60), Duration::from_secs(24 * 60 * 60)];
/// How long an authority is left alone that says that it was asked too often, in seconds, if it does not say how long.
const RATE_LIMITED: u64 = 60 * 60;

/// Has certificates issued.
pub(crate) struct Acme {
    store: Store,
    challenges: Challenges,
    /// What other edges asked to show.
    held: Held,
    fleet: Fleet,
    certificates: Arc<Certificates>,
    /// Whether there is a port where an authority can ask over HTTP.
    answers_http: bool,
    wanted: watch::Sender<Vec<Certificate>>,
    /// By what [`account_of`] says.
    authorities: Mutex<HashMap<config::Acme, Arc<Met>>>,
    /// How it goes, for whoever wants to see it.
    progress: Mutex<BTreeMap<Id, Progress>>,
}

/// An authority that was met; one at a time meets it, so that one account is made.
type Met = tokio::sync::Mutex<Option<Arc<Authority>>>;

#[derive(Default)]
struct Progress {
    tries: Tries,
    /// When the next try is, in seconds since 1970.
    due: u64,
    /// Whether one is under way.
    ordering: bool,
    wake: Arc<Notify>,
}

impl Acme {
    pub(crate) fn new(
        store: Store,
        challenges: Challenges,
        fleet: Fleet,
        certificates: Arc<Certificates>,
        answers_http: bool,
        wanted: Vec<Certificate>,
    ) -> Self {
        Self {
            store,
            challenges,
            held: Held::default(),
            fleet,
            certificates,
            answers_http,
            wanted: watch::Sender::new(wanted),
            authorities: Mutex::default(),
            progress: Mutex::default(),
        }
    }

    /// From now on these are wanted.
    pub(crate) fn want(&self, certificates: &[Certificate]) {
        self.wanted.send_replace(certificates.to_vec());
    }

    /// Tries now, whatever was waited for, for every certificate that has that host; whether there is one.
    pub(crate) fn hurry(&self, host: &str) -> bool {
        let wanted = self.wanted.borrow();
        let ids: Vec<Id> = wanted.iter().filter(|c| c.hosts.iter().any(|h| h == host)).filter_map(id_of).collect();
        let progress = self.progress();
        let found = ids.iter().filter_map(|id| progress.get(id)).map(|progress| progress.wake.notify_one());
        found.count() > 0
    }

    /// How it goes with a certificate.
    pub(crate) fn shown(&self, id: &Id) -> Option<admin::Issuance> {
        let progress = self.progress();
        let Progress { tries, due, .. } = progress.get(id)?;
        Some(admin::Issuance { failures: tries.failures, error: tries.error.clone(), next: rfc3339(*due) })
    }

    /// Has issued and renews what is wanted, for as long as it is polled.
    pub(crate) async fn run(self: Arc<Self>) {
        self.fleet.answer_with(self.clone());
        // Others may have what is wanted here, if there are any.
        let settled = async {
            while !self.fleet.is_settled() {
                tokio::time::sleep(SETTLE_LOOK).await;
            }
        };
        let _ = tokio::time::timeout(SETTLE, settled).await;
        let mut wanted = self.wanted.subscribe();
        let mut keepers = JoinSet::new();
        let mut running = BTreeMap::new();
        loop {
            let certificates = wanted.borrow_and_update().clone();
            let managed: BTreeMap<Id, Certificate> =
                certificates.into_iter().filter_map(|c| Some((id_of(&c)?, c))).collect();
            running.retain(|id, (certificate, task): &mut (Certificate, tokio::task::AbortHandle)| {
                let stays = managed.get(id) == Some(certificate);
                if !stays {
                    task.abort();
                }
                stays
            });
            self.progress().retain(|id, _| managed.contains_key(id));
            for (id, certificate) in managed {
                running.entry(id.clone()).or_insert_with(|| {
                    let keeper = self.clone().keep(id, certificate.clone());
                    (certificate, keepers.spawn(keeper))
                });
            }
            tokio::select! {
                changed = wanted.changed() => match changed {
                    Ok(()) => {}
                    Err(_) => return,
                },
                // One that was ended.
                Some(_) = keepers.join_next() => {}
            }
        }
    }

    /// Looks after one certificate.
    async fn keep(self: Arc<Self>, id: Id, certificate: Certificate) {
        let Source::Acme(acme) = &certificate.source else { return };
        let mut tries = self.store.tries(&id);
        let mut suggested: Option<Suggestion> = None;
        let wake = self.progress().entry(id.clone()).or_default().wake.clone();
        loop {
            let now = unix_now();
            let have = self.certificates.issued(&id);
            let wanted = match &have {
                None => now,
                Some(have) => {
                    if suggested.as_ref().is_none_or(|s| s.again <= now || s.of != have.identifier) {
                        suggested = Some(self.suggestion(acme, &have.identifier, now).await);
                    }
                    let window = suggested.as_ref().and_then(|s| s.window);
                    schedule::renewal(have.from, have.until, window, id.dice())
                }
            };
            let due = if tries.failures > 0 { wanted.max(tries.next(now)) } else { wanted };
            self.note(&id, &tries, due);
            let others = fleet::ask(&self.fleet, &id, have.as_ref().map_or(0, |have| have.until)).await;
            if let Others::Newer(pem) = &others
                && self.adopt(&id, &certificate.hosts, pem.clone())
            {
                tries = Tries::default();
                self.store.keep_tries(&id, &tries);
                continue;
            }
            let pause = match others {
                Others::Busy if due <= now => Some(BUSY_LOOK),
                _ if due > now => {
                    Some(Duration::from_secs(due - now).min(if have.is_some() { LOOK } else { BUSY_LOOK }))
                }
                _ => None,
            };
            if let Some(pause) = pause {
                let hurried = tokio::time::timeout(pause, wake.notified()).await.is_ok();
                if !hurried {
                    continue;
                }
            }
            let former = have.map(|have| have.identifier);
            let _under_way = self.under_way(&id);
            match self.obtain(&id, &certificate.hosts, acme, former, tries.failures).await {
                Ok(()) => tries = Tries::default(),
                Err((error, asked)) => {
                    tries.failed(unix_now(), error.to_string(), asked, rand::random());
                    let (hosts, wait) = (certificate.hosts.join(", "), tries.next(now).saturating_sub(unix_now()));
                    tracing::warn!(hosts, %error, failures = tries.failures, next_try_in_s = wait, "no certificate was issued");
                }
            }
            self.store.keep_tries(&id, &tries);
        }
    }

    /// Has one certificate issued, and shows it from now on. On failure: why, and for how many seconds the authority wants to be
    /// left alone.
    async fn obtain(
        &self,
        id: &Id,
        hosts: &[String],
        acme: &config::Acme,
        former: Option<CertificateIdentifier<'static>>,
        failures: u32,
    ) -> Result<(), (IssueError, Option<u64>)> {
        let kinds = self.kinds(acme);
        // What did not work is not tried again at once, if there is something else.
        let kind = kinds[failures as usize % kinds.len()];
        let issue = async || {
            let authority = self.authority(acme).await?;
            let issued = authority.issue(hosts, former.clone(), kind, &self.challenges, &self.fleet).await;
            issued.map_err(|error| {
                let asked = authority.asked();
                self.distrust(acme, &error);
                (error, asked)
            })
        };
        let obtained = async {
            let mut again = AT_ONCE_AGAIN;
            let issued = loop {
                match issue().await {
                    Err((error, _)) if again > 0 && (error.is("accountDoesNotExist") || error.is("badNonce")) => {
                        again -= 1
                    }
                    outcome => break outcome?,
                }
            };
            let pem = format!("{}{}", issued.key, issued.chain);
            let pair = Pair::new(pem.into(), &starling_node::crypto_provider());
            let pair = pair.map_err(|why| (IssueError::Own(format!("what was issued cannot be used: {why}")), None))?;
            for why in key_pair::doubts(&pair.key.cert, hosts, unix_now()) {
                tracing::warn!(hosts = hosts.join(", "), why, "clients will not like a certificate");
            }
            self.store.keep_pair(id, &pair);
            self.certificates.put(id, pair);
            tracing::info!(hosts = hosts.join(", "), challenge = kind.as_str(), "a certificate was issued");
            Ok(())
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

    /// Shows a certificate that another edge had issued, if it is one of what is wanted; whether it is.
    fn adopt(&self, id: &Id, hosts: &[String], pem: Bytes) -> bool {
        let pair = match Pair::new(pem, &starling_node::crypto_provider()) {
            Ok(pair) => pair,
            Err(why) => {
                tracing::warn!(%id, why, "what another edge had issued cannot be used");
                return false;
            }
        };
        if let Some(why) = key_pair::doubts(&pair.key.cert, hosts, unix_now()).first() {
            tracing::warn!(%id, why, "what another edge had issued is not used");
            return false;
        }
        self.store.keep_pair(id, &pair);
        self.certificates.put(id, pair);
        tracing::info!(hosts = hosts.join(", "), "a certificate comes from another edge");
        true
    }

    /// The ways to show an authority that a name is ours; at least one.
    fn kinds(&self, acme: &config::Acme) -> Vec<ChallengeKind> {
        match acme.challenge {
            Some(kind) => vec![kind],
            None if self.answers_http => vec![ChallengeKind::Http, ChallengeKind::TlsAlpn],
            None => vec![ChallengeKind::TlsAlpn],
        }
    }

    async fn authority(&self, acme: &config::Acme) -> Result<Arc<Authority>, (IssueError, Option<Duration>)> {
        let met = self.authorities().entry(account_of(acme)).or_default().clone();
        let mut met = met.lock().await;
        if let Some(authority) = &*met {
            return Ok(authority.clone());
        }
        let authority = Arc::new(Authority::meet(acme, &self.store).await?);
        Ok(met.insert(authority).clone())
    }

    /// After a failure the authority is met anew; with a new account, if it does not know ours.
    fn distrust(&self, acme: &config::Acme, error: &IssueError) {
        self.authorities().remove(&account_of(acme));
        if error.is("accountDoesNotExist") {
            tracing::warn!(directory = acme.directory.0, "the authority does not know our account; a new one is made");
            self.store.forget_account(acme);
        }
    }

    /// When the authority wants a certificate renewed. That it does not say so is no failure.
    async fn suggestion(&self, acme: &config::Acme, of: &CertificateIdentifier<'static>, now: u64) -> Suggestion {
        let [soonest, latest] = ASK_AGAIN;
        let told = match self.authority(acme).await {
            Ok(authority) => authority.suggestion(of).await,
            Err(_) => None,
        };
        let again = told.as_ref().map_or(soonest, |(_, again)| (*again).clamp(soonest, latest));
        Suggestion { of: of.clone(), window: told.map(|(window, _)| window), again: now + again.as_secs() }
    }

    /// Says to other edges that one is ordered, until what is returned is dropped.
    fn under_way<'a>(&'a self, id: &'a Id) -> impl Drop + use<'a> {
        struct UnderWay<'a>(&'a Acme, &'a Id);
        impl UnderWay<'_> {
            fn set(&self, ordering: bool) {
                if let Some(progress) = self.0.progress().get_mut(self.1) {
                    progress.ordering = ordering;
                }
            }
        }
        impl Drop for UnderWay<'_> {
            fn drop(&mut self) {
                self.set(false);
            }
        }
        let under_way = UnderWay(self, id);
        under_way.set(true);
        under_way
    }

    fn note(&self, id: &Id, tries: &Tries, due: u64) {
        if let Some(progress) = self.progress().get_mut(id) {
            progress.tries.clone_from(tries);
            progress.due = due;
        }
    }

    fn progress(&self) -> MutexGuard<'_, BTreeMap<Id, Progress>> {
        self.progress.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn authorities(&self) -> MutexGuard<'_, HashMap<config::Acme, Arc<Met>>> {
        self.authorities.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Colleague for Acme {
    fn answer(&self, kind: u64, body: &Bytes) -> Option<Vec<u8>> {
        match kind {
            ShowChallenge::KIND => {
                let asked = decode(body).ok()?;
                self.held.hold(&asked, &self.challenges, &starling_node::crypto_provider());
                Some(frame(&ChallengeShown {}))
            }
            FindCertificate::KIND => {
                let FindCertificate { id, newer_than } = decode(body).ok()?;
                let progress = self.progress();
                let found = progress.iter().find(|(known, _)| known.as_str() == id);
                let pem = found.and_then(|(id, _)| self.certificates.pem_newer_than(id, newer_than));
                let (ordering, failures) =
                    found.map_or((false, 0), |(_, progress)| (progress.ordering, progress.tries.failures));
                let (wanted, pem) = (found.is_some(), pem.unwrap_or_default());
                Some(frame(&FoundCertificate { wanted, ordering, failures, pem }))
            }
            _ => None,
        }
    }
}

/// When an authority wants a certificate renewed.
struct Suggestion {
    of: CertificateIdentifier<'static>,
    /// Seconds since 1970.
    window: Option<(u64, u64)>,
    /// When to ask again, in seconds since 1970.
    again: u64,
}

/// With whom, and as whom.
fn account_of(acme: &config::Acme) -> config::Acme {
    config::Acme { challenge: None, ..acme.clone() }
}

/// `None` if it comes from files.
fn id_of(certificate: &Certificate) -> Option<Id> {
    match &certificate.source {
        Source::Acme(acme) => Some(Id::of(&certificate.hosts, acme)),
        Source::Files(_) => None,
    }
}
