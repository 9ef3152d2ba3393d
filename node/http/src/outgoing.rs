//! What is sent to a server, whatever protocol it speaks.

use http::{HeaderMap, Method};

use crate::{Interim, tunnel::Protocol};

/// The head of a request. Its fields are in normal form.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Method. Towards a server of HTTP/1.1, CONNECT with a protocol becomes GET.
    pub method: &'a Method,
    /// Authority.
    pub authority: &'a str,
    /// Path and query; plain CONNECT has none.
    pub path: &'a str,
    /// All other fields.
    pub fields: &'a HeaderMap,
    /// What the tunnel is for that CONNECT asks for; bytes to the authority if `None`.
    pub protocol: Option<&'a Protocol>,
    /// Where interim answers go; they are passed over if there is nowhere.
    pub interim: Option<&'a Interim>,
}
