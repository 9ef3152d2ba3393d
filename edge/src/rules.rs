//! What an edge's policy is made of: its own file, what is published for all edges, and what nodes announce. When one of them
//! changes the policy is made anew, or stays as it was.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, Guard};
use starling_node::{Announced, AnnouncedVersion, StateDir};
use starling_protocol::Name;

use crate::{
    client_certificate::Authorities,
    config::{EdgeSections, Published},
    policy::Policy,
};

/// The policy in force, and where it comes from.
pub(crate) struct Rules {
    policy: ArcSwap<Policy>,
    state: StateDir,
    /// Locked while a policy is made, so that none is made of what is out of date.
    sources: Mutex<Sources>,
}

#[derive(Clone)]
struct Sources {
    own: EdgeSections,
    /// Whose certificates callers may show, as the files that `own` names said when they were read last.
    client_authorities: Option<Arc<Authorities>>,
    /// Where the file says that the rules come from there: what was published last.
    published: Option<Arc<Published>>,
    announced: Arc<Announced>,
    /// When each version was announced last.
    seen: BTreeMap<(Name, String), (Instant, AnnouncedVersion)>,
}

/// How long a version is known whose last node has left.
const KEPT: Duration = Duration::from_secs(20);

/// Reads whose certificates callers may show.
fn authorities(own: &EdgeSections) -> Result<Option<Arc<Authorities>>, String> {
    let Some(config) = &own.client_certificate else { return Ok(None) };
    let read = Authorities::load(config).map_err(|(key, why)| format!("client_certificate.{key}: {why}"))?;
    if let Some(why) = read.doubt() {
        tracing::warn!("client_certificate.crl: {why}");
    }
    Ok(Some(Arc::new(read)))
}

impl Sources {
    fn policy(&self, former: Option<&Policy>, state: &StateDir) -> Result<Policy, String> {
        let published = self.published.as_ref().filter(|_| self.own.edge.config.is_some());
        let sections = published.map(|published| published.fill(&self.own));
        let authorities = self.client_authorities.clone();
        Policy::new(sections.as_ref().unwrap_or(&self.own), former, state, &self.announced, authorities)
    }
}

impl Rules {
    /// Of the file alone. Needs a runtime, where keys are fetched.
    pub(crate) fn new(own: EdgeSections, state: StateDir) -> Result<Self, String> {
        let client_authorities = authorities(&own)?;
        let (announced, seen) = (Arc::default(), BTreeMap::new());
        let sources = Sources { own, client_authorities, published: None, announced, seen };
        let policy = ArcSwap::from_pointee(sources.policy(None, &state)?);
        Ok(Self { policy, state, sources: Mutex::new(sources) })
    }

    /// The policy in force.
    pub(crate) fn policy(&self) -> Guard<Arc<Policy>> {
        self.policy.load()
    }

    /// Takes another file, if `then` works out as well, which is what else it changes.
    pub(crate) fn reload(&self, own: EdgeSections, then: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let client_authorities = authorities(&own)?;
        let change = |sources: &mut Sources| {
            sources.own = own;
            sources.client_authorities = client_authorities;
        };
        self.change(change, then)
    }

    /// Reads the files of the authorities of callers' certificates again that are in force: what is revoked is revoked, whatever is
    /// wrong with everything else.
    pub(crate) fn reload_authorities(&self) -> Result<(), String> {
        let mut sources = self.lock();
        let read = authorities(&sources.own)?;
        sources.client_authorities = read.clone();
        let policy = self.policy.load().trusting(read);
        self.policy.store(Arc::new(policy));
        Ok(())
    }

    /// Takes what was published for all edges, or that it is no more. An edge that goes by its own file keeps it for the time when its
    /// file says otherwise.
    pub(crate) fn publish(&self, document: Option<&[u8]>) -> Result<(), String> {
        let goes_by_it = self.lock().own.edge.config.is_some();
        let published = match document.map(Published::read).transpose() {
            Ok(published) => published,
            Err(why) if goes_by_it => return Err(why),
            Err(_) => None,
        };
        self.change(|sources| sources.published = published.map(Arc::new), || Ok(()))
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Sources),
        then: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), String> {
        let mut sources = self.lock();
        let mut next = sources.clone();
        change(&mut next);
        let policy = next.policy(Some(&self.policy.load()), &self.state)?;
        then()?;
        *sources = next;
        self.policy.store(Arc::new(policy));
        Ok(())
    }

    /// Takes what nodes announce. A version whose last node has left stays known for a while: a node that is started anew has left,
    /// too, and its callers are not to be told that there is no such version.
    pub(crate) fn announce(&self, mut announced: Announced) {
        let (now, mut sources) = (Instant::now(), self.lock());
        for (service, versions) in &announced.versions {
            for (name, told) in versions {
                sources.seen.insert((service.clone(), name.clone()), (now, told.clone()));
            }
        }
        sources.seen.retain(|_, (at, _)| now - *at < KEPT);
        for ((service, name), (_, told)) in &sources.seen {
            let versions = announced.versions.entry(service.clone()).or_default();
            versions.entry(name.clone()).or_insert_with(|| told.clone());
        }
        if *sources.announced != announced {
            if let Some(policy) = self.policy.load().with(&announced) {
                self.policy.store(Arc::new(policy));
            }
            sources.announced = Arc::new(announced);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(|e| e.into_inner())
    }
}
