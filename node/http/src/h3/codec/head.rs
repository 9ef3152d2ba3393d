//! Heads and trailers: field sections to and from what the `http` crate has, with the rules of RFC 9114 §4.2 and §4.3 checked
//! where order and duplicates still show.

use bytes::{BufMut, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header, request, response,
    uri::{Authority, PathAndQuery, Scheme},
};

use super::{
    frame,
    qpack::{Encoder, Fields, Text},
    varint,
};
use crate::{Head, h3::Fault, names, normal, tunnel::Protocol};

/// Most fields in a section: what the normaliser lets through, what an edge adds to that, and pseudo-fields.
const MAX_FIELDS: usize = normal::MAX_MESH_FIELDS + 8;

/// What an end lets pass.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest section, in bytes as RFC 9114 §4.2.2 counts them.
    pub max_section_bytes: u64,
    /// Whether a request may carry `:protocol`, which its sender must have been told by a setting.
    pub extended_connect: bool,
}

/// A head that was checked, and the length of the body if it promises one.
#[derive(Debug)]
pub struct Checked<T> {
    /// The head.
    pub head: T,
    /// Content-Length.
    pub length: Option<u64>,
}

/// The pseudo-fields of a request or a response, each at most once.
#[derive(Default)]
struct Pseudo {
    method: Option<Text>,
    scheme: Option<Text>,
    authority: Option<Text>,
    path: Option<Text>,
    protocol: Option<Text>,
    status: Option<Text>,
}

impl Pseudo {
    fn put(&mut self, name: &[u8], value: Text) -> Result<(), Fault> {
        let place = match name {
            b":method" => &mut self.method,
            b":scheme" => &mut self.scheme,
            b":authority" => &mut self.authority,
            b":path" => &mut self.path,
            b":protocol" => &mut self.protocol,
            b":status" => &mut self.status,
            _ => return Err(Fault::malformed("an unknown pseudo-field")),
        };
        match place.replace(value) {
            None => Ok(()),
            Some(_) => Err(Fault::malformed("a pseudo-field twice")),
        }
    }
}

/// A request's head.
pub fn decode_request(section: &[u8], limits: Limits) -> Result<Checked<request::Parts>, Fault> {
    let (pseudo, fields) = decode(section, limits.max_section_bytes, b"trailers")?;
    if pseudo.status.is_some() {
        return Err(Fault::malformed(":status in a request"));
    }
    let method = pseudo.method.ok_or(Fault::malformed("no :method"))?;
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| Fault::malformed("a :method that is no token"))?;
    let authority = pseudo.authority.map(read_authority).transpose()?;
    let is_tunnel = method == Method::CONNECT && pseudo.protocol.is_none();
    let uri = if is_tunnel {
        if pseudo.scheme.is_some() || pseudo.path.is_some() {
            return Err(Fault::malformed("CONNECT with :scheme or :path"));
        }
        let authority = authority.ok_or(Fault::malformed("CONNECT without :authority"))?;
        if authority.port().is_none() {
            return Err(Fault::malformed("CONNECT without a port"));
        }
        check_host(&fields, Some(&authority))?;
        let mut uri = http::uri::Parts::default();
        uri.authority = Some(authority);
        Uri::from_parts(uri)
    } else {
        check_host(&fields, authority.as_ref())?;
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(read_scheme(pseudo.scheme)?);
        uri.path_and_query = Some(read_path(pseudo.path, &method)?);
        // Without :authority, Host is the authority, as it would be in HTTP/1.1.
        uri.authority = match authority {
            Some(authority) => Some(authority),
            None => fields.get(header::HOST).map(host_authority).transpose()?,
        };
        Uri::from_parts(uri)
    };
    let (mut head, ()) = http::Request::new(()).into_parts();
    if let Some(protocol) = pseudo.protocol {
        if !limits.extended_connect || method != Method::CONNECT {
            return Err(Fault::malformed(":protocol without extended CONNECT"));
        }
        let protocol = std::str::from_utf8(protocol.as_bytes()).ok().and_then(Protocol::read);
        head.extensions.insert(protocol.ok_or(Fault::malformed("a :protocol that is no token"))?);
    }
    head.uri = uri.map_err(|_| Fault::malformed("a target that does not fit together"))?;
    head.method = method;
    head.version = Version::HTTP_3;
    let length = content_length(&fields)?;
    head.headers = fields;
    Ok(Checked { head, length })
}

