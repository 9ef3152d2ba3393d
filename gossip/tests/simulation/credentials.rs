//! Keys of simulated nodes. A keyed hash stands for the signature, so that a thousand nodes can be checked at every step;
//! the real ones are tested where they live.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use sha2::{Digest, Sha256};
use starling_gossip::{Credentials, DocumentError, RecordError};
use starling_protocol::{MeshDocument, NodeRecord, SignedDocument, SignedRecord};

/// What only the holder of a key can make.
fn sign(key: &[u8], body: &[u8]) -> Vec<u8> {
    Sha256::new().chain_update(b"key of ").chain_update(key).chain_update(body).finalize().to_vec()
}

/// A document signed with the admin key.
pub(crate) fn sign_document(document: &MeshDocument) -> SignedDocument {
    let body = SignedDocument::encode_body(document);
    SignedDocument { signature: sign(b"admin", &body), body, certificate: Vec::new() }
}

/// Verified records by signature: equal ones are one object, or a thousand nodes would hold a million copies.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interned(Arc<Mutex<HashMap<Vec<u8>, Arc<NodeRecord>>>>);

pub(crate) struct SimulatedKey(pub(crate) Interned);

impl Credentials for SimulatedKey {
    fn sign(&self, record: &NodeRecord) -> SignedRecord {
        let body = SignedRecord::encode_body(record);
        SignedRecord { signature: sign(&record.id.0, &body), body, chain: Vec::new() }
    }

    fn verify(&self, signed: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError> {
        let mut interned = self.0.0.lock().unwrap();
        if let Some(known) = interned.get(&signed.signature) {
            return Ok(known.clone());
        }
        let record = signed.peek().map_err(|e| RecordError(e.to_string()))?;
        if signed.signature != sign(&record.id.0, &signed.body) {
            return Err(RecordError("wrong signature".into()));
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
