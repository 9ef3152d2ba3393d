//! What edges ask each other, over the streams of their links. Only edges are answered.

use bytes::Bytes;

use crate::{
    frame::kinds,
    wire::{message, nested},
};

// Each is answered by the one behind it.
kinds!(10 ShowChallenge, 11 ChallengeShown, 12 FindCertificate, 13 FoundCertificate, 14 AskCounts, 15 TellCounts);

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

/// What an edge has to say and to ask about the counts of quotas, many at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AskCounts {
    /// What it would take of counters that the asked edge owns. Done when all that it knows is heard.
    pub takes: Vec<TakeCount>,
    /// What it knows of counters.
    pub knows: Vec<KnownCount>,
    /// Counters that it would know of what the asked edge knows.
    pub finds: Vec<String>,
}
message!(AskCounts { 1 takes, 2 knows, 3 finds });

/// Asks for a lease: calls that an edge may let through by itself, counted as used from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakeCount {
    /// Which counter: plan, time and caller.
    pub key: String,
    /// The part of time for which it is counted: its begin, in seconds since 1970.
    pub part: u64,
    /// From which part on what was counted counts, in seconds since 1970.
    pub since: u64,
    /// How much may be counted, all in all.
    pub limit: u64,
    /// How much is of use; less is not to be given.
    pub least: u64,
    /// How much would be taken.
    pub most: u64,
}
message!(TakeCount { 1 key, 2 part, 3 since, 4 limit, 5 least, 6 most });

/// What is known of a counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownCount {
    /// Which counter.
    pub key: String,
    /// By parts of time and processes that count, as edges keep it: what two edges know is merged by the larger numbers.
    pub counts: Bytes,
}
message!(KnownCount { 1 key, 2 counts });

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TellCounts {
    /// In the order of what was to be taken.
    pub taken: Vec<TakenCount>,
    /// What is known of what was to be found; not there if it is nothing.
    pub found: Vec<KnownCount>,
    /// Whether some of it was left out, because it is too much.
    pub cut: bool,
}
message!(TellCounts { 1 taken, 2 found, 3 cut });

/// A lease, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenCount {
    /// How much is given; 0 if there is not enough.
    pub taken: u64,
    /// What is known of the counter now, as in [`KnownCount`].
    pub counts: Bytes,
}
message!(TakenCount { 1 taken, 2 counts });
nested!(TakeCount, KnownCount, TakenCount);