/// A response's head, an interim one too.
pub fn decode_response(section: &[u8], max_section_bytes: u64) -> Result<Checked<response::Parts>, Fault> {
    let (pseudo, fields) = decode(section, max_section_bytes, NO_TE)?;
    let Pseudo { method: None, scheme: None, authority: None, path: None, protocol: None, status } = pseudo else {
        return Err(Fault::malformed("a request's pseudo-field in an answer"));
    };
    let status = status.ok_or(Fault::malformed("no :status"))?;
    let status =
        StatusCode::from_bytes(status.as_bytes()).map_err(|_| Fault::malformed("a :status that is no number"))?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Fault::malformed("101 has no meaning in HTTP/3"));
    }
    let (mut head, ()) = http::Response::new(()).into_parts();
    head.status = status;
    head.version = Version::HTTP_3;
    let length = content_length(&fields)?;
    head.headers = fields;
    Ok(Checked { head, length })
}

/// Trailers.
pub fn decode_trailers(section: &[u8], max_section_bytes: u64) -> Result<HeaderMap, Fault> {
    let (pseudo, fields) = decode(section, max_section_bytes, NO_TE)?;
    match pseudo {
        Pseudo { method: None, scheme: None, authority: None, path: None, protocol: None, status: None } => Ok(fields),
        _ => Err(Fault::malformed("a pseudo-field in trailers")),
    }
}

/// TE is a request's, and there it has one value (RFC 9114 §4.2).
const NO_TE: &[u8] = b"";

/// Pseudo-fields first, each once; names in lower case; nothing that concerns a connection.
fn decode(section: &[u8], max_section_bytes: u64, te: &[u8]) -> Result<(Pseudo, HeaderMap), Fault> {
    let mut pseudo = Pseudo::default();
    let mut fields = HeaderMap::with_capacity(16);
    for field in Fields::new(section, max_section_bytes)? {
        let field = field?;
        if let [b':', ..] = field.name.as_bytes() {
            if !fields.is_empty() {
                return Err(Fault::malformed("a pseudo-field behind a field"));
            }
            pseudo.put(field.name.as_bytes(), field.value)?;
            continue;
        }
        let name = read_name(&field.name)?;
        if is_connection_specific(&name) {
            return Err(Fault::malformed("a connection-specific field"));
        }
        if name == header::TE && (te.is_empty() || !field.value.as_bytes().eq_ignore_ascii_case(te)) {
            return Err(Fault::malformed("TE other than a request's trailers"));
        }
        let mut value = match field.value {
            Text::Entry(_, text) => HeaderValue::from_static(text),
            Text::Sent(bytes) => HeaderValue::from_maybe_shared(bytes)
                .map_err(|_| Fault::malformed("a character that no field may carry"))?,
        };
        value.set_sensitive(field.sensitive);
        if fields.len() >= MAX_FIELDS {
            return Err(Fault::TooLarge);
        }
        fields.append(name, value);
    }
    Ok((pseudo, fields))
}

fn read_name(name: &Text) -> Result<HeaderName, Fault> {
    let bytes = name.as_bytes();
    match names::known(bytes) {
        Some(name) => Ok(name),
        None => HeaderName::from_lowercase(bytes)
            .map_err(|_| Fault::malformed("a field name that is empty, in upper case or no token")),
    }
}

/// RFC 9114 §4.2: these say something of an HTTP/1.1 connection.
fn is_connection_specific(name: &HeaderName) -> bool {
    match name.as_str().len() {
        7 => *name == header::UPGRADE,
        10 => *name == header::CONNECTION || name == "keep-alive",
        16 => name == "proxy-connection",
        17 => *name == header::TRANSFER_ENCODING,
        _ => false,
    }
}

fn shared(text: Text) -> Bytes {
    match text {
        Text::Entry(_, text) => Bytes::from_static(text.as_bytes()),
        Text::Sent(bytes) => bytes,
    }
}

