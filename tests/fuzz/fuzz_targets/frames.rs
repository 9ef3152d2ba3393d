//! Every type that is decoded from the wire: what decodes, encodes and decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use starling_protocol::{
    Delta, FRAME_HEADER_BYTES, GossipRequest, Items, JoinReply, JoinRequest, MAX_GOSSIP_FRAME_BYTES, MeshDocument,
    NodeRecord, Pong, RecordEdition, SignedDocument, SignedRecord, Summary, TokenClaims, View, decode, encode, frame,
    frame_length,
};

/// By encodings, since not all types can be compared.
fn check<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(value) = decode::<T>(bytes) else { return };
    let encoded = encode(&value);
    assert!(encoded.len() <= bytes.len(), "no encoding is longer than one that decodes");
    let again: T = decode(&encoded).expect("what was encoded decodes");
    assert_eq!(encode(&again), encoded);

    let framed = frame(&value);
    let (header, body) = framed.split_first_chunk::<FRAME_HEADER_BYTES>().expect("a header");
    assert_eq!(frame_length(*header, body.len()), Ok(body.len()));
    assert_eq!(body, encoded);
    if let Some(less) = body.len().checked_sub(1) {
        assert!(frame_length(*header, less).is_err());
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, body)) = bytes.split_first() else { return };
    match kind {
        0 => check::<GossipRequest>(body),
        1 => check::<Delta>(body),
        2 => check::<Items>(body),
        3 => check::<View>(body),
        4 => check::<Pong>(body),
        5 => check::<JoinRequest>(body),
        6 => check::<JoinReply>(body),
        7 => check::<NodeRecord>(body),
        8 => check::<MeshDocument>(body),
        9 => check::<SignedRecord>(body),
        10 => check::<SignedDocument>(body),
        11 => check::<TokenClaims>(body),
        12 => check::<Summary>(body),
        13 => check::<RecordEdition>(body),
        _ => {
            if let Some(header) = body.first_chunk()
                && let Ok(length) = frame_length(*header, MAX_GOSSIP_FRAME_BYTES)
            {
                assert!(length <= MAX_GOSSIP_FRAME_BYTES);
                assert_eq!((length as u32).to_be_bytes(), *header);
            }
        }
    }
});
