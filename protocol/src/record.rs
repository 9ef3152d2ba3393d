use std::{net::SocketAddr, str::FromStr};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::{
    Name, NodeId,
    wire::{Message as _, Unknown, Value, WireError, message, nested, once, open_enum, put_message, take_array},
};

/// Largest encoded record, in bytes.
pub const MAX_RECORD_BYTES: usize = 16 << 10;
/// Most services one node may announce.
pub const MAX_SERVICES: usize = 128;
/// Largest share of calls that counts, as [`ServiceRecord::weight`]: ten times the usual one.
pub const MAX_WEIGHT: u16 = 1000;
/// Longest zone or version of a service, in bytes.
pub const MAX_LABEL_BYTES: usize = 64;
/// Longest link of a service's version, in bytes.
pub const MAX_LINK_BYTES: usize = 512;
/// Most certificates of a record that are read; two are right.
const MAX_CERTIFICATES: usize = 8;
/// The format of records that this version writes.
const FORMAT: u8 = 1;
/// Bytes of a record's prefix: id, generation, seq, format.
const PREFIX_BYTES: usize = 16 + 8 + 8 + 1;
/// Stands for a choice that cannot be made because something critical beside it is not understood.
const NOT_UNDERSTOOD: u8 = 0xff;

/// What a node says about itself. Only that node can sign it; `(generation, seq)` orders a node's own records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Who; equals the hash of the signing key.
    pub id: NodeId,
    /// Which life of the node.
    pub generation: u64,
    /// Which edition within that life.
    pub seq: u64,
    /// Name, as in the certificate.
    pub name: Name,
    /// Advertised address of the mesh port; the same for a whole life.
    pub addr: SocketAddr,
    /// Plain node or edge.
    pub kind: NodeKind,
    /// Where it stands; empty if not told.
    pub zone: String,
    /// What it serves.
    pub services: Vec<ServiceRecord>,
    /// Whether it takes new calls.
    pub phase: Phase,
    /// End of its certificate, in unix seconds.
    pub cert_expires: u64,
    /// That it can admit and renew nodes.
    pub issuer: Option<IssuerProof>,
    /// Which versions of the protocol it speaks, and what it can do beyond.
    pub speaks: Capabilities,
}

message!(NodeRecord, given (id: NodeId, generation: u64, seq: u64) {
    1 name, 2 addr, 3 kind, 4 zone, 5 services, 6 phase, 7 cert_expires, 8 issuer, 9 speaks,
});

/// What every form of a record says at the same place.
struct Place {
    name: Name,
    addr: SocketAddr,
}

message!(Place { 1 name, 2 addr });

impl NodeRecord {
    /// Total order of one node's records: newer wins.
    pub fn edition(&self) -> (u64, u64) {
        (self.generation, self.seq)
    }

    /// Reads a body. Of one that is not understood in full, by its format or a critical field, only what this version knows
    /// is there, and the phase is an unknown one: such a node is a member, and not called.
    fn read(body: &[u8]) -> Result<Self, WireError> {
        let mut rest = body;
        let id = NodeId(take_array(&mut rest)?);
        let generation = u64::from_be_bytes(take_array(&mut rest)?);
        let seq = u64::from_be_bytes(take_array(&mut rest)?);
        let [format] = take_array(&mut rest)?;
        match Self::read_fields(rest, Unknown::Ignored, id, generation, seq) {
            Ok(record) if format == FORMAT => return Ok(record),
            Err(error) if format == FORMAT && !matches!(error, WireError::NotUnderstood(_)) => return Err(error),
            _ => {}
        }
        // Who and where, which stands at the same place in every form, and nothing else.
        let Place { name, addr } = Place::read(rest, Unknown::Skipped)?;
        Ok(Self {
            id,
            generation,
            seq,
            name,
            addr,
            kind: NodeKind::Unknown(NOT_UNDERSTOOD),
            zone: String::new(),
            services: Vec::new(),
            phase: Phase::Unknown(NOT_UNDERSTOOD),
            cert_expires: 0,
            issuer: None,
            speaks: Capabilities { oldest: 0, newest: 0, features: 0, software: String::new() },
        })
    }
}

open_enum! {
    /// Plain node or edge.
    NodeKind {
        /// Beside a service.
        0 Node "node",
        /// With public listeners.
        1 Edge "edge",
    }
}

open_enum! {
    /// Where a node is in its life, by its own word.
    Phase {
        /// Takes calls.
        0 Up "up",
        /// Finishes what it has; give it nothing new.
        1 Draining "draining",
        /// Gone on purpose: not a failure.
        2 Left "left",
    }
}

