//! What a proxy has to know of WebSocket (RFC 6455): the handshake, which is one of HTTP/1.1 alone, and where a frame ends, so that
//! it can say when it goes away.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Frame, SizeHint};

/// What is put behind a key (RFC 6455 §1.3).
const SUFFIX: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A client's handshake with a server.
#[derive(Debug)]
pub struct Handshake {
    key: HeaderValue,
}

impl Handshake {
    /// With a key of its own.
    #[expect(clippy::new_without_default, reason = "no two are alike")]
    pub fn new() -> Self {
        Self { key: encoded(&rand::random::<[u8; 16]>()) }
    }

    /// Puts it into a request, which tells all else, but for the version if it came by HTTP/2 or 3.
    pub fn put_into(&self, fields: &mut HeaderMap) {
        fields.insert(header::SEC_WEBSOCKET_KEY, self.key.clone());
        fields.entry(header::SEC_WEBSOCKET_VERSION).or_insert(HeaderValue::from_static("13"));
    }

    /// Takes the proof out of the answer: whether the server understood.
    pub fn is_accepted(&self, fields: &mut HeaderMap) -> bool {
        fields.remove(header::SEC_WEBSOCKET_ACCEPT) == Some(accept_of(self.key.as_bytes()))
    }
}

/// What a server answers to a key: proof that it understood (RFC 6455 §4.2.2).
pub fn accept_of(key: &[u8]) -> HeaderValue {
    encoded(digest(&SHA1_FOR_LEGACY_USE_ONLY, &[key, SUFFIX].concat()).as_ref())
}

fn encoded(bytes: &[u8]) -> HeaderValue {
    HeaderValue::from_str(&STANDARD.encode(bytes)).expect("base64 is ASCII")
}

/// Who is told, by frames of whom: clients mask theirs (RFC 6455 §5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    Client,
    Server,
}

impl To {
    /// A Close frame that says 1001: an endpoint goes away (RFC 6455 §7.4.1).
    fn going_away(self) -> Bytes {
        Bytes::from_static(match self {
            Self::Client => &[0x88, 2, 0x03, 0xe9],
            // Masked with zeros, which is a key like any other.
            Self::Server => &[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9],
        })
    }
}

/// A body that ends when its node goes away, one direction of a WebSocket with a Close frame; any other body, as it is.
pub(crate) struct Leaving<B> {
    body: B,
    farewell: Option<Box<Farewell>>,
}

struct Farewell {
    /// Who is told by a frame; nobody if there is no word to be said.
    to: Option<To>,
    frames: Frames,
    leaving: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    said: bool,
}

impl<B> Leaving<B> {
    /// Of a WebSocket, towards one of its ends.
    pub(crate) fn websocket(body: B, to: To, leaving: impl Future<Output = ()> + Send + 'static) -> Self {
        Self::until(body, Some(to), leaving)
    }

    /// Of a tunnel for packets, whose stream has nothing to say.
    pub(crate) fn packets(body: B, leaving: impl Future<Output = ()> + Send + 'static) -> Self {
        Self::until(body, None, leaving)
    }

    fn until(body: B, to: Option<To>, leaving: impl Future<Output = ()> + Send + 'static) -> Self {
        let leaving: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(leaving);
        let farewell = Farewell { to, frames: Frames::default(), leaving: Some(leaving), said: false };
        Self { body, farewell: Some(Box::new(farewell)) }
    }

    /// Of anything else.
    pub(crate) fn plain(body: B) -> Self {
        Self { body, farewell: None }
    }
}

impl Farewell {
    fn is_due(&mut self, cx: &mut Context<'_>) -> bool {
        if self.leaving.as_mut().is_some_and(|leaving| leaving.as_mut().poll(cx).is_ready()) {
            self.leaving = None;
        }
        self.leaving.is_none()
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Leaving<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let Self { body, farewell } = &mut *self;
        let Some(farewell) = farewell else { return Pin::new(body).poll_frame(cx) };
        if farewell.said {
            return Poll::Ready(None);
        }
        let is_due = farewell.is_due(cx);
        if is_due && farewell.frames.are_whole() {
            farewell.said = true;
            // Who has closed already needs no other reason.
            let word = farewell.to.filter(|_| !farewell.frames.closed).map(To::going_away);
            return Poll::Ready(word.map(|word| Ok(Frame::data(word))));
        }
        let frame = ready!(Pin::new(body).poll_frame(cx));
        Poll::Ready(match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(mut data) if farewell.to.is_some() => {
                    let whole = farewell.frames.pass(&data, is_due);
                    data.truncate(whole);
                    Some(Ok(Frame::data(data)))
                }
                Ok(data) => Some(Ok(Frame::data(data))),
                Err(frame) => Some(Ok(frame)),
            },
            end => end,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.farewell.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.farewell.is_none() { self.body.size_hint() } else { SizeHint::default() }
    }
}

impl<B> fmt::Debug for Leaving<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaving").finish_non_exhaustive()
    }
}

