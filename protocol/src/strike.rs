use bytes::Bytes;

use crate::{
    NodeId, StrikeEdition,
    wire::{Unknown, WireError, message, nested, take_array},
};

/// The format of strikes that this version writes.
const FORMAT: u8 = 1;
/// Largest strike with its certificate, in bytes.
const MAX_STRIKE_BYTES: usize = 4 << 10;

/// A dead member that was given up for good. Holds for that life of it and those before; a later life is a member like any
/// other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Strike {
    /// Who.
    pub id: NodeId,
    /// Up to which life.
    pub generation: u64,
    /// Not even shown any more; otherwise shown as left.
    pub prune: bool,
}

message!(Strike, given (id: NodeId, generation: u64) { 1 prune });

impl Strike {
    /// Which one it is.
    pub fn edition(&self) -> StrikeEdition {
        StrikeEdition { id: self.id, generation: self.generation, prune: self.prune }
    }
}

/// A strike as it travels: signed by the mesh's admin key or by an issuer.
///
/// Nothing in `body` may be believed before the signature is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedStrike {
    /// Prefix and fields of a [`Strike`].
    pub body: Bytes,
    /// Over [`SignedStrike::signed_bytes`], by the key of the certificate: Ed25519, or ECDSA P-256 with SHA-256.
    pub signature: Bytes,
    /// DER certificate of the admin key or of an issuer, signed by the mesh's root.
    pub certificate: Bytes,
}

message!(SignedStrike { 1 body, 2 signature, 3 certificate });
nested!(SignedStrike);

impl SignedStrike {
    /// Encoded body, ready to be signed.
    pub fn encode_body(strike: &Strike) -> Bytes {
        let mut out = Vec::with_capacity(32);
        out.extend_from_slice(&strike.id.0);
        out.extend_from_slice(&strike.generation.to_be_bytes());
        out.push(FORMAT);
        strike.write_fields(&mut out);
        out.into()
    }

    /// The bytes that are signed.
    pub fn signed_bytes(body: &[u8]) -> Vec<u8> {
        [b"starling strike v1\0".as_slice(), body].concat()
    }

    /// Size of body, signature and certificate, in bytes.
    pub fn encoded_len(&self) -> usize {
        self.body.len() + self.signature.len() + self.certificate.len()
    }

    /// Decodes the body *without* believing it. One of a later form is an error: it is not kept, because what it would do is
    /// not known.
    pub fn peek(&self) -> Result<Strike, WireError> {
        let (length, limit) = (self.encoded_len(), MAX_STRIKE_BYTES);
        if length > limit {
            return Err(WireError::TooLong { length, limit });
        }
        let mut rest = &self.body[..];
        let id = NodeId(take_array(&mut rest)?);
        let generation = u64::from_be_bytes(take_array(&mut rest)?);
        match take_array(&mut rest)? {
            [FORMAT] => Strike::read_fields(rest, Unknown::Ignored, id, generation),
            [format] => Err(WireError::NotUnderstood(format.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strike_comes_back() {
        for prune in [false, true] {
            let strike = Strike { id: NodeId([4; 16]), generation: 9, prune };
            let body = SignedStrike::encode_body(&strike);
            let mut signed = SignedStrike { body, signature: Bytes::new(), certificate: Bytes::new() };
            assert_eq!(signed.peek(), Ok(strike));
            signed.certificate = vec![0; MAX_STRIKE_BYTES].into();
            assert!(signed.peek().is_err());
        }
    }
}
