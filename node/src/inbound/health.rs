//! Active checks of the local services: they set the state in this node's record, and so whether anybody calls.

use std::time::Duration;

use http::{Request, Uri};
use starling_http::Body;
use starling_protocol::ServiceState;

use crate::{
    config::{HealthConfig, ServiceConfig},
    inbound::{condition::Condition, local::LocalService},
};

/// Failed checks in a row that make a service unhealthy; one good one makes it healthy.
const FAILURES: u32 = 2;
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks each service that asks for it, for as long as the node runs.
pub(crate) fn spawn(services: &[ServiceConfig], condition: &Condition) {
    for service in services {
        if let Some(health) = service.health.clone() {
            tokio::spawn(run(service.clone(), health, condition.clone()));
        }
    }
}

async fn run(service: ServiceConfig, health: HealthConfig, condition: Condition) {
    let local = LocalService::new(&service);
    let target: Uri = match format!("http://{}{}", service.name.service_host(), health.path).parse() {
        Ok(target) => target,
        Err(error) => return tracing::error!(service = %service.name, %error, "health check path"),
    };
    // Nobody knows yet: it was announced as unhealthy, and the first check decides.
    let mut failures = FAILURES;
    let mut state = ServiceState::Unhealthy;
    loop {
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = target.clone();
        let answer = tokio::time::timeout(CHECK_TIMEOUT, local.send(request)).await;
        let good = matches!(answer, Ok(Ok(response)) if !response.status().is_server_error());
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