/// Follows the frames of one direction as far as needed to know where one ends (RFC 6455 §5.2).
#[derive(Debug, Default)]
struct Frames {
    /// The head of a frame, as far as it has come.
    head: Vec<u8>,
    /// What is left of its payload.
    left: u64,
    /// A Close frame has passed.
    closed: bool,
}

impl Frames {
    /// Whether no frame has begun that has not ended.
    fn are_whole(&self) -> bool {
        self.head.is_empty() && self.left == 0
    }

    /// Takes the next bytes; with `to_end` only as far as a frame ends in them, if one does. Returns how many it took.
    fn pass(&mut self, bytes: &[u8], to_end: bool) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            if self.left > 0 {
                let passed = self.left.min((bytes.len() - at) as u64);
                self.left -= passed;
                at += passed as usize;
            } else {
                self.head.push(bytes[at]);
                at += 1;
                if let Some(length) = payload_behind(&self.head) {
                    self.closed |= self.head[0] & 0x0f == 8;
                    self.left = length;
                    self.head.clear();
                }
            }
            if to_end && self.are_whole() {
                break;
            }
        }
        at
    }
}

/// How long the payload is behind a head; `None` if it is not all there.
fn payload_behind(head: &[u8]) -> Option<u64> {
    let [_, second, rest @ ..] = head else { return None };
    let mask = if second & 0x80 == 0 { 0 } else { 4 };
    let (bytes, short) = match second & 0x7f {
        126 => (2, None),
        127 => (8, None),
        length => (0, Some(u64::from(length))),
    };
    let length = rest.get(..bytes)?;
    rest.get(..bytes + mask)?;
    Some(short.unwrap_or_else(|| length.iter().fold(0, |length, byte| length << 8 | u64::from(*byte))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rfcs_example() {
        assert_eq!(accept_of(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_server_proves_that_it_understood() {
        let (handshake, mut fields) = (Handshake::new(), HeaderMap::new());
        handshake.put_into(&mut fields);
        let accept = accept_of(fields[header::SEC_WEBSOCKET_KEY].as_bytes());
        assert!(!handshake.is_accepted(&mut fields));
        fields.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        assert!(handshake.is_accepted(&mut fields) && !fields.contains_key(header::SEC_WEBSOCKET_ACCEPT));
    }

    fn frame(length: usize, masked: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut frame = vec![0x82];
        match length {
            0..126 => frame.push(mask | length as u8),
            126..65_536 => {
                frame.push(mask | 126);
                frame.extend_from_slice(&(length as u16).to_be_bytes());
            }
            _ => {
                frame.push(mask | 127);
                frame.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(if masked { &[1, 2, 3, 4] } else { &[] });
        frame.resize(frame.len() + length, 7);
        frame
    }

    proptest::proptest! {
        /// However frames are cut into pieces, their ends are found, and nowhere else is one.
        #[test]
        fn ends_of_frames_are_found(
            lengths in proptest::collection::vec((0usize..70_000, proptest::bool::ANY), 1..5),
            cuts in proptest::collection::vec(1usize..40_000, 1..8),
        ) {
            let frames: Vec<Vec<u8>> = lengths.iter().map(|(length, masked)| frame(*length, *masked)).collect();
            let ends: Vec<usize> = frames.iter().scan(0, |at, frame| { *at += frame.len(); Some(*at) }).collect();
            let (all, mut seen, mut at) = (frames.concat(), Frames::default(), 0);
            for cut in cuts.iter().cycle() {
                if at == all.len() {
                    break;
                }
                let piece = &all[at..all.len().min(at + cut)];
                let passed = seen.pass(piece, true);
                at += passed;
                proptest::prop_assert_eq!(seen.are_whole(), ends.contains(&at));
                proptest::prop_assert!(passed == piece.len() || seen.are_whole());
            }
            proptest::prop_assert!(seen.are_whole() && !seen.closed);
        }
    }

    #[test]
    fn a_close_is_noticed() {
        for to in [To::Client, To::Server] {
            let mut frames = Frames::default();
            let word = to.going_away();
            assert_eq!(frames.pass(&word, false), word.len());
            assert!(frames.closed && frames.are_whole());
        }
    }

    #[tokio::test]
    async fn a_farewell_waits_for_the_end_of_a_frame() {
        use http_body_util::BodyExt as _;
        let (goes, leaves) = tokio::sync::oneshot::channel::<()>();
        let (send, receive) = tokio::sync::mpsc::channel(4);
        let body = crate::Body::from(crate::tunnel::CapsuleBody(receive));
        let mut body = Leaving::websocket(body, To::Client, async move { drop(leaves.await) });
        let frame = Bytes::from(frame(10, false));
        send.send(frame.slice(..5)).await.unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), frame.slice(..5));
        drop(goes);
        send.send([&frame[5..], &frame[..5]].concat().into()).await.unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), frame.slice(5..));
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), To::Client.going_away());
        assert!(body.frame().await.is_none());
    }
}
