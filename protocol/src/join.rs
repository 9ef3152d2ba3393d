use std::{fmt, net::SocketAddr};

use bytes::Bytes;

use crate::{
    Name, NodeId,
    frame::kinds,
    wire::{message, nested, open_enum},
};

/// Longest frame on a join stream, in bytes, but for ledgers.
pub const MAX_JOIN_FRAME_BYTES: usize = 64 << 10;
/// Longest ledger, in bytes: some sixteen thousand names.
pub const MAX_LEDGER_BYTES: usize = 12 << 20;

// What a node asks of the mesh over `starling-join/1`: to `Join`, to `Renew`, either of them `Relayed` by a member, or, of an
// issuer by another, the `Ledger`. Answered by an issuer's `SignedAnswer`, by a `Refusal` that anybody can give and that is
// therefore a hint, or by a `Ledger`.
kinds!(16 Join, 17 Renew, 18 Relayed, 19 SignedAnswer, 20 Refusal, 21 Ledger);

/// Request for a first certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// Encoding of an [`Application`].
    pub application: Bytes,
    /// HMAC-SHA256, keyed with the token's secret, over [`Join::proven_bytes`]. The secret itself stays home; the proof is
    /// worth nothing without the private key of the CSR.
    pub proof: [u8; 32],
}

message!(Join { 1 application, 2 proof });

impl Join {
    /// The bytes that `proof` covers.
    pub fn proven_bytes(application: &[u8]) -> Vec<u8> {
        [b"starling join v1\0".as_slice(), application].concat()
    }
}

/// What a joining node wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Application {
    /// Which version of joining the node speaks: [`Application::VERSION`].
    pub version: u16,
    /// The token's claims, exactly as in the token.
    pub claims: Bytes,
    /// The name that the node wants.
    pub name: Name,
    /// The services that it means to announce; each must be granted.
    pub services: Vec<Name>,
    /// PKCS #10 request (RFC 2986), DER.
    pub csr: Bytes,
    /// A second request, for the issuing key, if the token grants that.
    pub issuer_csr: Option<Bytes>,
}

message!(Application { 1 version, 2 claims, 3 name, 4 services, 5 csr, 6 issuer_csr });

impl Application {
    /// The version of joining that this software speaks.
    pub const VERSION: u16 = 1;
}

/// Request for the next certificate. The CSR's key must be the certificate's key, which proves possession.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renew {
    /// PKCS #10 request, DER.
    pub csr: Bytes,
    /// The current chain, the node's own certificate first. It may have ended up to seven days ago.
    pub chain: Vec<Bytes>,
}

message!(Renew { 1 csr, 2 chain });

/// A request that a member passes on. Taken from members only, and never passed on again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relayed {
    /// Kind of the request.
    pub kind: u64,
    /// The request, byte for byte: the answer is bound to it.
    pub request: Bytes,
}

message!(Relayed { 1 kind, 2 request });

/// An issuer's word about a request. Whoever carries it can lose it, and not alter it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedAnswer {
    /// Encoding of an [`Answer`].
    pub body: Bytes,
    /// ECDSA P-256 with SHA-256 by the issuing key over [`SignedAnswer::signed_bytes`], ASN.1 encoded.
    pub signature: Bytes,
    /// DER certificate of the issuing key, signed by the mesh's root.
    pub issuer: Bytes,
}

message!(SignedAnswer { 1 body, 2 signature, 3 issuer });

impl SignedAnswer {
    /// The bytes that are signed.
    pub fn signed_bytes(body: &[u8]) -> Vec<u8> {
        [b"starling answer v1\0".as_slice(), body].concat()
    }
}

/// What an issuer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// SHA-256 of the request: kind (variable-length integer) and bytes.
    pub request: [u8; 32],
    /// Welcome.
    pub granted: Option<Grant>,
    /// No, and why.
    pub refused: Option<Refusal>,
}

message!(Answer { 1 request, 2 granted, 3 refused });

/// What a node gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Its certificate, then its issuer's.
    pub chain: Vec<Bytes>,
    /// The root certificate of the mesh.
    pub root: Bytes,
    /// The certificate for its own issuing key, if asked for and granted.
    pub issuer_cert: Option<Bytes>,
    /// Where other members answer, so that the node is not lost when its seed dies.
    pub peers: Vec<SocketAddr>,
    /// Versions of mesh documents that the mesh has reached: the node takes none that is older.
    pub floors: Vec<Floor>,
}

message!(Grant { 1 chain, 2 root, 3 issuer_cert, 4 peers, 5 floors });
nested!(Grant);

/// The version that a kind of document has reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Floor {
    /// Which document.
    pub kind: Name,
    /// Which version.
    pub version: u64,
}

message!(Floor { 1 kind, 2 version });
nested!(Floor);

open_enum! {
    /// Why a request is refused.
    RefusalCode {
        /// No reason that has a number.
        0 Other "other",
        /// The token is past its time.
        1 Expired "expired",
        /// All uses of the token are spent.
        2 Used "used",
        /// Not made, or changed after it was made, by the issuer that the token names.
        3 Forged "forged",
        /// Made for another mesh.
        4 Foreign "foreign",
        /// Asks for more than the token grants.
        5 NotGranted "not-granted",
        /// Another key has the name.
        6 NameTaken "name-taken",
        /// The issuer named in the token does not answer.
        7 IssuerUnreachable "issuer-unreachable",
        /// The certificate to renew is not valid.
        8 NotRenewable "not-renewable",
        /// The issuer cannot do it.
        9 Issuer "issuer",
        /// Not understood.
        10 Malformed "malformed",
    }
}

