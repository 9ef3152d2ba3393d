//! What others are told about the services of this node: whether to call them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use starling_gossip::GossipHandle;
use starling_protocol::{Name, ServiceState};

use crate::{config::ServiceConfig, takeover::Health};

/// The condition of the services here. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Condition(Arc<Inner>);

struct Inner {
    gossip: GossipHandle,
    state: Mutex<State>,
}

struct State {
    /// Of services that are checked.
    health: HashMap<Name, ServiceState>,
    /// Why others cannot reach this node; then none of its services is to be called.
    not_reached: Option<String>,
}

impl Condition {
    /// Of a service that is checked nobody knows how it is before the first check, but for what the process before has `known`.
    pub(crate) fn new(services: &[ServiceConfig], gossip: GossipHandle, known: &[Health]) -> Self {
        let checked = services.iter().filter(|service| service.health.is_some());
        let health = checked.map(|service| (service.name.clone(), at_first(service, known))).collect();
        Self(Arc::new(Inner { gossip, state: Mutex::new(State { health, not_reached: None }) }))
    }

    /// A check of a service came out differently than the one before.
    pub(crate) async fn checked(&self, service: &Name, state: ServiceState) {
        self.lock().health.insert(service.clone(), state);
        self.announce().await;
    }

    /// Others can, or cannot, reach this node.
    pub(crate) async fn reached(&self, why_not: Option<String>) {
        let changed = {
            let mut state = self.lock();
            let changed = state.not_reached.is_some() != why_not.is_some();
            state.not_reached = why_not;
            changed
        };
        if changed {
            self.announce().await;
        }
    }

    /// Why others cannot reach this node, as far as is known.
    pub(crate) fn not_reached(&self) -> Option<String> {
        self.lock().not_reached.clone()
    }

    /// How the services are that are checked, for a process that takes over.
    pub(crate) fn health(&self, services: &[ServiceConfig]) -> Vec<Health> {
        let state = self.lock();
        let known = |service: &ServiceConfig| {
            let state = *state.health.get(&service.name)?;
            Some(Health { service: service.name.clone(), addr: service.addr, state })
        };
        services.iter().filter_map(known).collect()
    }

    /// How a service is that is checked.
    pub(crate) fn of(&self, service: &Name) -> ServiceState {
        self.lock().health.get(service).copied().unwrap_or(ServiceState::Unhealthy)
    }

    async fn announce(&self) {
        // Read when it is announced, so that whoever comes second does not announce the older state.
        let of = self.clone();
        let announced = self.0.gossip.announce(move |announcement| {
            let state = of.lock();
            let (health, reached) = (&state.health, state.not_reached.is_none());
            for service in &mut announcement.services {
                service.state = match reached {
                    true => health.get(&service.name).copied().unwrap_or(ServiceState::Up),
                    false => ServiceState::Unhealthy,
                };
            }
        });
        announced.await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// How a service is before it is checked here.
pub(crate) fn at_first(service: &ServiceConfig, known: &[Health]) -> ServiceState {
    let is_it = |health: &&Health| health.service == service.name && health.addr == service.addr;
    match service.health {
        None => ServiceState::Up,
        Some(_) => known.iter().find(is_it).map_or(ServiceState::Unhealthy, |health| health.state),
    }
}
