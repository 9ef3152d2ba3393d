//! What is read of signed things before they are believed.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use starling_protocol::{
    MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, MAX_SERVICES, Phase, ServiceState, SignedDocument, SignedRecord,
    SignedStrike, decode, encode,
};

fn record(signed: &SignedRecord) {
    let edition = signed.peek_edition();
    let Ok(record) = signed.peek() else { return };
    let edition = edition.expect("a record that can be read has an edition");
    assert_eq!((edition.id, edition.generation, edition.seq), (record.id, record.generation, record.seq));
    assert!(record.services.len() <= MAX_SERVICES && signed.encoded_len() <= MAX_RECORD_BYTES);
    if matches!(record.phase, Phase::Unknown(_)) {
        // Not understood in full: what was not cannot be written again.
        return;
    }
    let again = SignedRecord { body: SignedRecord::encode_body(&record), ..signed.clone() };
    if again.encoded_len() <= MAX_RECORD_BYTES
        && record.services.iter().all(|s| !matches!(s.state, ServiceState::Unknown(_)))
    {
        assert_eq!(again.peek().as_ref(), Ok(&record));
    }
}

fn strike(signed: &SignedStrike) {
    let Ok(strike) = signed.peek() else { return };
    let again = SignedStrike { body: SignedStrike::encode_body(&strike), ..signed.clone() };
    assert_eq!(again.peek(), Ok(strike));
}

fn document(signed: &SignedDocument) {
    let Ok(document) = signed.peek() else { return };
    assert!(document.content.len() <= MAX_DOCUMENT_BYTES);
    assert!(!document.deleted || document.content.is_empty(), "a tombstone says nothing");
    if !document.understood {
        return;
    }
    let again = SignedDocument { body: SignedDocument::encode_body(&document), ..signed.clone() };
    assert_eq!(again.peek().as_ref(), Ok(&document));
}

fuzz_target!(|bytes: &[u8]| {
    let body = Bytes::copy_from_slice(bytes);
    let (signature, certificate) = (Bytes::new(), Bytes::new());
    record(&SignedRecord { body: body.clone(), signature: signature.clone(), chain: Vec::new() });
    document(&SignedDocument { body: body.clone(), signature: signature.clone(), certificate: certificate.clone() });
    strike(&SignedStrike { body, signature, certificate });
    if let Ok(signed) = decode::<SignedRecord>(bytes) {
        assert_eq!(decode::<SignedRecord>(&encode(&signed)).as_ref(), Ok(&signed));
        record(&signed);
    }
    if let Ok(signed) = decode::<SignedDocument>(bytes) {
        assert_eq!(decode::<SignedDocument>(&encode(&signed)).as_ref(), Ok(&signed));
        document(&signed);
    }
});
