//! What is sent to a server, whatever protocol it speaks.

use http::{HeaderMap, Method};

use crate::Interim;

/// The head of a request. Its fields are in normal form.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Method; CONNECT is not sent.
    pub method: &'a Method,
    /// Authority.
    pub authority: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// All other fields.
    pub fields: &'a HeaderMap,
    /// Where interim answers go; they are passed over if there is nowhere.
    pub interim: Option<&'a Interim>,
}
