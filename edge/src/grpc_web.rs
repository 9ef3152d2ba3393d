//! gRPC-Web: gRPC for pages in browsers, which see no trailers, and some of which see no bytes (PROTOCOL-WEB.md of the gRPC
//! project). The service gets and gives gRPC.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use base64::{DecodeError, Engine, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, header};
use http_body::Frame;
use starling_http::{Body, BodyError, Recoded};

const GRPC: &str = "application/grpc";
const WEB: &str = "application/grpc-web";
const WEB_TEXT: &str = "application/grpc-web-text";

/// Marks the frame that has the trailers.
const TRAILERS: u8 = 0x80;

/// What a call that has no body says in its head instead of in trailers.
const STATUS: [&str; 3] = ["grpc-status", "grpc-message", "grpc-status-details-bin"];

/// How a page speaks, by its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Page {
    sends_text: bool,
    reads_text: bool,
}

impl Page {
    /// `None` if a request is none of a page's.
    pub(crate) fn of(fields: &HeaderMap) -> Option<Self> {
        let is_text = |name| fields.get(name).and_then(is_text);
        let sends_text = is_text(header::CONTENT_TYPE)?;
        Some(Self { sends_text, reads_text: is_text(header::ACCEPT).unwrap_or(sends_text) })
    }

    /// Turns its request into one of gRPC.
    pub(crate) fn enter(self, fields: &mut HeaderMap, body: Body) -> Body {
        let from = if self.sends_text { WEB_TEXT } else { WEB };
        renamed(fields, from, GRPC);
        fields.remove(header::ACCEPT);
        // The last frame stands behind the service's bytes, and could not be coded with them.
        fields.remove(header::ACCEPT_ENCODING);
        // Servers refuse callers who would not see the status.
        fields.insert(header::TE, HeaderValue::from_static("trailers"));
        if !self.sends_text {
            return body;
        }
        fields.remove(header::CONTENT_LENGTH);
        Body::recoded(FromText { body, rest: BytesMut::new() })
    }

    /// Turns the answer of gRPC into one for the page. One that is not of gRPC stays as it is.
    pub(crate) fn leave(self, fields: &mut HeaderMap, body: Body) -> Body {
        if !renamed(fields, GRPC, if self.reads_text { WEB_TEXT } else { WEB }) {
            return body;
        }
        // Of the head, a page reads only what the rules of other origins let it.
        let mut status = HeaderMap::new();
        if http_body::Body::is_end_stream(&body) {
            for name in STATUS {
                if let Some(value) = fields.remove(name) {
                    status.insert(name, value);
                }
            }
        }
        fields.remove(header::CONTENT_LENGTH);
        let status = Some(status).filter(|status| !status.is_empty());
        Body::recoded(ForPage { body, text: self.reads_text, status, ended: false })
    }
}

/// Whether a type of content is gRPC-Web as text; `None` if it is no gRPC-Web.
fn is_text(kind: &HeaderValue) -> Option<bool> {
    let kind = kind.to_str().ok()?;
    [(WEB_TEXT, true), (WEB, false)].into_iter().find_map(|(web, text)| suffix(kind, web).map(|_| text))
}

/// What stands behind the name of a type: `+proto` or parameters.
fn suffix<'a>(kind: &'a str, name: &str) -> Option<&'a str> {
    let (start, suffix) = kind.split_at_checked(name.len())?;
    (start.eq_ignore_ascii_case(name) && (suffix.is_empty() || suffix.starts_with(['+', ';', ' ']))).then_some(suffix)
}

/// Gives the type of content another name; whether it was the one.
fn renamed(fields: &mut HeaderMap, from: &str, to: &str) -> bool {
    let kind = fields.get(header::CONTENT_TYPE).and_then(|kind| suffix(kind.to_str().ok()?, from));
    let Some(Ok(kind)) = kind.map(|suffix| HeaderValue::try_from(format!("{to}{suffix}"))) else { return false };
    fields.insert(header::CONTENT_TYPE, kind);
    true
}

/// A body that came as base64. It may be padded wherever its sender stopped for a while, not only at its end.
struct FromText {
    body: Body,
    /// Less than four digits, which are no bytes yet.
    rest: BytesMut,
}

impl http_body::Body for FromText {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let not_base64 = |_| BodyError::Broken("it is not base64".into());
        loop {
            let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)?) else {
                let cut = !std::mem::take(&mut self.rest).is_empty();
                return Poll::Ready(cut.then(|| Err(BodyError::Broken("its base64 is cut off".into()))));
            };
            // A page has no trailers.
            let Ok(data) = frame.into_data() else { continue };
            self.rest.extend_from_slice(&data);
            let whole = self.rest.len() / 4 * 4;
            let text = self.rest.split_to(whole);
            if !text.is_empty() {
                return Poll::Ready(Some(decoded(&text).map(|bytes| Frame::data(bytes.into())).map_err(not_base64)));
            }
        }
    }
}

