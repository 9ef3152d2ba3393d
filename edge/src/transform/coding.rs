//! Compression of answers (RFC 9110 §8.4): what clients can read, of what is worth it, and as it comes.

use std::{
    io::{self, Write},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, response};
use http_body::{Frame, SizeHint};
use starling_http::{Body, BodyError, Recoded, normal::number};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Answers that are shorter are left alone, in bytes.
const LEAST_BYTES: u64 = 256;
/// How hard each tries: the levels at which none takes much longer than the network would.
const BROTLI_QUALITY: u32 = 4;
const BROTLI_WINDOW_BITS: u32 = 18;
const BROTLI_BUFFER_BYTES: usize = 4096;
const ZSTD_LEVEL: i32 = 3;
const ZSTD_WINDOW_BITS: u32 = 18;
const GZIP_LEVEL: u32 = 5;

/// Answers that are coded at a time, over all workers: each takes up to some two megabytes for as long as its client takes it.
/// More are sent as they are.
const MAX_CODERS: usize = 200;
static CODERS: Semaphore = Semaphore::const_new(MAX_CODERS);

/// A coding, the best first where a client likes several as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Brotli,
    Zstd,
    Gzip,
}

impl Coding {
    const ALL: [Self; 3] = [Self::Brotli, Self::Zstd, Self::Gzip];

    fn as_str(self) -> &'static str {
        match self {
            Self::Brotli => "br",
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        }
    }

    /// What a client likes best (RFC 9110 §12.5.3); `None` if it takes none of them.
    fn liked(fields: &HeaderMap) -> Option<Self> {
        let items = fields.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
        let weigh = |item: &str| {
            let (name, params) = item.split_once(';').unwrap_or((item, ""));
            let quality = params.split(';').find_map(|param| {
                let (key, value) = param.split_once('=')?;
                key.trim().eq_ignore_ascii_case("q").then(|| value.trim().parse::<f32>().unwrap_or(0.0))
            });
            (name.trim().to_ascii_lowercase(), quality.unwrap_or(1.0))
        };
        let items: Vec<(String, f32)> = items.flat_map(|value| value.split(',')).map(weigh).collect();
        let quality = |coding: Self| {
            let named = |name: &str| items.iter().find(|(known, _)| known == name).map(|(_, quality)| *quality);
            let of = named(coding.as_str()).or_else(|| (coding == Self::Gzip).then(|| named("x-gzip")).flatten());
            of.or_else(|| named("*")).unwrap_or(0.0)
        };
        let liked = Self::ALL.into_iter().map(|coding| (coding, quality(coding))).filter(|(_, quality)| *quality > 0.0);
        liked
            .fold(None, |best: Option<(Self, f32)>, (coding, quality)| match best {
                Some((_, most)) if most >= quality => best,
                _ => Some((coding, quality)),
            })
            .map(|(coding, _)| coding)
    }
}

/// What a request says of codings.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    coding: Option<Coding>,
    is_head: bool,
}

impl Wish {
    pub(crate) fn of(method: &Method, fields: &HeaderMap) -> Self {
        Self { coding: Coding::liked(fields), is_head: *method == Method::HEAD }
    }

    /// Codes an answer, if the client can read it then and it is worth it.
    pub(crate) fn grant(self, head: &mut response::Parts, body: Body) -> Body {
        if head.status == StatusCode::NOT_MODIFIED {
            // About what a cache may have got coded.
            head.headers.append(header::VARY, HeaderValue::from_static("accept-encoding"));
            weaken(&mut head.headers);
            return body;
        }
        if !is_worth_it(head, &body) {
            return body;
        }
        // Also of the plain form: a cache must not give it to others as all that there is.
        head.headers.append(header::VARY, HeaderValue::from_static("accept-encoding"));
        // What a GET would get is not known before it is made.
        let Some(coding) = self.coding.filter(|_| !self.is_head) else { return body };
        let Ok(place) = CODERS.try_acquire() else { return body };
        let Ok(encoder) = Encoder::new(coding) else { return body };
        head.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding.as_str()));
        for name in [header::CONTENT_LENGTH, header::ACCEPT_RANGES] {
            head.headers.remove(name);
        }
        // Of the bytes as they were.
        for name in ["content-digest", "repr-digest", "digest", "content-md5"] {
            head.headers.remove(name);
        }
        weaken(&mut head.headers);
        Body::recoded(Coded { body, encoder: Some(encoder), trailers: None, unflushed: false, _place: place })
    }
}

/// The bytes are not those any more for which the tag stands (RFC 9110 §8.8.3.3).
fn weaken(headers: &mut HeaderMap) {
    let tag = headers.get(header::ETAG).and_then(|tag| tag.to_str().ok());
    if let Some(tag) = tag.filter(|tag| !tag.starts_with("W/"))
        && let Ok(weak) = HeaderValue::try_from(format!("W/{tag}"))
    {
        headers.insert(header::ETAG, weak);
    }
}

