//! Every type that is decoded from the wire: what decodes, encodes and decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use starling_protocol::{
    Answer, Application, Capabilities, Delta, DocumentEdition, FrameHeader, Framed, Grants, IssuerProof, Items, Join,
    Ledger, MAX_GOSSIP_FRAME_BYTES, Message, Packet, Ping, Pong, Refusal, Relayed, Renew, Reservation, ServiceRecord,
    SignedAnswer, SignedDocument, SignedRecord, SignedReservation, SignedStrike, Summary, TokenClaims, View, Word,
    decode, encode, frame, frame_header,
};

/// By encodings, since not all types can be compared.
fn check<T: Message>(bytes: &[u8]) -> Option<T> {
    let value = decode::<T>(bytes).ok()?;
    let encoded = encode(&value);
    let again: T = decode(&encoded).expect("what was encoded decodes");
    assert_eq!(encode(&again), encoded);
    Some(value)
}

fn check_framed<T: Framed>(bytes: &[u8]) {
    let Some(value) = check::<T>(bytes) else { return };
    let framed = frame(&value);
    let FrameHeader { kind, length, rest: body } =
        frame_header(&framed, framed.len()).expect("it fits").expect("it is whole");
    assert_eq!((kind, length, body), (T::KIND, body.len(), &encode(&value)[..]));
    if let Some(less) = length.checked_sub(1) {
        assert!(frame_header(&framed, less).is_err());
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, body)) = bytes.split_first() else { return };
    match kind {
        0 => check_framed::<Items>(body),
        1 => check_framed::<Delta>(body),
        2 => check_framed::<Summary>(body),
        3 => check_framed::<View>(body),
        4 => check_framed::<Pong>(body),
        5 => check_framed::<Ping>(body),
        6 => check_framed::<Join>(body),
        7 => check_framed::<Renew>(body),
        8 => check_framed::<Relayed>(body),
        9 => check_framed::<SignedAnswer>(body),
        10 => check_framed::<Refusal>(body),
        11 => check_framed::<Ledger>(body),
        12 => drop(check::<Application>(body)),
        13 => drop(check::<Answer>(body)),
        14 => drop(check::<Reservation>(body)),
        15 => drop(check::<SignedReservation>(body)),
        16 => drop(check::<SignedRecord>(body)),
        17 => drop(check::<SignedDocument>(body)),
        18 => drop(check::<SignedStrike>(body)),
        19 => drop(check::<ServiceRecord>(body)),
        20 => drop(check::<IssuerProof>(body)),
        21 => drop(check::<Capabilities>(body)),
        22 => drop(check::<Grants>(body)),
        23 => drop(check::<DocumentEdition>(body)),
        24 => {
            if let Ok(claims) = TokenClaims::decode(body) {
                assert_eq!(TokenClaims::decode(&claims.encode()).as_ref(), Ok(&claims));
            }
        }
        25 => {
            if let Ok(packet) = Packet::decode(body) {
                let encoded = packet.encode();
                let again = Packet::decode(&encoded).expect("what was encoded decodes");
                // What does not fit is left out from the end.
                assert_eq!(again.news, packet.news[..again.news.len()]);
                assert_eq!(again.words, packet.words[..again.words.len()]);
                assert_eq!(again.encode(), encoded);
            }
        }
        26 => {
            if let Ok(word) = Word::decode(body) {
                assert_eq!(Word::decode(&word.encode()), Ok(word));
            }
        }
        _ => {
            if let Ok(Some(FrameHeader { length, rest, .. })) = frame_header(body, MAX_GOSSIP_FRAME_BYTES) {
                assert!(length <= MAX_GOSSIP_FRAME_BYTES && rest.len() < body.len());
            }
        }
    }
});
