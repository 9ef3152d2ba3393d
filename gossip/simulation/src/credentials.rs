//! Keys of simulated nodes. A keyed hash stands for the signature, so that a thousand nodes can be checked at every step;
//! the real ones are tested where they live.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use starling_gossip::{Credentials, DocumentError, RecordError};
use starling_protocol::{MeshDocument, NodeId, NodeRecord, SignedDocument, SignedRecord, SignedStrike, Strike};

/// What only the holder of a key can make.
fn sign(key: &[u8], body: &[u8]) -> Vec<u8> {
    Sha256::new().chain_update(b"key of ").chain_update(key).chain_update(body).finalize().to_vec()
}

/// A document signed with the admin key.
pub(crate) fn sign_document(document: &MeshDocument) -> SignedDocument {
    let body = SignedDocument::encode_body(document);
    SignedDocument { signature: sign(b"admin", &body).into(), body, certificate: Bytes::new() }
}

/// Verified records by signature: equal ones are one object, or a thousand nodes would hold a million copies.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interned(Arc<Mutex<HashMap<Bytes, Arc<NodeRecord>>>>);

/// The key of a node, and what all nodes have verified so far.
pub(crate) struct SimulatedKey(pub(crate) NodeId, pub(crate) Interned);

impl Credentials for SimulatedKey {
    fn sign(&self, record: &NodeRecord) -> SignedRecord {
        let body = SignedRecord::encode_body(record);
        SignedRecord { signature: sign(&self.0.0, &body).into(), body, chain: Vec::new() }
    }

    fn sign_word(&self, bytes: &[u8]) -> Vec<u8> {
        sign(&self.0.0, bytes)
    }

    fn verify_word(&self, signer: &SignedRecord, bytes: &[u8], signature: &[u8]) -> bool {
        signer.peek_edition().is_ok_and(|edition| sign(&edition.id.0, bytes) == signature)
    }

    fn verify_strike(&self, signed: &SignedStrike) -> Result<Strike, RecordError> {
        let strike = signed.peek().map_err(|e| RecordError::Forged(e.to_string()))?;
        let good = signed.signature == sign(b"admin", &signed.body);
        if good { Ok(strike) } else { Err(RecordError::Forged("wrong signature".into())) }
    }

    fn verify(&self, signed: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError> {
        let mut interned = self.1.0.lock().unwrap();
        if let Some(known) = interned.get(&signed.signature) {
            return Ok(known.clone());
        }
        let record = signed.peek().map_err(|e| RecordError::Forged(e.to_string()))?;
        if signed.signature != sign(&record.id.0, &signed.body) {
            return Err(RecordError::Forged("wrong signature".into()));
        }
        let record = Arc::new(record);
        interned.insert(signed.signature.clone(), record.clone());
        Ok(record)
    }

    fn verify_document(&self, signed: &SignedDocument) -> Result<MeshDocument, DocumentError> {
        let refuse = |why: &str| DocumentError::Unverified(why.into());
        let document = signed.peek().map_err(|e| refuse(&e.to_string()))?;
        if signed.signature != sign(b"admin", &signed.body) {
            return Err(refuse("wrong signature"));
        }
        Ok(document)
    }
}
