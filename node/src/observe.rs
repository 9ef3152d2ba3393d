//! What operators see of calls.

pub(crate) mod metrics;