open_enum! {
    /// How a node speaks to the service behind it. Declared, never sniffed.
    #[derive(Default)]
    Protocol {
        /// HTTP/1.1 (RFC 9112).
        #[default]
        0 Http1 "http1",
        /// HTTP/2 without TLS, prior knowledge (RFC 9113 §3.3); what gRPC servers speak.
        1 H2c "h2c",
        /// Bytes of a TCP connection, whatever they are.
        2 Tcp "tcp",
        /// UDP packets.
        3 Udp "udp",
    }
}

open_enum! {
    /// Whether an instance can be called.
    ServiceState {
        /// Yes.
        0 Up "up",
        /// Finishes what it has.
        1 Draining "draining",
        /// Its health check fails.
        2 Unhealthy "unhealthy",
    }
}

impl FromStr for Protocol {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "http1" => Ok(Self::Http1),
            "h2c" => Ok(Self::H2c),
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(format!("unknown protocol {text:?}; use http1, h2c, tcp or udp")),
        }
    }
}

/// One service behind a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRecord {
    /// What callers ask for.
    pub name: Name,
    /// API version of this instance; empty if not told.
    pub version: String,
    /// How the node speaks to it.
    pub protocol: Protocol,
    /// Share of calls relative to other instances; 100 is normal, 0 none, and more than [`MAX_WEIGHT`] counts as that.
    pub weight: u16,
    /// Whether it can be called now.
    pub state: ServiceState,
    /// Since when, or from when on, that version should not be used any more (RFC 9745), in seconds since 1970; 0 if not told.
    pub deprecated: u64,
    /// From when on it is gone (RFC 8594), in seconds since 1970; 0 if not told.
    pub sunset: u64,
    /// Where that is explained: an absolute URI. Empty if not told.
    pub link: String,
}

message!(ServiceRecord { 1 name, 2 version, 3 protocol, 4 weight, 5 state, 6 deprecated, 7 sunset, 8 link });

impl ServiceRecord {
    /// A service that can be called, with everything else as usual: no version, and the usual share.
    pub fn new(name: Name, protocol: Protocol) -> Self {
        Self {
            name,
            version: String::new(),
            protocol,
            weight: 100,
            state: ServiceState::Up,
            deprecated: 0,
            sunset: 0,
            link: String::new(),
        }
    }

    /// Whether this version can call it.
    pub fn is_callable(&self) -> bool {
        self.state == ServiceState::Up && self.weight > 0 && !matches!(self.protocol, Protocol::Unknown(_))
    }
}

/// A service that is not understood in full is there, and not called.
impl Value for ServiceRecord {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        put_message(self, tag, out);
    }

    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError> {
        let service = match Self::read_fields(value, unknown) {
            Err(WireError::NotUnderstood(_)) => {
                let state = ServiceState::Unknown(NOT_UNDERSTOOD);
                Self { state, ..Self::read_fields(value, Unknown::Skipped)? }
            }
            read => read?,
        };
        once(slot, service)
    }
}

/// Proof that a node may issue certificates: the issuing key's certificate, which ends in the mesh's root, and that key's
/// word for this node. Either alone proves nothing, since certificates are public.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerProof {
    /// DER certificate of the issuing key, signed by the mesh's root.
    pub certificate: Bytes,
    /// ECDSA P-256 with SHA-256 by the issuing key over [`IssuerProof::signed_bytes`], ASN.1 encoded.
    pub signature: Bytes,
}

message!(IssuerProof { 1 certificate, 2 signature });
nested!(IssuerProof);

impl IssuerProof {
    /// What the issuing key signs for a node.
    pub fn signed_bytes(node: NodeId) -> Vec<u8> {
        [b"starling issuer v1\0".as_slice(), &node.0].concat()
    }
}

/// What a node can speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Oldest version of the protocol between nodes that it speaks.
    pub oldest: u16,
    /// Newest.
    pub newest: u16,
    /// A bit for each thing that it can do beyond what all nodes of these versions can. Used only towards nodes that have it.
    pub features: u64,
    /// Its software, for operators.
    pub software: String,
}

message!(Capabilities { 1 oldest, 2 newest, 3 features, 4 software });
nested!(Capabilities);

impl Capabilities {
    /// The version of the protocol between nodes that this software speaks.
    pub const PROTOCOL: u16 = 1;

    /// What this software can do.
    pub fn own(software: &str) -> Self {
        Self { oldest: Self::PROTOCOL, newest: Self::PROTOCOL, features: 0, software: software.into() }
    }

    /// Whether it can do something: the number of its bit.
    pub fn has(&self, feature: u32) -> bool {
        self.features.checked_shr(feature).is_some_and(|bits| bits & 1 == 1)
    }

