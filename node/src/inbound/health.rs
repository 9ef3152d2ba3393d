//! Active checks of the local services: they set the state in this node's record, and so whether anybody calls.

use std::{sync::Arc, time::Duration};

use http::{Request, Uri};
use starling_http::Body;
use starling_protocol::ServiceState;
use tokio::task::JoinSet;

use crate::{
    config::{HealthConfig, ServiceConfig},
    inbound::{condition::Condition, local::LocalService},
};

/// Failed checks in a row that make a service unhealthy; one good one makes it healthy.
const FAILURES: u32 = 2;
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks each service that asks for it, as long as `tasks` run.
pub(crate) fn spawn(services: &[ServiceConfig], condition: &Condition, tasks: &mut JoinSet<()>) {
    for service in services {
        if let Some(health) = service.health.clone() {
            tasks.spawn(run(service.clone(), health, condition.clone()));
        }
    }
}

async fn run(service: ServiceConfig, health: HealthConfig, condition: Condition) {
    let local = LocalService::new(&service, Arc::default());
    let target = match health.path.map(|path| format!("http://{}{path}", service.name.service_host()).parse::<Uri>()) {
        None => None,
        Some(Ok(target)) => Some(target),
        Some(Err(error)) => return tracing::error!(service = %service.name, %error, "health check path"),
    };
    let mut state = condition.of(&service.name);
    // If nobody knows yet, it was announced as unhealthy, and the first check decides.
    let mut failures = if state == ServiceState::Up { 0 } else { FAILURES };
    loop {
        let answered = tokio::time::timeout(CHECK_TIMEOUT, is_well(&local, target.as_ref()));
        let good = answered.await.unwrap_or(false);
        failures = if good { 0 } else { failures.saturating_add(1) };
        let now = if failures >= FAILURES { ServiceState::Unhealthy } else { ServiceState::Up };
        if now != state && (good || now == ServiceState::Unhealthy) {
            state = now;
            tracing::info!(service = %service.name, ?state, "health");
            condition.checked(&service.name, state).await;
        }
        tokio::time::sleep(health.interval).await;
    }
}

/// Asks a service how it is, or, where there is nothing to ask, whether it takes connections.
async fn is_well(service: &LocalService, target: Option<&Uri>) -> bool {
    let Some(target) = target else { return service.is_reachable().await };
    let mut request = Request::new(Body::empty());
    request.uri_mut().clone_from(target);
    service.send(request).await.is_ok_and(|response| !response.status().is_server_error())
}
