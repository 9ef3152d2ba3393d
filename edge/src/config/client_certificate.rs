//! `[client_certificate]`: whose certificates callers may show.

use std::path::PathBuf;

use serde::Deserialize;

/// `[client_certificate]`: whose certificates callers may show.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    /// PEM file of the authorities that issue them.
    pub ca: PathBuf,
    /// File of what these have revoked (RFC 5280 §5), in PEM or DER: a list of each authority there is between a caller and `ca`.
    /// Nothing is revoked if not told.
    pub crl: Option<PathBuf>,
    /// What of a certificate names its caller; the first that there is if not told.
    pub name: Option<NamedBy>,
}

/// What of a certificate names its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamedBy {
    /// The common name of its subject.
    Cn,
    /// Its first URI, such as a SPIFFE ID.
    Uri,
    /// Its first DNS name.
    Dns,
    /// Its first address for mail.
    Email,
}

impl NamedBy {
    /// In the order in which they are looked for.
    pub(crate) const ALL: [Self; 4] = [Self::Cn, Self::Uri, Self::Dns, Self::Email];
}
