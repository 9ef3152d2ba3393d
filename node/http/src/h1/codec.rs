//! Messages as bytes. What can be read in more than one way is refused: two readers of one answer would take different
//! bytes for its end (RFC 9112 §11).

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header,
    response::{self, Response},
};
use httparse::{ParserConfig, Status};

use crate::{
    Head,
    normal::{MAX_FIELDS, content_length},
    tunnel::Protocol,
};

/// Longest head, in bytes.
pub(super) const MAX_HEAD_BYTES: usize = 64 << 10;
/// Longest extensions of all chunks of a body together, and longest trailers, in bytes.
const MAX_EXTRA_BYTES: usize = 16 << 10;

/// What a server must not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Offence(pub &'static str);

/// How a body is delimited (RFC 9112 §6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    Length(u64),
    Chunked,
    /// By the end of the connection.
    Close,
}

/// Writes the head of a request whose fields are in normal form. One that is not chunked has a length, or no body.
pub(super) fn put_request(out: &mut Vec<u8>, head: &Head<'_>, is_chunked: bool) {
    let Head { method, authority, path, fields, protocol, .. } = head;
    // What HTTP/2 and 3 ask for with CONNECT is GET with an Upgrade here (RFC 8441 §5).
    let method = if protocol.is_some() { &Method::GET } else { *method };
    for part in [method.as_str(), " ", path, " HTTP/1.1\r\nhost: ", authority, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    put_fields(out, fields.iter().filter(|(name, _)| **name != header::HOST));
    // Whoever says TE has to name it in Connection, too (RFC 9110 §10.1.4).
    let options: &[u8] = match (protocol.is_some(), fields.contains_key(header::TE)) {
        (true, true) => b"connection: upgrade, te\r\n",
        (true, false) => b"connection: upgrade\r\n",
        (false, true) => b"connection: te\r\n",
        (false, false) => b"",
    };
    out.extend_from_slice(options);
    if let Some(Protocol(name)) = protocol {
        for part in ["upgrade: ", name, "\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }
    if is_chunked {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    } else if matches!(*method, Method::POST | Method::PUT | Method::PATCH)
        && !fields.contains_key(header::CONTENT_LENGTH)
    {
        // Servers wait for a body of these, or refuse what does not say that there is none (RFC 9110 §8.6).
        out.extend_from_slice(b"content-length: 0\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

fn put_fields<'a>(out: &mut Vec<u8>, fields: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>) {
    for (name, value) in fields {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }
}

/// What stands before the data of a chunk; behind it stands CRLF.
pub(super) fn put_chunk_head(out: &mut Vec<u8>, length: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let first = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1);
    out.extend((0..first).rev().map(|digit| DIGITS[length >> (4 * digit) & 15]));
    out.extend_from_slice(b"\r\n");
}

/// The end of a chunked body.
pub(super) fn put_last_chunk(out: &mut Vec<u8>, trailers: Option<&HeaderMap>) {
    out.extend_from_slice(b"0\r\n");
    put_fields(out, trailers.into_iter().flatten());
    out.extend_from_slice(b"\r\n");
}

/// The head of an answer.
#[derive(Debug)]
pub(super) struct AnswerHead {
    pub(super) parts: response::Parts,
    /// `None` if there is no body.
    pub(super) framing: Option<Framing>,
    /// Whether the connection can carry another exchange after this one.
    pub(super) keeps: bool,
}

/// Reads a head, and tells how long it is; `None` if it is not all there. `method` is the request's.
pub(super) fn read_head(bytes: &[u8], method: &Method) -> Result<Option<(AnswerHead, usize)>, Offence> {
    let mut room = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut answer = httparse::Response::new(&mut []);
    let parsed = ParserConfig::default().parse_response_with_uninit_headers(&mut answer, bytes, &mut room);
    let length = match parsed {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) if bytes.len() >= MAX_HEAD_BYTES => return Err(Offence("its head is too long")),
        Ok(Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Offence("it has too many header fields")),
        Err(_) => return Err(Offence("its head is malformed")),
    };
    if length > MAX_HEAD_BYTES {
        return Err(Offence("its head is too long"));
    }
    let malformed = |_| Offence("its head is malformed");
    let mut parts = Response::new(()).into_parts().0;
    let code = answer.code.unwrap_or_default();
    parts.status = StatusCode::from_u16(code).map_err(|_| Offence("its status is none"))?;
    parts.version = if answer.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };
    parts.headers.reserve(answer.headers.len() + 2);
    // One piece for all values.
    let block = Bytes::copy_from_slice(&bytes[..length]);
    for field in &*answer.headers {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Offence("a field's name is none"))?;
        let at = field.value.as_ptr() as usize - bytes.as_ptr() as usize;
        let value = match field.value {
            [] => HeaderValue::from_static(""),
            value => HeaderValue::from_maybe_shared(block.slice(at..at + value.len())).map_err(malformed)?,
        };
        parts.headers.append(name, value);
    }
    let framing = framing(&parts, method)?;
    let keeps = parts.version == Version::HTTP_11 && !says(&parts.headers, "close")
        || parts.version == Version::HTTP_10 && says(&parts.headers, "keep-alive");
    Ok(Some((AnswerHead { keeps: keeps && framing != Some(Framing::Close), parts, framing }, length)))
}

/// Whether a head may end in there.
pub(super) fn may_end_head(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|two| two == b"\n\n") || bytes.windows(3).any(|three| three == b"\n\r\n")
}

