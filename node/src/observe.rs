//! What operators see of calls: accounts of them by caller and service, and traces.
//!
//! Doors note calls with an [`observer::Observer`], one a worker. [`readings`] adds up what all workers have noted, beside what
//! the node knows of itself; `/metrics` ([`text`]) and the export to a collector ([`otlp`]) show the same readings.

pub(crate) mod distribution;
pub(crate) mod ledger;
pub(crate) mod observer;
pub(crate) mod otlp;
pub(crate) mod packets;
pub(crate) mod readings;
pub(crate) mod text;
pub mod trace;

use starling_protocol::Name;

/// Under which name a node's calls are counted: the services that its certificate lists, or its own where there are none.
pub(crate) fn caller_name(services: &[Name], node: &Name) -> String {
    match services {
        [] => node.to_string(),
        services => services.iter().map(Name::as_str).collect::<Vec<_>>().join(","),
    }
}
