//! The mesh as JSON.

use starling_gossip::{MemberView, Snapshot};
use starling_protocol::{MemberHealth, Name, NodeId, NodeKind, ServiceRecord, Sight, admin};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    call::Calls,
    inbound::limiter::Figures,
    mesh::announced::{Announced, AnnouncedVersion},
};

/// Seconds since 1970 as RFC 3339 writes them.
pub fn rfc3339(unix: u64) -> String {
    let at = i64::try_from(unix).ok().and_then(|t| OffsetDateTime::from_unix_timestamp(t).ok());
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default()
}

pub(crate) fn status_of(member: &MemberView) -> admin::MemberStatus {
    match member.health {
        _ if member.left => admin::MemberStatus::Left,
        MemberHealth::Alive => admin::MemberStatus::Alive,
        MemberHealth::Suspect => admin::MemberStatus::Suspect,
        MemberHealth::Down => admin::MemberStatus::Down,
    }
}

/// Name of a member, or its short id while the name is unknown.
pub(crate) fn name_of(snapshot: &Snapshot, id: &NodeId) -> String {
    let record = snapshot.member(id).and_then(|m| m.record.as_ref());
    record.map_or_else(|| format!("{id:?}"), |r| r.name.to_string())
}

/// Members as another node should be told.
pub(crate) fn sights(snapshot: &Snapshot) -> Vec<Sight> {
    let sight = |m: &MemberView| Sight { id: m.id, generation: m.generation, status: status_of(m) };
    snapshot.members.iter().map(sight).collect()
}

/// Members as this node sees them.
pub(crate) fn members(snapshot: &Snapshot) -> Vec<admin::Member> {
    snapshot
        .members
        .iter()
        .filter(|m| !snapshot.is_superseded(m))
        .map(|m| {
            let record = m.record.as_deref();
            let services = record.map_or(&[][..], |r| &r.services);
            admin::Member {
                name: record.map_or_else(|| format!("{:?}", m.id), |r| r.name.to_string()),
                id: m.id.to_string(),
                addr: m.addr,
                kind: record.map_or(NodeKind::Node, |r| r.kind),
                status: status_of(m),
                generation: m.generation,
                incarnation: m.incarnation,
                zone: record.map_or_else(String::new, |r| r.zone.clone()),
                services: services
                    .iter()
                    .map(|s| admin::MemberService {
                        name: s.name.clone(),
                        version: s.version.clone(),
                        protocol: s.protocol,
                        state: s.state,
                    })
                    .collect(),
                since: rfc3339(m.since),
                cert_expires: record.map(|r| rfc3339(r.cert_expires)),
                is_self: m.is_self,
                also_at: m.also_at,
                suspected_by: m.suspected_by.iter().map(|id| name_of(snapshot, id)).collect(),
                detail: None,
            }
        })
        .collect()
}

/// Services by version, with their instances.
pub(crate) fn services(snapshot: &Snapshot, calls: &Calls, limits: &[(Name, Figures)]) -> Vec<admin::Service> {
    let mut services: Vec<admin::Service> = Vec::new();
    let announced = Announced::of(snapshot);
    let told = |service: &ServiceRecord| announced.versions.get(&service.name)?.get(&service.version).cloned();
    for member in snapshot.members.iter().filter(|m| !m.left) {
        let Some(record) = &member.record else { continue };
        for service in &record.services {
            let seen = calls.seen(&member.id, &service.name);
            let limit = limits.iter().find(|(name, _)| member.is_self && *name == service.name);
            let instance = admin::ServiceInstance {
                node: record.name.to_string(),
                addr: member.addr,
                zone: record.zone.clone(),
                status: status_of(member),
                state: service.state,
                ejected: calls.is_ejected(&member.id, &service.name),
                protocol: service.protocol,
                in_flight: seen.map_or(0, |seen| seen.in_flight),
                latency_us: seen.and_then(|seen| seen.latency).map(|latency| latency.as_micros() as u64),
                limit: limit.map(|(_, figures)| admin::CallLimit { calls: figures.limit as u64, shed: figures.shed }),
            };
            match services.iter_mut().find(|s| s.name == service.name && s.version == service.version) {
                Some(known) => known.instances.push(instance),
                None => {
                    let repeats = calls.repeats_of(&service.name);
                    let AnnouncedVersion { deprecated, sunset, link } = told(service).unwrap_or_default();
                    services.push(admin::Service {
                        name: service.name.clone(),
                        version: service.version.clone(),
                        deprecated: deprecated.map(rfc3339),
                        sunset: sunset.map(rfc3339),
                        link,
                        instances: vec![instance],
                        retries: repeats.retries,
                        hedges: repeats.hedges,
                        retries_denied: repeats.denied,
                    });
                }
            }
        }
    }
    services.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    services
}
