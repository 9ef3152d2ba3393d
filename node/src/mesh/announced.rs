//! The versions of services, as the nodes announce them that serve them.

use std::{collections::BTreeMap, sync::Arc};

use starling_gossip::{GossipHandle, Snapshot};
use starling_protocol::{Name, ServiceRecord};
use tokio::sync::watch;

/// What is announced of a version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AnnouncedVersion {
    /// Since when, or from when on, it should not be used any more, in seconds since 1970: the earliest that an instance says.
    pub deprecated: Option<u64>,
    /// From when on it is gone, in seconds since 1970: the latest that an instance says, and never if one says nothing.
    pub sunset: Option<u64>,
    /// Where that is explained, if those who say it say the same.
    pub link: Option<String>,
}

impl AnnouncedVersion {
    /// What instances say together. No one of them can end a version that others serve.
    fn of(instances: &[&ServiceRecord]) -> Self {
        let mut links: Vec<&String> = instances.iter().map(|s| &s.link).filter(|link| !link.is_empty()).collect();
        links.dedup();
        let ends = instances.iter().all(|service| service.sunset > 0);
        Self {
            deprecated: instances.iter().map(|service| service.deprecated).filter(|unix| *unix > 0).min(),
            sunset: instances.iter().map(|service| service.sunset).max().filter(|_| ends),
            link: (links.len() == 1).then(|| links[0].clone()),
        }
    }
}

/// What nodes announce.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announced {
    /// Versions by service and name; of nodes that have not left, and of those that are alive if there are any. Services without a
    /// version have none.
    pub versions: BTreeMap<Name, BTreeMap<String, AnnouncedVersion>>,
    /// Whether the mesh has been heard; before that there may be more.
    pub settled: bool,
}

impl Announced {
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        let mut instances: BTreeMap<(Name, String), [Vec<&ServiceRecord>; 2]> = BTreeMap::new();
        for member in snapshot.members.iter().filter(|member| !member.left && !snapshot.is_superseded(member)) {
            for service in member.record.iter().flat_map(|record| &record.services).filter(|s| !s.version.is_empty()) {
                let of_version = instances.entry((service.name.clone(), service.version.clone())).or_default();
                of_version[usize::from(!member.is_live())].push(service);
            }
        }
        let mut versions: BTreeMap<Name, BTreeMap<String, AnnouncedVersion>> = BTreeMap::new();
        for ((name, version), [alive, others]) in instances {
            let told = AnnouncedVersion::of(if alive.is_empty() { &others } else { &alive });
            versions.entry(name).or_default().insert(version, told);
        }
        Self { versions, settled: snapshot.introduced }
    }
}

/// Follows what nodes announce. Cheap to clone.
#[derive(Clone)]
pub struct Announcements(watch::Receiver<Arc<Snapshot>>);

impl Announcements {
    pub(crate) fn new(gossip: &GossipHandle) -> Self {
        Self(gossip.watch())
    }

    /// What is announced now.
    pub fn now(&self) -> Announced {
        Announced::of(&self.0.borrow())
    }

    /// Waits until something about the mesh has changed, that or anything else; `false` if nothing will any more. Cancel safe.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}