/// A refusal. `Display` is what the person at the other end reads, with the next step in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// Why, for programs.
    pub code: RefusalCode,
    /// Why, for people.
    pub text: String,
    /// Whether the same request may succeed later without anyone changing it.
    pub passes: bool,
}

message!(Refusal { 1 code, 2 text, 3 passes });
nested!(Refusal);

impl Refusal {
    fn new(code: RefusalCode, text: impl fmt::Display) -> Self {
        let passes = matches!(code, RefusalCode::IssuerUnreachable | RefusalCode::Issuer);
        Self { code, text: text.to_string(), passes }
    }

    /// Past its time.
    pub fn expired() -> Self {
        Self::new(RefusalCode::Expired, "the token has expired; make a new one with `starling token create`")
    }

    /// All uses are spent.
    pub fn used() -> Self {
        let text = "the token has been used already; make a new one with `starling token create` (or with `--uses N`)";
        Self::new(RefusalCode::Used, text)
    }

    /// Not made, or changed after it was made, by the issuer that it names.
    pub fn forged() -> Self {
        let text = "the token was not made by this mesh's issuer, or was altered; copy it again or make a new one";
        Self::new(RefusalCode::Forged, text)
    }

    /// Made for another mesh.
    pub fn foreign() -> Self {
        let text = "the token belongs to another mesh; check the seed address, or make a token on this mesh";
        Self::new(RefusalCode::Foreign, text)
    }

    /// Asks for more than the token grants.
    pub fn not_granted(what: impl fmt::Display) -> Self {
        let text = format!("the token does not grant {what}; make one that does with `starling token create`");
        Self::new(RefusalCode::NotGranted, text)
    }

    /// Another key has the name.
    pub fn name_taken(name: &Name) -> Self {
        let text = format!(
            "the name {:?} belongs to another node; choose another --name, or free it on an issuer with \
             `starling names free {name}` if that node is gone for good",
            name.as_str()
        );
        Self::new(RefusalCode::NameTaken, text)
    }

    /// The issuer named in the token does not answer.
    pub fn issuer_unreachable() -> Self {
        let text = "the issuer that made this token cannot be reached from the seed; try again, or use a token of \
                    another issuer";
        Self::new(RefusalCode::IssuerUnreachable, text)
    }

    /// The certificate to renew is not valid.
    pub fn not_renewable(why: impl fmt::Display) -> Self {
        let text = format!("the certificate cannot be renewed: {why}; join again with a new token");
        Self::new(RefusalCode::NotRenewable, text)
    }

    /// The issuer cannot do it.
    pub fn issuer(why: impl fmt::Display) -> Self {
        Self::new(RefusalCode::Issuer, format!("the issuer cannot sign: {why}"))
    }

    /// Not understood.
    pub fn malformed(why: impl fmt::Display) -> Self {
        Self::new(RefusalCode::Malformed, format!("the request was not understood: {why}"))
    }
}

/// Names and the keys that they belong to, as issuers tell each other. Asked with what the asking issuer has; answered with
/// what it lacks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Each signed by the issuer that made it.
    pub entries: Vec<SignedReservation>,
    /// These are all that the asking issuer has; otherwise only what concerns the same names, and [`Ledger::about`], is wanted.
    pub whole: bool,
    /// SHA-256 over all entries of who says so, by name. Where it is that of the answering issuer, nothing is lacking.
    pub digest: Option<[u8; 32]>,
    /// Names of which everything is wanted, whether the asking issuer has anything of them or not.
    pub about: Vec<Name>,
}

message!(Ledger { 1 entries, 2 whole, 3 digest, 4 about });

/// That a name belongs to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// The name.
    pub name: Name,
    /// The key's id.
    pub key: NodeId,
    /// Since when, unix seconds: of two keys, the earlier has the name.
    pub since: u64,
    /// Until when: the end of its certificate, and the grace in which that can be renewed.
    pub until: u64,
    /// When the name was freed by a person, unix seconds; 0 if it was not.
    pub freed: u64,
}

message!(Reservation { 1 name, 2 key, 3 since, 4 until, 5 freed });

/// A reservation as it travels between issuers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedReservation {
    /// Encoding of a [`Reservation`].
    pub body: Bytes,
    /// ECDSA P-256 with SHA-256 by the issuing key over [`SignedReservation::signed_bytes`], ASN.1 encoded.
    pub signature: Bytes,
    /// DER certificate of the issuing key, signed by the mesh's root.
    pub issuer: Bytes,
}

message!(SignedReservation { 1 body, 2 signature, 3 issuer });
nested!(SignedReservation);

impl SignedReservation {
    /// The bytes that are signed.
    pub fn signed_bytes(body: &[u8]) -> Vec<u8> {
        [b"starling reservation v1\0".as_slice(), body].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{decode, encode};

    #[test]
    fn a_refusal_says_the_same_to_who_does_not_know_its_code() {
        let mut refusal = Refusal::name_taken(&"orders".parse().unwrap());
        refusal.code = RefusalCode::Unknown(99);
        assert_eq!(decode::<Refusal>(&encode(&refusal)), Ok(refusal));
        assert!(Refusal::issuer_unreachable().passes && !Refusal::used().passes);
    }
}