/// Whether `Connection` says that.
fn says(fields: &HeaderMap, what: &str) -> bool {
    let values = fields.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case(what))
}

fn framing(head: &response::Parts, method: &Method) -> Result<Option<Framing>, Offence> {
    let length = content_length(&head.headers).map_err(|malformed| Offence(malformed.reason))?;
    let mut codings = head.headers.get_all(header::TRANSFER_ENCODING).iter();
    let is_chunked = match (codings.next(), codings.next()) {
        (None, _) => false,
        (Some(_), _) if length.is_some() => return Err(Offence("both Content-Length and Transfer-Encoding")),
        (Some(_), _) if head.version == Version::HTTP_10 => return Err(Offence("HTTP/1.0 with a transfer coding")),
        (Some(only), None) if only.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") => true,
        _ => return Err(Offence("a transfer coding other than chunked")),
    };
    let is_bodiless = *method == Method::HEAD
        || head.status.is_informational()
        || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    Ok(match length {
        _ if is_bodiless => None,
        Some(0) => None,
        Some(length) => Some(Framing::Length(length)),
        None if is_chunked => Some(Framing::Chunked),
        None => Some(Framing::Close),
    })
}

/// Takes a body out of its framing.
#[derive(Debug)]
pub(super) struct Decoder {
    state: State,
    /// How much there was of what nobody needs, or is kept until all of it is there.
    extra_bytes: usize,
}

#[derive(Debug)]
enum State {
    /// So many bytes are left.
    Length(u64),
    Close,
    /// The size of a chunk, as far as it is read; `None` before its first digit.
    Size(Option<u64>),
    /// Extensions of a chunk: nobody needs them.
    Extension(u64),
    /// The line feed behind the size.
    SizeEnd(u64),
    Chunk(u64),
    ChunkEnd,
    ChunkLineFeed,
    /// Trailers, as far as they are read.
    Trailers(Vec<u8>),
    Done,
}

/// What came of reading on.
#[derive(Debug)]
pub(super) enum Step {
    Data(Bytes),
    Trailers(HeaderMap),
    /// There must be more first.
    Starved,
    Done,
}

