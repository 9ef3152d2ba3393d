//! Field sections: what is read is written and read to the same; what is read keeps to the rules and to the limits.
#![no_main]

use bytes::BytesMut;
use http::{HeaderMap, Method};
use libfuzzer_sys::fuzz_target;
use starling_http::{
    Head,
    h3::codec::{
        frame::{Frames, Handling, Piece},
        head::{
            Limits, decode_request, decode_response, decode_trailers, encode_request, encode_response, encode_trailers,
        },
        qpack::Fields,
    },
    tunnel::Protocol,
};

const LIMITS: Limits = Limits { max_section_bytes: 16 << 10, extended_connect: true };
const FORBIDDEN: [&str; 5] = ["connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"];

fn section(frame: BytesMut) -> bytes::Bytes {
    let mut input = frame.freeze();
    match Frames::default().next(&mut input, &mut |_, _| Ok(Handling::Keep)) {
        Ok(Some(Piece::Frame(_, section))) if input.is_empty() => section,
        other => panic!("{other:?}"),
    }
}

fn check(fields: &HeaderMap) {
    assert!(FORBIDDEN.iter().all(|name| !fields.contains_key(*name)));
    assert!(
        fields
            .keys()
            .all(|name| !name.as_str().starts_with(':') && !name.as_str().bytes().any(|b| b.is_ascii_uppercase()))
    );
    assert!(fields.values().all(|value| !value.as_bytes().iter().any(|b| matches!(b, 0 | b'\r' | b'\n'))));
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(fields) = Fields::new(bytes, LIMITS.max_section_bytes) {
        let counts = |field: starling_http::h3::codec::qpack::Field| {
            field.name.as_bytes().len() + field.value.as_bytes().len() + 32
        };
        let counted: usize = fields.flatten().map(counts).sum();
        assert!(counted as u64 <= LIMITS.max_section_bytes);
    }
    let mut out = BytesMut::new();
    if let Ok(read) = decode_request(bytes, LIMITS) {
        check(&read.head.headers);
        let uri = &read.head.uri;
        let authority = uri.authority().expect("every request has one").as_str();
        assert!(!authority.is_empty() && !authority.contains('@'));
        let protocol = read.head.extensions.get::<Protocol>();
        let is_plain_tunnel = read.head.method == Method::CONNECT && protocol.is_none();
        if is_plain_tunnel || uri.scheme_str() == Some("https") {
            let path = uri.path_and_query().map_or("", |path| path.as_str());
            let (method, fields) = (&read.head.method, &read.head.headers);
            let head = Head { method, authority, path, fields, protocol, interim: None };
            encode_request(&head, u64::MAX, &mut out).expect("no limit");
            let again = decode_request(&section(out.split()), Limits { max_section_bytes: u64::MAX, ..LIMITS })
                .expect("it is sound");
            assert_eq!(
                (&again.head.method, &again.head.uri, &again.head.headers),
                (&read.head.method, uri, &read.head.headers)
            );
            assert_eq!(again.length, read.length);
        }
    }
    if let Ok(read) = decode_response(bytes, LIMITS.max_section_bytes) {
        check(&read.head.headers);
        encode_response(read.head.status, &read.head.headers, u64::MAX, &mut out).expect("no limit");
        let again = decode_response(&section(out.split()), u64::MAX).expect("it is sound");
        assert_eq!((again.head.status, &again.head.headers), (read.head.status, &read.head.headers));
    }
    if let Ok(read) = decode_trailers(bytes, LIMITS.max_section_bytes) {
        check(&read);
        encode_trailers(&read, u64::MAX, &mut out).expect("no limit");
        assert_eq!(decode_trailers(&section(out.split()), u64::MAX).expect("it is sound"), read);
    }
});