fn is_worth_it(head: &response::Parts, body: &Body) -> bool {
    let text = |name| head.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
    let is_whole = head.status.is_success()
        && !matches!(head.status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::PARTIAL_CONTENT)
        && !head.headers.contains_key(header::CONTENT_RANGE);
    let length = number(&head.headers, "content-length").or_else(|| http_body::Body::size_hint(body).exact());
    let directives = head.headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let may_be_changed = !directives.into_iter().any(|value| value.to_ascii_lowercase().contains("no-transform"));
    is_whole
        && may_be_changed
        && !head.headers.contains_key(header::CONTENT_ENCODING)
        && length.is_none_or(|length| length >= LEAST_BYTES)
        && is_text(text(header::CONTENT_TYPE))
}

/// Whether a media type is one that shrinks. Events are not: each must be there at once, and alone.
fn is_text(media_type: &str) -> bool {
    let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let (kind, subtype) = essence.split_once('/').unwrap_or((&essence, ""));
    match (kind, subtype) {
        ("text", "event-stream") => false,
        // A protocol, which has compression of its own.
        ("application", subtype) if subtype.starts_with("grpc") => false,
        ("text", _) => true,
        ("application", "json" | "javascript" | "xml" | "wasm" | "graphql" | "x-ndjson" | "manifest+json") => true,
        ("image", "bmp" | "x-icon") | ("font", "ttf" | "otf") => true,
        (_, subtype) => subtype.ends_with("+json") || subtype.ends_with("+xml") || subtype.ends_with("+text"),
    }
}

enum Encoder {
    Brotli(Box<brotli::CompressorWriter<Vec<u8>>>),
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
    Gzip(flate2::write::GzEncoder<Vec<u8>>),
}

impl Encoder {
    fn new(coding: Coding) -> io::Result<Self> {
        Ok(match coding {
            Coding::Brotli => {
                let (quality, window) = (BROTLI_QUALITY, BROTLI_WINDOW_BITS);
                let writer = brotli::CompressorWriter::new(Vec::new(), BROTLI_BUFFER_BYTES, quality, window);
                Self::Brotli(Box::new(writer))
            }
            Coding::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
                encoder.window_log(ZSTD_WINDOW_BITS)?;
                Self::Zstd(encoder)
            }
            Coding::Gzip => Self::Gzip(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(GZIP_LEVEL))),
        })
    }

    fn writer(&mut self) -> &mut dyn Write {
        match self {
            Self::Brotli(encoder) => encoder,
            Self::Zstd(encoder) => encoder,
            Self::Gzip(encoder) => encoder,
        }
    }

    /// What it has made so far.
    fn made(&mut self) -> Bytes {
        let made = match self {
            Self::Brotli(encoder) => encoder.get_mut(),
            Self::Zstd(encoder) => encoder.get_mut(),
            Self::Gzip(encoder) => encoder.get_mut(),
        };
        std::mem::take(made).into()
    }

    fn finish(self) -> io::Result<Bytes> {
        Ok(match self {
            Self::Brotli(encoder) => encoder.into_inner(),
            Self::Zstd(encoder) => encoder.finish()?,
            Self::Gzip(encoder) => encoder.finish()?,
        }
        .into())
    }
}

/// A body, coded.
struct Coded {
    body: Body,
    /// `None` when all has gone through it.
    encoder: Option<Encoder>,
    trailers: Option<Frame<Bytes>>,
    /// It has something that the client waits for.
    unflushed: bool,
    _place: SemaphorePermit<'static>,
}