    /// Whether it and this software have a version in common.
    pub fn fits(&self) -> bool {
        (self.oldest..=self.newest).contains(&Self::PROTOCOL)
    }
}

/// Edition of a node's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordEdition {
    /// Whose.
    pub id: NodeId,
    /// Which life.
    pub generation: u64,
    /// Which edition within it.
    pub seq: u64,
}

impl RecordEdition {
    /// Its first eight bytes of SHA-256 over id, generation and seq, so that all nodes agree about what they have.
    pub fn hash(&self) -> u64 {
        let digest = Sha256::new()
            .chain_update(self.id.0)
            .chain_update(self.generation.to_be_bytes())
            .chain_update(self.seq.to_be_bytes())
            .finalize();
        u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes"))
    }
}

/// A record as it travels: its exact bytes, the signature over them, and the certificates that vouch for the key.
///
/// Nothing in `body` may be believed before the signature is checked; [`SignedRecord::peek`] is for routing the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedRecord {
    /// Prefix and fields of a [`NodeRecord`].
    pub body: Bytes,
    /// ECDSA P-256 with SHA-256 over [`SignedRecord::signed_bytes`], ASN.1 encoded.
    pub signature: Bytes,
    /// DER certificates: the node's own, then its issuer's.
    pub chain: Vec<Bytes>,
}

message!(SignedRecord { 1 body, 2 signature, 3 chain });

/// One that is too large, or has more certificates than any, is refused before it unfolds in memory.
impl Value for SignedRecord {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        put_message(self, tag, out);
    }

    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError> {
        let (length, limit) = (value.len(), MAX_RECORD_BYTES + MAX_CERTIFICATES * 8);
        if length > limit {
            return Err(WireError::TooLong { length, limit });
        }
        let signed = Self::read_fields(value, unknown)?;
        match signed.chain.len() > MAX_CERTIFICATES {
            true => Err(WireError::TooMany),
            false => once(slot, signed),
        }
    }
}

impl SignedRecord {
    /// Encoded body of `record`, ready to be signed.
    pub fn encode_body(record: &NodeRecord) -> Bytes {
        let mut out = Vec::with_capacity(PREFIX_BYTES + 128);
        out.extend_from_slice(&record.id.0);
        out.extend_from_slice(&record.generation.to_be_bytes());
        out.extend_from_slice(&record.seq.to_be_bytes());
        out.push(FORMAT);
        record.write_fields(&mut out);
        out.into()
    }

    /// The bytes that are signed: a context string, so that the signature can serve for nothing else, and the body.
    pub fn signed_bytes(body: &[u8]) -> Vec<u8> {
        [b"starling node record v1\0".as_slice(), body].concat()
    }

    /// Whose record it claims to be, and which edition, *without* believing it and without decoding the rest.
    pub fn peek_edition(&self) -> Result<RecordEdition, WireError> {
        let mut rest = &self.body[..];
        let id = NodeId(take_array(&mut rest)?);
        let generation = u64::from_be_bytes(take_array(&mut rest)?);
        let seq = u64::from_be_bytes(take_array(&mut rest)?);
        Ok(RecordEdition { id, generation, seq })
    }

    /// Size of body, signature and chain, in bytes.
    pub fn encoded_len(&self) -> usize {
        self.body.len() + self.signature.len() + self.chain.iter().map(Bytes::len).sum::<usize>()
    }

    /// Decodes the body *without* believing it. Errors on bodies that are oversized or malformed, or say what no record may:
    /// a service twice, or labels that could fool a terminal.
    pub fn peek(&self) -> Result<NodeRecord, WireError> {
        let length = self.encoded_len();
        if length > MAX_RECORD_BYTES {
            return Err(WireError::TooLong { length, limit: MAX_RECORD_BYTES });
        }
        let record = NodeRecord::read(&self.body)?;
        let wrong = |what: &str| Err(WireError::Malformed(what.into()));
        if record.services.len() > MAX_SERVICES {
            return wrong("too many services");
        }
        let mut names: Vec<&Name> = record.services.iter().map(|service| &service.name).collect();
        names.sort();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return wrong("a service twice");
        }
        if !is_label(&record.zone) || record.services.iter().any(|service| !is_label(&service.version)) {
            return wrong("a zone or a version that is no label");
        }
        let is_link = |link: &str| link.len() <= MAX_LINK_BYTES && link.bytes().all(|byte| byte.is_ascii_graphic());
        if !record.services.iter().all(|service| is_link(&service.link)) {
            return wrong("a link that is none");
        }
        let ip = record.addr.ip();
        let broadcast = ip == std::net::Ipv4Addr::BROADCAST;
        if record.addr.port() == 0 || ip.is_unspecified() || ip.is_multicast() || broadcast {
            return wrong("an address that no node can have");
        }
        if record.speaks.software.len() > MAX_LABEL_BYTES || !is_label(&record.speaks.software) {
            return wrong("a software version that is no label");
        }
        Ok(record)
    }
}