fn read_scheme(scheme: Option<Text>) -> Result<Scheme, Fault> {
    let scheme = scheme.ok_or(Fault::malformed("no :scheme"))?;
    match scheme.as_bytes() {
        b"https" => Ok(Scheme::HTTPS),
        b"http" => Ok(Scheme::HTTP),
        [first, ..] if first.is_ascii_alphabetic() => {
            Scheme::try_from(scheme.as_bytes()).map_err(|_| Fault::malformed("a :scheme that is none"))
        }
        _ => Err(Fault::malformed("a :scheme that is none")),
    }
}

fn read_authority(authority: Text) -> Result<Authority, Fault> {
    if authority.as_bytes().contains(&b'@') {
        return Err(Fault::malformed("user information in :authority"));
    }
    let authority =
        Authority::from_maybe_shared(shared(authority)).map_err(|_| Fault::malformed("an :authority that is none"))?;
    if authority.host().is_empty() {
        return Err(Fault::malformed("an :authority without a host"));
    }
    Ok(authority)
}

fn host_authority(host: &HeaderValue) -> Result<Authority, Fault> {
    read_authority(Text::Sent(Bytes::copy_from_slice(host.as_bytes())))
}

/// There is :authority or Host; both say the same, and neither is empty (RFC 9114 §4.3.1).
fn check_host(fields: &HeaderMap, authority: Option<&Authority>) -> Result<(), Fault> {
    let mut hosts = fields.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next(), authority) {
        (None, _, Some(_)) => Ok(()),
        (None, _, None) => Err(Fault::malformed("neither :authority nor Host")),
        (_, Some(_), _) => Err(Fault::malformed("Host twice")),
        (Some(host), None, None) if host.is_empty() => Err(Fault::malformed("an empty Host")),
        (Some(_), None, None) => Ok(()),
        (Some(host), None, Some(authority)) if host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) => {
            Ok(())
        }
        (Some(_), None, Some(_)) => Err(Fault::malformed(":authority and Host differ")),
    }
}

fn read_path(path: Option<Text>, method: &Method) -> Result<PathAndQuery, Fault> {
    let path = path.ok_or(Fault::malformed("no :path"))?;
    match path.as_bytes() {
        b"*" if *method == Method::OPTIONS => return Ok(PathAndQuery::from_static("*")),
        b"/" => return Ok(PathAndQuery::from_static("/")),
        // A fragment is never sent, and the parser would silently cut it off.
        [b'/', rest @ ..] if !rest.contains(&b'#') => {}
        _ => return Err(Fault::malformed("a :path that is none")),
    }
    PathAndQuery::from_maybe_shared(shared(path)).map_err(|_| Fault::malformed("a :path that is none"))
}

fn content_length(fields: &HeaderMap) -> Result<Option<u64>, Fault> {
    normal::content_length(fields).map_err(|malformed| Fault::malformed(malformed.reason))
}

/// A field section is larger than the receiver takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the header fields are larger than the receiver takes")]
pub struct TooLarge;

/// Appends the HEADERS frame of a request to an authority over https.
pub fn encode_request(head: &Head<'_>, max_section_bytes: u64, out: &mut BytesMut) -> Result<(), TooLarge> {
    encode(out, max_section_bytes, |encoder| {
        encoder.field(b":method", head.method.as_str().as_bytes(), false);
        // Of plain CONNECT there is only the authority (RFC 9114 §4.4).
        let has_path = *head.method != Method::CONNECT || head.protocol.is_some();
        if let Some(Protocol(protocol)) = head.protocol {
            encoder.field(b":protocol", protocol.as_bytes(), false);
        }
        if has_path {
            encoder.field(b":scheme", b"https", false);
        }
        encoder.field(b":authority", head.authority.as_bytes(), false);
        if has_path {
            encoder.field(b":path", head.path.as_bytes(), false);
        }
        encode_fields(head.fields, encoder);
    })
}