impl http_body::Body for Coded {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let broken = |error: io::Error| BodyError::Broken(format!("it cannot be compressed: {error}"));
        loop {
            let this = &mut *self;
            let Some(encoder) = &mut this.encoder else { return Poll::Ready(this.trailers.take().map(Ok)) };
            let result = match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        this.unflushed = true;
                        encoder.writer().write_all(&data).map(|()| encoder.made())
                    }
                    Err(trailers) => {
                        this.trailers = Some(trailers);
                        continue;
                    }
                },
                Poll::Ready(Some(Err(error))) => {
                    this.encoder = None;
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => match this.encoder.take().map(Encoder::finish) {
                    Some(result) => result,
                    None => return Poll::Ready(None),
                },
                // The service takes its time: the client gets what there is.
                Poll::Pending if std::mem::take(&mut this.unflushed) => {
                    encoder.writer().flush().map(|()| encoder.made())
                }
                Poll::Pending => return Poll::Pending,
            };
            match result {
                Ok(made) if made.is_empty() => {}
                Ok(made) => return Poll::Ready(Some(Ok(Frame::data(made)))),
                Err(error) => {
                    this.encoder = None;
                    return Poll::Ready(Some(Err(broken(error))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.encoder.is_none() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Recoded for Coded {
    fn source(&self) -> &Body {
        &self.body
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use http::Response;
    use http_body_util::BodyExt;

    use super::*;

    fn fields(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut fields = HeaderMap::new();
        for (name, value) in pairs {
            fields.append(*name, value.parse().unwrap());
        }
        fields
    }

    #[test]
    fn what_a_client_likes_best() {
        for (accept, want) in [
            ("gzip, deflate, br, zstd", Some("br")),
            ("gzip, zstd", Some("zstd")),
            ("br;q=0.5, GZIP;q=0.8", Some("gzip")),
            ("x-gzip", Some("gzip")),
            ("br;q=0, *;q=0.1", Some("zstd")),
            ("*", Some("br")),
            ("identity", None),
            ("gzip;q=0", None),
            ("gzip;q=x", None),
            ("", None),
        ] {
            let liked = Coding::liked(&fields(&[("accept-encoding", accept)]));
            assert_eq!(liked.map(Coding::as_str), want, "{accept}");
        }
        assert_eq!(Coding::liked(&HeaderMap::new()), None);
    }

    fn answer(status: u16, pairs: &[(&'static str, &str)]) -> response::Parts {
        let (mut head, ()) = Response::builder().status(status).body(()).unwrap().into_parts();
        head.headers = fields(pairs);
        head
    }

    fn plain(coding: Coding, coded: &[u8]) -> Vec<u8> {
        let mut plain = Vec::new();
        match coding {
            Coding::Brotli => drop(brotli::Decompressor::new(coded, 4096).read_to_end(&mut plain).unwrap()),
            Coding::Zstd => plain = zstd::stream::decode_all(coded).unwrap(),
            Coding::Gzip => drop(flate2::read::GzDecoder::new(coded).read_to_end(&mut plain).unwrap()),
        }
        plain
    }

    #[tokio::test]
    async fn what_was_coded_is_read_as_it_was() {
        let text = "All work and no play makes Jack a dull boy. ".repeat(5000);
        for coding in Coding::ALL {
            let mut head = answer(
                200,
                &[("content-type", "text/html; charset=utf-8"), ("etag", "\"1\""), ("content-length", "220000")],
            );
            let wish = Wish { coding: Some(coding), is_head: false };
            let body = wish.grant(&mut head, Body::full(text.clone()));
            let coded = body.collect().await.unwrap().to_bytes();
            assert!(coded.len() < text.len() / 50, "{coding:?} {}", coded.len());
            assert_eq!(plain(coding, &coded), text.as_bytes());
            let want = fields(&[
                ("content-type", "text/html; charset=utf-8"),
                ("etag", "W/\"1\""),
                ("vary", "accept-encoding"),
                ("content-encoding", coding.as_str()),
            ]);
            assert_eq!(head.headers, want);
        }
    }

    #[test]
    fn what_is_left_as_it_is() {
        let kind = ("content-type", "application/json");
        let wish = Wish { coding: Some(Coding::Gzip), is_head: false };
        let long = || Body::full("x".repeat(1000));
        for (status, pairs, is_coded) in [
            (200, &[kind][..], true),
            (404, &[kind], false),
            (206, &[kind], false),
            (200, &[kind, ("content-encoding", "br")], false),
            (200, &[kind, ("cache-control", "public, No-Transform")], false),
            (200, &[("content-type", "text/event-stream")], false),
            (200, &[("content-type", "image/png")], false),
            (200, &[("content-type", "application/grpc")], false),
            (200, &[("content-type", "application/grpc-web+json")], false),
            (200, &[kind, ("cache-control", "public"), ("cache-control", "no-transform")], false),
            (200, &[("content-type", "image/svg+xml")], true),
            (200, &[("content-type", "application/problem+json")], true),
            (200, &[], false),
        ] {
            let mut head = answer(status, pairs);
            let _ = wish.grant(&mut head, long());
            let coded = head.headers.get("content-encoding").is_some_and(|coding| coding == "gzip");
            assert_eq!((coded, head.headers.contains_key("vary")), (is_coded, is_coded), "{status} {pairs:?}");
        }
        let mut head = answer(200, &[kind]);
        let _ = wish.grant(&mut head, Body::full("short"));
        assert!(!head.headers.contains_key("content-encoding"));
        // A cache must know that others may get it otherwise.
        for wish in [Wish { coding: None, is_head: false }, Wish { is_head: true, ..wish }] {
            let mut head = answer(200, &[kind]);
            let _ = wish.grant(&mut head, long());
            assert!(head.headers.contains_key("vary") && !head.headers.contains_key("content-encoding"));
        }
    }
}