/// Whether a text can be a zone or a version: at most 64 letters, digits and `-._+/`, so that it can be shown as it is.
pub fn is_label(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._+/".contains(&byte);
    text.len() <= MAX_LABEL_BYTES && text.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::put_field;

    fn service(name: &str) -> ServiceRecord {
        ServiceRecord { version: "v1".into(), ..ServiceRecord::new(name.parse().unwrap(), Protocol::H2c) }
    }

    fn record() -> NodeRecord {
        NodeRecord {
            id: NodeId([7; 16]),
            generation: 1_800_000_000,
            seq: 3,
            name: "orders-1".parse().unwrap(),
            addr: "10.0.0.5:7400".parse().unwrap(),
            kind: NodeKind::Edge,
            zone: "eu-1a".into(),
            services: vec![service("orders"), service("users")],
            phase: Phase::Draining,
            cert_expires: 1_800_086_400,
            issuer: None,
            speaks: Capabilities::own("0.1.0"),
        }
    }

    fn signed(body: Bytes) -> SignedRecord {
        SignedRecord { body, signature: Bytes::new(), chain: Vec::new() }
    }

    #[test]
    fn a_record_comes_back_and_its_edition_is_in_front() {
        let signed = signed(SignedRecord::encode_body(&record()));
        assert_eq!(signed.peek(), Ok(record()));
        let edition = signed.peek_edition().unwrap();
        assert_eq!((edition.id, edition.generation, edition.seq), (record().id, record().generation, 3));
    }

    #[test]
    fn what_a_later_version_adds_is_passed_over_or_keeps_the_node_from_being_called() {
        let plain = SignedRecord::encode_body(&record()).to_vec();
        let mut later = plain.clone();
        let at = later.len();
        put_field(100, b"more", &mut later);
        assert_eq!(signed(later.clone().into()).peek(), Ok(record()));
        later[at] |= 1;
        let mut reformed = plain.clone();
        reformed[PREFIX_BYTES - 1] = FORMAT + 1;
        for body in [later, reformed] {
            let read = signed(body.into()).peek().unwrap();
            assert_eq!((read.phase, read.addr), (Phase::Unknown(NOT_UNDERSTOOD), record().addr));
        }
    }

    #[test]
    fn a_service_that_is_not_understood_takes_no_other_with_it() {
        let mut body =
            SignedRecord::encode_body(&NodeRecord { services: vec![service("orders")], ..record() }).to_vec();
        let mut strange = crate::encode(&service("tunnel"));
        let at = strange.len();
        put_field(50, b"", &mut strange);
        strange[at] |= 1;
        put_field(5, &strange, &mut body);
        put_field(5, &crate::encode(&service("users")), &mut body);
        let read = signed(body.into()).peek().unwrap();
        let callable: Vec<bool> = read.services.iter().map(ServiceRecord::is_callable).collect();
        assert_eq!((read.phase, callable), (Phase::Draining, vec![true, false, true]));
        let unknown = ServiceRecord { protocol: Protocol::Unknown(9), ..service("orders") };
        assert!(!unknown.is_callable());
    }

    #[test]
    fn what_no_record_may_say_is_refused() {
        let twice = NodeRecord { services: vec![service("orders"); 2], ..record() };
        let many = (0..=MAX_SERVICES).map(|n| service(&format!("s{n}"))).collect();
        let escape = NodeRecord { zone: "\x1b[2J".into(), ..record() };
        let version = ServiceRecord { version: "v\u{202e}1".into(), ..service("orders") };
        let link = ServiceRecord { link: "https://a.example/\u{1b}[2J".into(), ..service("orders") };
        for bad in [
            twice,
            NodeRecord { services: many, ..record() },
            escape,
            NodeRecord { services: vec![version], ..record() },
            NodeRecord { services: vec![link], ..record() },
            NodeRecord { zone: "z".repeat(65), ..record() },
        ] {
            assert!(signed(SignedRecord::encode_body(&bad)).peek().is_err(), "{bad:?}");
        }
        assert!(signed(SignedRecord::encode_body(&record()).slice(..PREFIX_BYTES - 1)).peek().is_err());
    }

    #[test]
    fn features_are_bits() {
        let speaks = Capabilities { features: 0b101, ..Capabilities::own("1") };
        assert_eq!([0, 1, 2, 63, 64].map(|bit| speaks.has(bit)), [true, false, true, false, false]);
        assert!(speaks.fits() && !Capabilities { oldest: 2, newest: 3, ..speaks }.fits());
    }
}