impl Recoded for FromText {
    fn source(&self) -> &Body {
        &self.body
    }
}

/// Bytes of base64 in whole fours.
fn decoded(mut text: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    while !text.is_empty() {
        let padded = text.iter().position(|digit| *digit == b'=').map_or(text.len(), |at| at / 4 * 4 + 4);
        let (part, others) = text.split_at(padded);
        STANDARD.decode_vec(part, &mut bytes)?;
        text = others;
    }
    Ok(bytes)
}

/// A body whose trailers are its last frame.
struct ForPage {
    body: Body,
    text: bool,
    /// What takes the place of trailers, if none come.
    status: Option<HeaderMap>,
    ended: bool,
}

impl http_body::Body for ForPage {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)?);
        let trailers = match frame.map(Frame::into_data) {
            Some(Ok(data)) => return Poll::Ready(Some(Ok(Frame::data(self.coded(data))))),
            Some(Err(frame)) => frame.into_trailers().ok(),
            None => self.status.take(),
        };
        self.ended = true;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::data(self.coded(last_frame(&trailers))))))
    }
}

impl Recoded for ForPage {
    fn source(&self) -> &Body {
        &self.body
    }
}

impl ForPage {
    /// Text is padded at once: what is here must not wait for more.
    fn coded(&self, data: Bytes) -> Bytes {
        if self.text { STANDARD.encode(data).into() } else { data }
    }
}

fn last_frame(trailers: &HeaderMap) -> Bytes {
    let mut block = BytesMut::new();
    for (name, value) in trailers {
        for part in [name.as_str().as_bytes(), b":", value.as_bytes(), b"\r\n"] {
            block.put_slice(part);
        }
    }
    let mut frame = BytesMut::with_capacity(5 + block.len());
    frame.put_u8(TRAILERS);
    frame.put_u32(block.len() as u32);
    frame.unsplit(block);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn fields(content: &'static str, accept: Option<&'static str>) -> HeaderMap {
        let mut fields = HeaderMap::new();
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static(content));
        fields.extend(accept.map(|accept| (header::ACCEPT, HeaderValue::from_static(accept))));
        fields
    }

    #[test]
    fn a_page_is_told_by_its_types() {
        let page = |content, accept| Page::of(&fields(content, accept)).map(|page| (page.sends_text, page.reads_text));
        assert_eq!(page("application/grpc-web", None), Some((false, false)));
        assert_eq!(page("Application/gRPC-Web+proto", Some("*/*")), Some((false, false)));
        assert_eq!(page("application/grpc-web-text", None), Some((true, true)));
        assert_eq!(page("application/grpc-web+proto", Some("application/grpc-web-text")), Some((false, true)));
        for other in ["application/grpc", "application/grpc+proto", "application/grpc-webby", "text/plain"] {
            assert_eq!(page(other, None), None, "{other}");
        }
    }

    /// Pieces, each in a frame of its own, and what they are made of.
    struct Pieces(&'static [&'static str], Body);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            let Some((first, others)) = self.0.split_first() else { return Poll::Ready(None) };
            self.0 = others;
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(first.as_bytes())))))
        }
    }

    impl Recoded for Pieces {
        fn source(&self) -> &Body {
            &self.1
        }
    }

    #[tokio::test]
    async fn text_is_read_however_it_was_cut_and_padded() {
        for (pieces, expected) in [
            (&["AAAA"][..], Ok(vec![0, 0, 0])),
            (&["A", "AA", "AAQ", "==", "Ag=="], Ok(vec![0, 0, 0, 1, 2])),
            (&["AQ==Ag==Aw=="], Ok(vec![1, 2, 3])),
            (&[], Ok(vec![])),
            (&["AAA"], Err("cut off")),
            (&["AA=A"], Err("not base64")),
            (&["AA\n="], Err("not base64")),
        ] {
            let page = Page { sends_text: true, reads_text: true };
            let body = Body::recoded(Pieces(pieces, Body::empty()));
            let read = page.enter(&mut fields(WEB_TEXT, None), body).collect().await;
            match (read, expected) {
                (Ok(read), Ok(expected)) => assert_eq!(read.to_bytes(), expected, "{pieces:?}"),
                (Err(error), Err(why)) => assert!(error.to_string().contains(why), "{pieces:?}: {error}"),
                (read, _) => panic!("{pieces:?}: {read:?}"),
            }
        }
    }
}
