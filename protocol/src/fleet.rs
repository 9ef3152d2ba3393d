//! What edges ask each other, over the streams of their links. Only edges are answered.

use bytes::Bytes;

use crate::{frame::kinds, wire::message};

// Each is answered by the one behind it.
kinds!(10 ShowChallenge, 11 ChallengeShown, 12 FindCertificate, 13 FoundCertificate);

/// Asks to show an authority what it looks for while it finds out whether a host's name is the asking edge's (RFC 8555 §8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShowChallenge {
    /// The host.
    pub host: String,
    /// Token of the challenge.
    pub token: String,
    /// The key authorization: what is to be found over HTTP, and what TLS is to show the digest of.
    pub authorization: String,
    /// Whether it will be looked at by a TLS handshake, not over HTTP.
    pub over_tls: bool,
}
message!(ShowChallenge { 1 host, 2 token, 3 authorization, 4 over_tls });

/// It is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChallengeShown {}
message!(ChallengeShown {});

/// Asks for a certificate that an authority has issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FindCertificate {
    /// Which: as edges derive it from the authority and the names.
    pub id: String,
    /// When the one was issued that the asking edge has, in seconds since 1970; 0 if it has none.
    pub newer_than: u64,
}
message!(FindCertificate { 1 id, 2 newer_than });

/// The certificate, and how it is with whoever has it issued.
#[derive(Clone, PartialEq, Eq)]
pub struct FoundCertificate {
    /// Whether the answering edge is meant to have it at all.
    pub wanted: bool,
    /// Whether it is having it issued at this moment.
    pub ordering: bool,
    /// How many tries to have it issued failed there, one after the other.
    pub failures: u32,
    /// Key and chain in PEM, if there is one that was issued later. Empty if not.
    pub pem: Bytes,
}
message!(FoundCertificate { 1 wanted, 2 ordering, 3 failures, 4 pem });

/// Without the key.
impl std::fmt::Debug for FoundCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { wanted, ordering, failures, pem: _ } = self;
        f.debug_struct("FoundCertificate")
            .field("wanted", wanted)
            .field("ordering", ordering)
            .field("failures", failures)
            .finish_non_exhaustive()
    }
}