/// Appends the HEADERS frame of a response.
pub fn encode_response(
    status: StatusCode,
    fields: &HeaderMap,
    max_section_bytes: u64,
    out: &mut BytesMut,
) -> Result<(), TooLarge> {
    encode(out, max_section_bytes, |encoder| {
        encoder.field(b":status", status.as_str().as_bytes(), false);
        encode_fields(fields, encoder);
    })
}

/// Appends the HEADERS frame of trailers.
pub fn encode_trailers(fields: &HeaderMap, max_section_bytes: u64, out: &mut BytesMut) -> Result<(), TooLarge> {
    encode(out, max_section_bytes, |encoder| encode_fields(fields, encoder))
}

fn encode_fields(fields: &HeaderMap, encoder: &mut Encoder<'_>) {
    for (name, value) in fields {
        // The normaliser leaves none of them, and an answer of our own making has none either; never send one all the same.
        if !is_connection_specific(name) {
            encoder.field(name.as_str().as_bytes(), value.as_bytes(), value.is_sensitive());
        }
    }
}

/// Lays a frame out whose length is known only afterwards. On an error, the buffer is as it was.
fn encode(out: &mut BytesMut, max_section_bytes: u64, fields: impl FnOnce(&mut Encoder<'_>)) -> Result<(), TooLarge> {
    /// A length up to 16383 has two bytes.
    const SHORT: usize = (1 << 14) - 1;
    let start = out.len();
    out.put_slice(&[frame::HEADERS as u8, 0, 0]);
    let section = out.len();
    let mut encoder = Encoder::new(out);
    fields(&mut encoder);
    let fits = encoder.counts() <= max_section_bytes;
    let length = out.len() - section;
    match (fits, length <= SHORT) {
        (false, _) => {
            out.truncate(start);
            Err(TooLarge)
        }
        (true, true) => {
            out[start + 1..section].copy_from_slice(&(0x4000 | length as u16).to_be_bytes());
            Ok(())
        }
        (true, false) => {
            let long = out.split_off(section);
            out.truncate(start);
            varint::encode(frame::HEADERS, out);
            varint::encode(long.len() as u64, out);
            out.extend_from_slice(&long);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { max_section_bytes: 65_536, extended_connect: false };

    fn section(fields: &[(&str, &str)]) -> BytesMut {
        let mut out = BytesMut::new();
        let mut encoder = Encoder::new(&mut out);
        for (name, value) in fields {
            encoder.field(name.as_bytes(), value.as_bytes(), false);
        }
        out
    }

    fn request(fields: &[(&str, &str)]) -> Result<request::Parts, Fault> {
        decode_request(&section(fields), LIMITS).map(|checked| checked.head)
    }

    const GET: [(&str, &str); 4] = [(":method", "GET"), (":scheme", "https"), (":authority", "a"), (":path", "/")];

    #[test]
    fn a_request_is_read() {
        let head =
            request(&[&GET[..3], &[(":path", "/x?y"), ("accept", "*/*"), ("x-mine", "1"), ("x-mine", "2")]].concat())
                .unwrap();
        assert_eq!((head.method, head.uri.to_string()), (Method::GET, "https://a/x?y".into()));
        assert_eq!(head.headers.len(), 3);
        assert_eq!(head.version, Version::HTTP_3);
        // Host may stand for :authority, or say the same.
        assert_eq!(request(&[&GET[..2], &[(":path", "/"), ("host", "b:1")]].concat()).unwrap().uri, "https://b:1/");
        assert!(request(&[&GET[..], &[("host", "A")]].concat()).is_ok());
        let connect = request(&[(":method", "CONNECT"), (":authority", "a:443")]).unwrap();
        assert_eq!((connect.method, connect.uri.to_string()), (Method::CONNECT, "a:443".into()));
        assert!(request(&[(":method", "OPTIONS"), (":scheme", "https"), (":authority", "a"), (":path", "*")]).is_ok());
    }

    #[test]
    fn malformed_requests_are_refused() {
        let get = |more: &[(&'static str, &'static str)]| [&GET[..], more].concat();
        let without = |name: &str| GET.iter().filter(|f| f.0 != name).copied().collect::<Vec<_>>();
        let with = |name: &str, value: &'static str| {
            GET.iter().map(|f| if f.0 == name { (f.0, value) } else { *f }).collect::<Vec<_>>()
        };
        let rows = [
            without(":method"),
            without(":scheme"),
            without(":path"),
            without(":authority"),
            get(&[(":path", "/")]),
            get(&[(":method", "GET")]),
            get(&[(":authority", "a")]),
            get(&[(":status", "200")]),
            get(&[(":unknown", "1")]),
            get(&[(":protocol", "websocket")]),
            get(&[("x", "1"), (":path", "/")]),
            [&[("x", "1")][..], &GET].concat(),
            with(":path", ""),
            with(":path", "x"),
            with(":path", "*"),
            with(":path", "/a#b"),
            with(":path", "/a b"),
            with(":path", "https://a/"),
            with(":method", ""),
            with(":method", "G T"),
            with(":scheme", ""),
            with(":scheme", "1http"),
            with(":authority", ""),
            with(":authority", "user@a"),
            with(":authority", "a b"),
            with(":authority", ":80"),
            get(&[("host", "b")]),
            get(&[("host", "a"), ("host", "a")]),
            get(&[("host", "")]),
            get(&[("X-Upper", "1")]),
            get(&[("", "1")]),
            get(&[("a b", "1")]),
            get(&[("a:b", "1")]),
            get(&[("x", "a\r\nb: c")]),
            get(&[("x", "a\0")]),
            get(&[("x", "a\nb")]),
            get(&[("connection", "close")]),
            get(&[("proxy-connection", "close")]),
            get(&[("keep-alive", "1")]),
            get(&[("transfer-encoding", "chunked")]),
            get(&[("upgrade", "h2c")]),
            get(&[("te", "gzip")]),
            get(&[("te", "trailers, deflate")]),
            get(&[("content-length", "1"), ("content-length", "2")]),
            get(&[("content-length", "-1")]),
            get(&[("content-length", "")]),
            vec![(":method", "CONNECT"), (":authority", "a:1"), (":path", "/")],
            vec![(":method", "CONNECT"), (":authority", "a:1"), (":scheme", "https")],
            vec![(":method", "CONNECT")],
            vec![(":method", "CONNECT"), (":authority", "a")],
        ];
        for row in rows {
            let refused = request(&row).map_err(Fault::code);
            assert_eq!(refused.err(), Some(crate::h3::Code::H3_MESSAGE_ERROR), "{row:?}");
        }
        assert!(request(&get(&[("te", "trailers"), ("content-length", "5"), ("content-length", "5")])).is_ok());
    }

    #[test]
    fn extended_connect_needs_the_setting() {
        let fields = section(&[
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "https"),
            (":authority", "a"),
            (":path", "/chat"),
        ]);
        assert!(decode_request(&fields, LIMITS).is_err());
        let open = Limits { extended_connect: true, ..LIMITS };
        let head = decode_request(&fields, open).unwrap().head;
        assert_eq!(head.extensions.get(), Some(&Protocol("websocket".into())));
        assert_eq!(head.uri.path(), "/chat");
        let (method, fields) = (&Method::CONNECT, &HeaderMap::new());
        let websocket = Protocol("websocket".into());
        for (protocol, target) in [(Some(&websocket), "https://a:1/chat"), (None, "a:1")] {
            let mut out = BytesMut::new();
            let head = Head { method, authority: "a:1", path: "/chat", fields, protocol, interim: None };
            encode_request(&head, 65_536, &mut out).unwrap();
            let head = decode_request(&out[3..], open).unwrap().head;
            assert_eq!((head.uri.to_string().as_str(), head.extensions.get()), (target, protocol));
        }
        assert!(decode_request(&section(&[&GET[..], &[(":protocol", "x")]].concat()), open).is_err());
    }

    #[test]
    fn malformed_answers_and_trailers_are_refused() {
        let answer =
            |fields: &[(&str, &str)]| decode_response(&section(fields), 65_536).map(|c| (c.head.status, c.length));
        assert_eq!(answer(&[(":status", "204"), ("content-length", "5")]), Ok((StatusCode::NO_CONTENT, Some(5))));
        assert!(answer(&[(":status", "103"), ("link", "</a>")]).is_ok());
        for row in [
            &[][..],
            &[(":status", "200"), (":status", "200")],
            &[(":status", "20")],
            &[(":status", "2000")],
            &[(":status", "abc")],
            &[(":status", "101")],
            &[("x", "1"), (":status", "200")],
            &[(":status", "200"), (":path", "/")],
            &[(":status", "200"), ("connection", "close")],
            &[(":status", "200"), ("te", "trailers")],
            &[(":status", "200"), ("Server", "x")],
            &[(":status", "200"), ("content-length", "1"), ("content-length", "2")],
        ] {
            assert_eq!(answer(row).map_err(Fault::code), Err(crate::h3::Code::H3_MESSAGE_ERROR), "{row:?}");
        }
        let trailers = |fields: &[(&str, &str)]| decode_trailers(&section(fields), 65_536).map(|t| t.len());
        assert_eq!(trailers(&[("grpc-status", "0"), ("grpc-message", "")]), Ok(2));
        for row in [
            &[(":status", "200")][..],
            &[(":path", "/")],
            &[("x", "1"), (":x", "1")],
            &[("upgrade", "x")],
            &[("A", "1")],
        ] {
            assert_eq!(trailers(row).map_err(Fault::code), Err(crate::h3::Code::H3_MESSAGE_ERROR), "{row:?}");
        }
    }

    #[test]
    fn a_head_has_limits_both_ways() {
        let many: Vec<(String, String)> = (0..MAX_FIELDS + 1).map(|i| (format!("x-{i}"), "1".into())).collect();
        let fields: Vec<(&str, &str)> =
            GET.into_iter().chain(many.iter().map(|(n, v)| (n.as_str(), v.as_str()))).collect();
        assert_eq!(request(&fields).unwrap_err(), Fault::TooLarge);
        assert!(request(&fields[..MAX_FIELDS]).is_ok());

        let mut headers = HeaderMap::new();
        headers.insert("x", HeaderValue::from_str(&"a".repeat(20_000)).unwrap());
        let mut out = BytesMut::from(&b"before"[..]);
        assert_eq!(encode_trailers(&headers, 20_000, &mut out), Err(TooLarge));
        assert_eq!(out, "before");
        encode_trailers(&headers, 30_000, &mut out).unwrap();
        let mut input = out.split_off(6).freeze();
        let piece = frame::Frames::default().next(&mut input, &mut |_, _| Ok(frame::Handling::Keep)).unwrap();
        let Some(frame::Piece::Frame(frame::HEADERS, section)) = piece else { panic!("{piece:?}") };
        assert_eq!((decode_trailers(&section, 30_000).unwrap(), input.len()), (headers, 0));
    }

    proptest! {
        #[test]
        fn what_is_sent_is_read(
            path in "/[a-z0-9/?=&%]{0,40}",
            fields in proptest::collection::vec(("x-[a-z]{1,10}", "[!-~]{0,40}"), 0..20),
        ) {
            let mut headers = HeaderMap::new();
            for (name, value) in &fields {
                headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
            }
            let mut out = BytesMut::new();
            let (method, authority) = (&Method::PATCH, "orders.mesh.internal");
            let head = Head { method, authority, path: &path, fields: &headers, protocol: None, interim: None };
            encode_request(&head, 65_536, &mut out).unwrap();
            let head = decode_request(&out[3..], LIMITS).unwrap().head;
            prop_assert_eq!(head.uri.authority().unwrap().as_str(), "orders.mesh.internal");
            prop_assert_eq!(head.uri.path_and_query().unwrap().as_str(), path);
            prop_assert_eq!(head.headers, headers.clone());
            out.clear();
            encode_response(StatusCode::IM_A_TEAPOT, &headers, 65_536, &mut out).unwrap();
            let head = decode_response(&out[3..], 65_536).unwrap().head;
            prop_assert_eq!((head.status, head.headers), (StatusCode::IM_A_TEAPOT, headers));
        }

        #[test]
        fn any_section_is_read_or_refused(section in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_request(&section, LIMITS);
            let _ = decode_response(&section, 65_536);
            let _ = decode_trailers(&section, 65_536);
        }
    }
}
