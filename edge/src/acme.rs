//! Certificates that an authority issues to the edge, and that the edge renews (ACME, RFC 8555).
//!
//! Each has a task of its own ([`keeper`]), which waits until it is time ([`schedule`]), has one issued ([`issue`]) while the authority finds
//! here what it looks for ([`challenge`]), keeps it ([`store`]) and shows it to clients from then on. Files are read only at a
//! start: what is shown is what was issued, also where the disk is full. Where several edges have the same certificate, one of
//! them has it issued ([`fleet`]).

mod authorities;
mod challenge;
mod fleet;
mod issue;
mod keeper;
mod schedule;
mod store;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use starling_node::{Answering, Colleague, Fleet, rfc3339};
use starling_protocol::{
    ChallengeShown, FindCertificate, FoundCertificate, Framed as _, NodeId, ShowChallenge, admin, decode, frame,
};
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::{AbortHandle, JoinSet},
};

use self::{authorities::Authorities, fleet::Held, keeper::Keeper, schedule::Tries};
pub(crate) use self::{
    challenge::{ALPN, Challenges},
    store::{Id, Pair, Store},
};
use crate::{
    certificates::Certificates,
    config::{Certificate, Source},
};

/// How long an edge that has just started waits until it knows the others.
const SETTLE: Duration = Duration::from_secs(10);
const SETTLE_LOOK: Duration = Duration::from_millis(50);
/// Orders at a time.
const ORDERS: usize = 8;
/// Pause before a task is started anew that has ended by a fault of ours.
const RESTART: Duration = Duration::from_secs(60);

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
    authorities: Authorities,
    /// Whose turn it is to ask other edges.
    asking: tokio::sync::Mutex<()>,
    /// Places for orders.
    ordering: Semaphore,
    /// How it goes, for whoever wants to see it.
    progress: Mutex<BTreeMap<Id, Progress>>,
}

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
            authorities: Authorities::default(),
            asking: tokio::sync::Mutex::default(),
            ordering: Semaphore::new(ORDERS),
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
            running.retain(|id, (certificate, task): &mut (Certificate, AbortHandle)| {
                let stays = managed.get(id) == Some(certificate) && !task.is_finished();
                if !stays {
                    task.abort();
                }
                stays
            });
            self.progress().retain(|id, _| managed.contains_key(id));
            for (id, certificate) in managed {
                let Source::Acme(settings) = certificate.source.clone() else { continue };
                running.entry(id.clone()).or_insert_with(|| {
                    let wake = self.progress().entry(id.clone()).or_default().wake.clone();
                    let hosts = certificate.hosts.clone();
                    let keeper = Keeper { acme: self.clone(), id, hosts, settings, wake };
                    (certificate, keepers.spawn(keeper.run()))
                });
            }
            tokio::select! {
                changed = wanted.changed() => match changed {
                    Ok(()) => {}
                    Err(_) => return,
                },
                Some(ended) = keepers.join_next() => {
                    // One that was not wanted any more; or not, and then it is looked after all the same.
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(%error, "what looks after a certificate has failed; it starts anew");
                        tokio::time::sleep(RESTART).await;
                    }
                }
            }
        }
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
}

impl Colleague for Acme {
    fn answer<'a>(&'a self, _: NodeId, kind: u64, body: &'a Bytes) -> Answering<'a> {
        Box::pin(std::future::ready(self.answer_at_once(kind, body)))
    }
}

impl Acme {
    fn answer_at_once(&self, kind: u64, body: &Bytes) -> Option<Vec<u8>> {
        match kind {
            ShowChallenge::KIND => {
                let asked: ShowChallenge = decode(body).ok()?;
                // For names that are ours alone: an edge that lies must not get certificates for those of others.
                let is_ours = self.wanted.borrow().iter().any(|c| id_of(c).is_some() && c.hosts.contains(&asked.host));
                let is_shown = is_ours && self.held.hold(&asked, &self.challenges, &starling_node::crypto_provider());
                is_shown.then(|| frame(&ChallengeShown {}))
            }
            FindCertificate::KIND => {
                let FindCertificate { id, newer_than } = decode(body).ok()?;
                let known = self.wanted.borrow().iter().filter_map(id_of).find(|known| known.as_str() == id);
                let pem = known.as_ref().and_then(|id| self.certificates.pem_newer_than(id, newer_than));
                let progress = self.progress();
                let (ordering, failures) = known
                    .as_ref()
                    .and_then(|id| progress.get(id))
                    .map_or((false, 0), |progress| (progress.ordering, progress.tries.failures));
                let (wanted, pem) = (known.is_some(), pem.unwrap_or_default());
                Some(frame(&FoundCertificate { wanted, ordering, failures, pem }))
            }
            _ => None,
        }
    }
}

/// `None` if it comes from files.
fn id_of(certificate: &Certificate) -> Option<Id> {
    match &certificate.source {
        Source::Acme(acme) => Some(Id::of(&certificate.hosts, acme)),
        Source::Files(_) => None,
    }
}
