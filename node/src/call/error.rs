//! A call without an answer.

use std::time::Duration;

use http::StatusCode;
use starling_http::{Problem, ProxyError};

/// Whose fault a failed call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The caller asked for something impossible, or went away.
    Caller,
    /// No connection came about.
    Mesh,
    /// The connection broke, or its other end is going away.
    Connection,
    /// The service failed.
    Service,
}

/// Whether the service may have acted on a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// Certainly not: another attempt is safe, whatever the method.
    No,
    /// Perhaps.
    Maybe,
}

/// A call without an answer.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{detail}")]
pub struct CallError {
    /// Whose fault.
    pub fault: Fault,
    /// Whether the service may have acted.
    pub sent: Sent,
    /// Status to answer with.
    pub status: StatusCode,
    /// For Proxy-Status.
    pub error: ProxyError,
    /// What happened, for people.
    pub detail: String,
}

impl CallError {
    pub(super) fn new(
        fault: Fault,
        sent: Sent,
        status: StatusCode,
        error: ProxyError,
        detail: impl Into<String>,
    ) -> Self {
        Self { fault, sent, status, error, detail: detail.into() }
    }

    pub(super) fn terminated(sent: Sent, detail: impl Into<String>) -> Self {
        Self::new(Fault::Service, sent, StatusCode::BAD_GATEWAY, ProxyError::ConnectionTerminated, detail)
    }
}

impl From<CallError> for Problem {
    fn from(error: CallError) -> Self {
        let problem = Problem::proxy(error.status, error.error, error.detail);
        if error.status == StatusCode::SERVICE_UNAVAILABLE {
            problem.retry_after(Duration::from_secs(1))
        } else {
            problem
        }
    }
}
