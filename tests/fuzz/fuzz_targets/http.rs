//! The one normaliser: what it lets through is in normal form, and passes again unchanged.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header, request};
use libfuzzer_sys::fuzz_target;
use starling_http::normal::{MAX_FIELDS, MAX_MESH_FIELDS, Origin, normalise_request, normalise_response};
use starling_protocol::headers;

const HOP_BY_HOP: [&str; 5] = ["connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"];

/// Lines `name:value`; what is no field is left out.
fn fields<'a>(lines: impl Iterator<Item = &'a [u8]>) -> HeaderMap {
    let mut fields = HeaderMap::new();
    for line in lines {
        let mut halves = line.splitn(2, |b| *b == b':');
        let name = halves.next().and_then(|name| HeaderName::from_bytes(name).ok());
        let value = halves.next().and_then(|value| HeaderValue::from_bytes(value).ok());
        if let (Some(name), Some(value)) = (name, value) {
            fields.append(name, value);
        }
    }
    fields
}

fn check(fields: &HeaderMap, length: Option<u64>, origin: Origin) {
    assert!(fields.len() <= if origin == Origin::Outside { MAX_FIELDS } else { MAX_MESH_FIELDS });
    assert!(HOP_BY_HOP.iter().all(|name| !fields.contains_key(*name)));
    let lengths: Vec<_> = fields.get_all(header::CONTENT_LENGTH).iter().collect();
    match length {
        Some(length) => {
            assert_eq!(lengths.iter().filter_map(|v| v.to_str().ok()?.parse().ok()).collect::<Vec<u64>>(), [length])
        }
        None => assert!(lengths.is_empty()),
    }
    if origin == Origin::Outside {
        assert!(fields.keys().all(|name| !name.as_str().replace('_', "-").starts_with(headers::PREFIX)));
    }
}

fn again(parts: &request::Parts, authority: &str) -> request::Parts {
    let mut again = parts.clone();
    if parts.version <= Version::HTTP_11 {
        again.headers.insert(header::HOST, HeaderValue::from_str(authority).expect("an authority is a field value"));
    } else {
        let mut uri = parts.uri.clone().into_parts();
        (uri.scheme, uri.authority) = (Some("https".parse().expect("a scheme")), authority.parse().ok());
        again.uri = Uri::from_parts(uri).expect("an authority, and a target");
    }
    again
}

// First byte: version and origin. Then lines: method, target, fields.
fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let version = [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2, Version::HTTP_3][usize::from(choice % 4)];
    let origin = [Origin::Outside, Origin::Mesh, Origin::Edge][usize::from(choice / 4 % 3)];
    let mut lines = bytes.split(|b| *b == b'\n');
    let (Some(Ok(method)), Some(Ok(uri))) = (lines.next().map(Method::from_bytes), lines.next().map(Uri::try_from))
    else {
        return;
    };
    let fields = fields(lines);

    let mut parts = Response::new(()).into_parts().0;
    parts.headers = fields.clone();
    parts.status = if choice & 0x80 != 0 { StatusCode::NO_CONTENT } else { StatusCode::OK };
    if let Ok(length) = normalise_response(&mut parts, &method, origin)
        && method != Method::HEAD
        && parts.status == StatusCode::OK
    {
        check(&parts.headers, length, origin);
    }

    let (mut parts, ()) = Request::new(()).into_parts();
    (parts.method, parts.uri, parts.version, parts.headers) = (method, uri, version, fields);
    let Ok(checked) = normalise_request(&mut parts, origin) else { return };
    check(&parts.headers, checked.length, origin);
    assert!(!parts.headers.contains_key(header::HOST) && parts.uri.authority().is_none());
    let authority = checked.authority.as_str();
    assert!(!authority.contains('@') && !authority.bytes().any(|b| b.is_ascii_uppercase()));
    if parts.uri.path() != "*" {
        let mut again = again(&parts, authority);
        assert_eq!(normalise_request(&mut again, origin).as_ref(), Ok(&checked));
        assert_eq!((&again.headers, &again.uri), (&parts.headers, &parts.uri));
    }
});