impl Decoder {
    pub(super) fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size(None),
            Framing::Close => State::Close,
        };
        Self { state, extra_bytes: 0 }
    }

    /// How much of the body is left, if that is known.
    pub(super) fn whole_left(&self) -> Option<u64> {
        match self.state {
            State::Length(left) => Some(left),
            State::Done => Some(0),
            _ => None,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// The connection has ended: whether the body has, too.
    pub(super) fn end(&mut self) -> Result<(), Offence> {
        match self.state {
            State::Close | State::Done => {
                self.state = State::Done;
                Ok(())
            }
            _ => Err(Offence("it closed the connection within the body")),
        }
    }

    /// Reads on; what belongs to the body is taken from `input`.
    pub(super) fn step(&mut self, input: &mut Bytes) -> Result<Step, Offence> {
        loop {
            if matches!(self.state, State::Done) {
                return Ok(Step::Done);
            }
            if input.is_empty() {
                return Ok(Step::Starved);
            }
            match &mut self.state {
                State::Close => return Ok(Step::Data(std::mem::take(input))),
                State::Length(left) | State::Chunk(left) => {
                    let data = input.split_to(input.len().min(usize::try_from(*left).unwrap_or(usize::MAX)));
                    *left -= data.len() as u64;
                    if *left == 0 {
                        self.state = if matches!(self.state, State::Length(_)) { State::Done } else { State::ChunkEnd };
                    }
                    return Ok(Step::Data(data));
                }
                State::Trailers(kept) => {
                    let room = MAX_EXTRA_BYTES.saturating_sub(kept.len());
                    let before = kept.len();
                    kept.extend_from_slice(&input[..input.len().min(room)]);
                    match trailers(kept)? {
                        Some((trailers, length)) => {
                            input.advance(length - before);
                            self.state = State::Done;
                            return Ok(if trailers.is_empty() { Step::Done } else { Step::Trailers(trailers) });
                        }
                        None if input.len() >= room => return Err(Offence("its trailers are too long")),
                        None => input.clear(),
                    }
                }
                _ => {
                    let byte = input.get_u8();
                    self.state = self.next(byte)?;
                }
            }
        }
    }

    /// What follows one byte of what stands between the data of chunks.
    fn next(&mut self, byte: u8) -> Result<State, Offence> {
        let malformed = Err(Offence("a chunk of its body is malformed"));
        Ok(match (&self.state, byte) {
            (State::Size(size), digit) if digit.is_ascii_hexdigit() => {
                let digit = u64::from((digit as char).to_digit(16).unwrap_or_default());
                let size = size.unwrap_or_default();
                match size.checked_mul(16) {
                    Some(size) => State::Size(Some(size + digit)),
                    None => return Err(Offence("a chunk of its body is too large")),
                }
            }
            (State::Size(Some(size)) | State::Extension(size), b'\r') => State::SizeEnd(*size),
            (State::Size(Some(size)), b';' | b' ' | b'\t') => State::Extension(*size),
            (State::Extension(_), b'\n') => return malformed,
            (State::Extension(size), _) => {
                self.extra_bytes += 1;
                if self.extra_bytes > MAX_EXTRA_BYTES {
                    return Err(Offence("its chunks have too long extensions"));
                }
                State::Extension(*size)
            }
            (State::SizeEnd(0), b'\n') => State::Trailers(Vec::new()),
            (State::SizeEnd(size), b'\n') => State::Chunk(*size),
            (State::ChunkEnd, b'\r') => State::ChunkLineFeed,
            (State::ChunkLineFeed, b'\n') => State::Size(None),
            _ => return malformed,
        })
    }
}

/// Trailers and how long they are, with the empty line behind them; `None` if that is not there yet.
fn trailers(bytes: &[u8]) -> Result<Option<(HeaderMap, usize)>, Offence> {
    let mut room = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let malformed = Offence("its trailers are malformed");
    match httparse::parse_headers(bytes, &mut room) {
        Ok(Status::Partial) => Ok(None),
        Err(_) => Err(malformed),
        Ok(Status::Complete((length, fields))) => {
            let mut trailers = HeaderMap::with_capacity(fields.len());
            for field in fields {
                let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| malformed)?;
                trailers.append(name, HeaderValue::from_bytes(field.value).map_err(|_| malformed)?);
            }
            Ok(Some((trailers, length)))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head_of(text: &str, method: Method) -> Result<Option<(AnswerHead, usize)>, Offence> {
        read_head(text.as_bytes(), &method)
    }

    #[test]
    fn how_an_answer_is_delimited() {
        for (method, head, framing, keeps) in [
            (Method::GET, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", Some(Framing::Length(5)), true),
            (Method::GET, "HTTP/1.1 200 OK\r\ncontent-length: 5, 5\r\n\r\n", Some(Framing::Length(5)), true),
            (Method::GET, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", None, true),
            (Method::GET, "HTTP/1.1 200\r\ntransfer-encoding: Chunked\r\n\r\n", Some(Framing::Chunked), true),
            (Method::GET, "HTTP/1.1 200 OK\r\n\r\n", Some(Framing::Close), false),
            (Method::HEAD, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", None, true),
            (Method::HEAD, "HTTP/1.1 200 OK\r\n\r\n", None, true),
            (Method::GET, "HTTP/1.1 204 No\r\n\r\n", None, true),
            (Method::GET, "HTTP/1.1 304 No\r\ncontent-length: 7\r\n\r\n", None, true),
            (Method::GET, "HTTP/1.1 103 Early\r\nlink: a\r\n\r\n", None, true),
            (Method::GET, "HTTP/1.1 204 No\r\nconnection: x, Close\r\n\r\n", None, false),
            (Method::GET, "HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n", Some(Framing::Length(5)), false),
            (
                Method::GET,
                "HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\n",
                Some(Framing::Length(5)),
                true,
            ),
        ] {
            let (found, length) = head_of(&format!("{head}rest"), method).unwrap().expect(head);
            assert_eq!((found.framing, found.keeps, length), (framing, keeps, head.len()), "{head}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for head in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nname : value\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n",
            "HTTP/1.1 200 OK\r\n: b\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: b\0c\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "SSH-2.0-OpenSSH\r\n\r\n",
        ] {
            assert!(head_of(head, Method::GET).is_err(), "{head}");
        }
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(MAX_FIELDS + 1));
        assert!(head_of(&many, Method::GET).is_err());
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(MAX_HEAD_BYTES));
        assert!(head_of(&long, Method::GET).is_err());
        assert!(head_of(&long[..1000], Method::GET).unwrap().is_none());
    }

    /// Reads a body that comes in pieces of that size: data, trailers, and what is left behind it.
    fn read(framing: Framing, bytes: &[u8], piece: usize) -> Result<(Vec<u8>, Option<HeaderMap>, usize), Offence> {
        let mut decoder = Decoder::new(framing);
        let (mut data, mut trailers) = (Vec::new(), None);
        let mut rest = bytes.len();
        for piece in bytes.chunks(piece) {
            let mut input = Bytes::copy_from_slice(piece);
            loop {
                match decoder.step(&mut input)? {
                    Step::Data(more) => data.extend_from_slice(&more),
                    Step::Trailers(found) => trailers = Some(found),
                    Step::Starved => break,
                    Step::Done => return Ok((data, trailers, rest - piece.len() + input.len())),
                }
            }
            rest -= piece.len();
        }
        decoder.end()?;
        Ok((data, trailers, 0))
    }

    #[test]
    fn bodies_come_out_whole_however_they_are_cut() {
        let chunked = b"5\r\nhello\r\n1;a=\"b;c\"\r\n \r\n0005 \r\nworld\r\n0\r\nx-a: 1\r\nx-b: 2\r\n\r\nHTTP";
        for piece in 1..=chunked.len() {
            let (data, trailers, left) = read(Framing::Chunked, chunked, piece).unwrap();
            assert_eq!((&data[..], left), (&b"hello world"[..], 4), "{piece}");
            assert_eq!(trailers.unwrap()["x-b"], "2");
            let (data, trailers, left) = read(Framing::Chunked, b"b\r\nhello world\r\n0\r\n\r\n", piece).unwrap();
            assert_eq!((&data[..], trailers, left), (&b"hello world"[..], None, 0), "{piece}");
            assert_eq!(read(Framing::Length(5), b"hello world", piece).unwrap().2, 6, "{piece}");
            assert_eq!(read(Framing::Close, b"hello world", piece).unwrap().0, b"hello world", "{piece}");
        }
    }

    #[test]
    fn malformed_bodies_are_refused() {
        for bad in [
            &b"\r\nhello"[..],
            b"g\r\n",
            b"5\nhello",
            b"5;a\nb\r\nhello",
            b"5\r\nhelloo\r\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"-5\r\n",
            b"0x5\r\n",
            b"10000000000000000\r\n",
            b"0\r\nbad trailer\r\n\r\n",
            b"5\r\nhell",
            b"5\r\nhello\r\n0\r\n",
        ] {
            assert!(read(Framing::Chunked, bad, 3).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        assert!(read(Framing::Length(6), b"hello", 3).is_err());
        let extensions = format!("1;{}\r\na\r\n", "x".repeat(1000)).repeat(20);
        assert!(read(Framing::Chunked, extensions.as_bytes(), 1000).is_err());
        let trailers = format!("0\r\n{}", "a: bcdefghij\r\n".repeat(2000));
        assert!(read(Framing::Chunked, trailers.as_bytes(), 1000).is_err());
    }

    #[test]
    fn requests_as_they_are_written() {
        let fields = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static("*/*"))]);
        let put = |method, is_chunked| {
            let mut out = Vec::new();
            let head = Head {
                method: &method,
                authority: "web",
                path: "/a?b",
                fields: &fields,
                protocol: None,
                interim: None,
            };
            put_request(&mut out, &head, is_chunked);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(put(Method::GET, false), "GET /a?b HTTP/1.1\r\nhost: web\r\naccept: */*\r\n\r\n");
        let posted = put(Method::POST, true);
        assert!(posted.ends_with("accept: */*\r\ntransfer-encoding: chunked\r\n\r\n"), "{posted}");
        assert!(put(Method::POST, false).contains("content-length: 0\r\n"));
    }

    proptest! {
        /// Whatever a server sends, and however it is cut.
        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), piece in 1usize..50) {
            let _ = read_head(&bytes, &Method::GET);
            for framing in [Framing::Chunked, Framing::Length(20), Framing::Close] {
                let _ = read(framing, &bytes, piece);
            }
        }

        #[test]
        fn chunks_as_written_are_read(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..400), 0..9), piece in 1usize..200) {
            let mut out = Vec::new();
            for chunk in &chunks {
                put_chunk_head(&mut out, chunk.len());
                out.extend_from_slice(chunk);
                out.extend_from_slice(b"\r\n");
            }
            put_last_chunk(&mut out, None);
            prop_assert_eq!(read(Framing::Chunked, &out, piece).unwrap().0, chunks.concat());
        }
    }
}
