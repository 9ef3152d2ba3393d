//! What is read of signed things before they are believed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use starling_protocol::{
    MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, MAX_SERVICES, SignedDocument, SignedRecord, decode, encode,
};

fn record(signed: &SignedRecord) {
    let edition = signed.peek_edition();
    let Ok(record) = signed.peek() else { return };
    let edition = edition.expect("a record that can be read has an edition");
    assert_eq!((edition.id, edition.generation, edition.seq), (record.id, record.generation, record.seq));
    assert!(record.services.len() <= MAX_SERVICES && signed.encoded_len() <= MAX_RECORD_BYTES);
    let again = SignedRecord { body: SignedRecord::encode_body(&record), ..signed.clone() };
    assert_eq!(again.peek().as_ref(), Ok(&record));
}

fn document(signed: &SignedDocument) {
    let Ok(document) = signed.peek() else { return };
    assert!(document.content.len() <= MAX_DOCUMENT_BYTES);
    assert!(!document.deleted || document.content.is_empty(), "a tombstone says nothing");
    let again = SignedDocument { body: SignedDocument::encode_body(&document), ..signed.clone() };
    assert_eq!(again.peek().as_ref(), Ok(&document));
}

fuzz_target!(|bytes: &[u8]| {
    record(&SignedRecord { body: bytes.to_vec(), signature: Vec::new(), chain: Vec::new() });
    document(&SignedDocument { body: bytes.to_vec(), signature: Vec::new(), certificate: Vec::new() });
    if let Ok(signed) = decode::<SignedRecord>(bytes) {
        assert_eq!(decode::<SignedRecord>(&encode(&signed)).as_ref(), Ok(&signed));
        record(&signed);
    }
    if let Ok(signed) = decode::<SignedDocument>(bytes) {
        assert_eq!(decode::<SignedDocument>(&encode(&signed)).as_ref(), Ok(&signed));
        document(&signed);
    }
});
