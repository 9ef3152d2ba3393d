//! What stands between `h3` and `h3_quinn`: the public transport traits of h3 again, with the checks and the manners that
//! the two leave out.
//!
//! * h3 buffers a whole frame other than DATA before it looks at its size. [`FrameScan`] sees each frame's header first and
//!   refuses long ones.
//! * A stream that ends inside a frame is an error, never a short body.
//! * quinn finishes a send stream that is dropped, so that half a message looks whole. Here it is reset.
//! * `h3_quinn` panics if asked to stop, or for the id of, a stream that is being read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h3::{
    error::Code,
    quic::{self, ConnectionErrorIncoming, StreamErrorIncoming, StreamId, WriteBuf},
};

/// Longest frame other than DATA, in bytes. A field section is held to the same length.
pub const MAX_FRAME_BYTES: u64 = 64 << 10;

const DATA: u64 = 0x00;
const CONTROL_STREAM: u64 = 0x00;

type QuinnConnection = h3_quinn::Connection;
type QuinnSend = <QuinnConnection as quic::OpenStreams<Bytes>>::SendStream;
type QuinnBidi = <QuinnConnection as quic::OpenStreams<Bytes>>::BidiStream;
type QuinnRecv = <QuinnConnection as quic::Connection<Bytes>>::RecvStream;

/// A QUIC connection for h3 to speak over.
pub struct Connection {
    inner: QuinnConnection,
    opening: Opener,
    rejecting: Arc<AtomicBool>,
}

impl Connection {
    /// Wraps an established connection.
    pub fn new(connection: quinn::Connection) -> Self {
        let inner = h3_quinn::Connection::new(connection);
        let opening = Opener { inner: quic::Connection::<Bytes>::opener(&inner) };
        Self { inner, opening, rejecting: Arc::default() }
    }

    /// Once set, requests that arrive and are dropped unread are reset with H3_REQUEST_REJECTED, which tells the client
    /// that nothing was done (RFC 9114 §4.1.1).
    pub fn rejecting(&self) -> Arc<AtomicBool> {
        self.rejecting.clone()
    }
}

impl quic::Connection<Bytes> for Connection {
    type RecvStream = Recv;
    type OpenStreams = Opener;

    fn poll_accept_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Recv, ConnectionErrorIncoming>> {
        quic::Connection::<Bytes>::poll_accept_recv(&mut self.inner, cx)
            .map_ok(|inner| Recv::new(inner, FrameScan::unidirectional()))
    }

    fn poll_accept_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bidi, ConnectionErrorIncoming>> {
        let rejecting = self.rejecting.load(Relaxed);
        let on_drop = if rejecting { Code::H3_REQUEST_REJECTED } else { Code::H3_INTERNAL_ERROR };
        quic::Connection::<Bytes>::poll_accept_bidi(&mut self.inner, cx).map_ok(|inner| Bidi::new(inner, on_drop))
    }

    fn opener(&self) -> Opener {
        self.opening.clone()
    }
}

impl quic::OpenStreams<Bytes> for Connection {
    type BidiStream = Bidi;
    type SendStream = Send;

    fn poll_open_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bidi, StreamErrorIncoming>> {
        self.opening.poll_open_bidi(cx)
    }

    fn poll_open_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<Send, StreamErrorIncoming>> {
        self.opening.poll_open_send(cx)
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.opening.close(code, reason);
    }
}

/// Opens request streams.
#[derive(Clone)]
pub struct Opener {
    inner: <QuinnConnection as quic::Connection<Bytes>>::OpenStreams,
}

impl quic::OpenStreams<Bytes> for Opener {
    type BidiStream = Bidi;
    type SendStream = Send;

    fn poll_open_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bidi, StreamErrorIncoming>> {
        quic::OpenStreams::<Bytes>::poll_open_bidi(&mut self.inner, cx)
            .map_ok(|inner| Bidi::new(inner, Code::H3_REQUEST_CANCELLED))
    }

    fn poll_open_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<Send, StreamErrorIncoming>> {
        quic::OpenStreams::<Bytes>::poll_open_send(&mut self.inner, cx)
            .map_ok(|inner| Send::new(inner, Code::H3_INTERNAL_ERROR))
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        quic::OpenStreams::<Bytes>::close(&mut self.inner, code, reason);
    }
}

/// A request stream.
pub struct Bidi {
    send: Send,
    recv: Recv,
}

impl Bidi {
    fn new(inner: QuinnBidi, on_drop: Code) -> Self {
        let (send, recv) = quic::BidiStream::<Bytes>::split(inner);
        Self { send: Send::new(send, on_drop), recv: Recv::new(recv, FrameScan::request()) }
    }
}

impl quic::BidiStream<Bytes> for Bidi {
    type SendStream = Send;
    type RecvStream = Recv;

    fn split(self) -> (Send, Recv) {
        (self.send, self.recv)
    }
}

impl quic::RecvStream for Bidi {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.recv.poll_data(cx)
    }

    fn stop_sending(&mut self, error_code: u64) {
        self.recv.stop_sending(error_code);
    }

    fn recv_id(&self) -> StreamId {
        self.recv.recv_id()
    }
}

impl quic::SendStream<Bytes> for Bidi {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_ready(cx)
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        self.send.send_data(data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_finish(cx)
    }

    fn reset(&mut self, reset_code: u64) {
        self.send.reset(reset_code);
    }

    fn send_id(&self) -> StreamId {
        self.send.send_id()
    }
}

/// The sending half: reset on drop, unless it was finished.
pub struct Send {
    inner: QuinnSend,
    on_drop: Code,
    ended: bool,
}

impl Send {
    fn new(inner: QuinnSend, on_drop: Code) -> Self {
        Self { inner, on_drop, ended: false }
    }
}

impl Drop for Send {
    fn drop(&mut self) {
        if !self.ended {
            quic::SendStream::<Bytes>::reset(&mut self.inner, self.on_drop.value());
        }
    }
}

impl quic::SendStream<Bytes> for Send {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        quic::SendStream::<Bytes>::poll_ready(&mut self.inner, cx)
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        quic::SendStream::<Bytes>::send_data(&mut self.inner, data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        let finished = ready!(quic::SendStream::<Bytes>::poll_finish(&mut self.inner, cx));
        self.ended = true;
        Poll::Ready(finished)
    }

    fn reset(&mut self, reset_code: u64) {
        self.ended = true;
        quic::SendStream::<Bytes>::reset(&mut self.inner, reset_code);
    }

    fn send_id(&self) -> StreamId {
        quic::SendStream::<Bytes>::send_id(&self.inner)
    }
}

/// The receiving half: every byte passes the scan before h3 sees it.
pub struct Recv {
    inner: QuinnRecv,
    scan: FrameScan,
    id: StreamId,
    /// A read is pending inside `inner`, which then cannot be asked for anything else.
    reading: bool,
    /// STOP_SENDING that was asked for meanwhile.
    stop: Option<u64>,
}

impl Recv {
    fn new(inner: QuinnRecv, scan: FrameScan) -> Self {
        let id = quic::RecvStream::recv_id(&inner);
        Self { inner, scan, id, reading: false, stop: None }
    }

    fn refuse(&mut self, code: Code) -> StreamErrorIncoming {
        self.stop_sending_now(code.value());
        StreamErrorIncoming::StreamTerminated { error_code: code.value() }
    }

    fn stop_sending_now(&mut self, code: u64) {
        quic::RecvStream::stop_sending(&mut self.inner, code);
    }
}

impl quic::RecvStream for Recv {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.reading = true;
        let read = ready!(self.inner.poll_data(cx));
        self.reading = false;
        if let Some(code) = self.stop.take() {
            self.stop_sending_now(code);
        }
        Poll::Ready(match read? {
            Some(bytes) => match self.scan.feed(&bytes) {
                Ok(()) => Ok(Some(bytes)),
                Err(TooLong) => Err(self.refuse(Code::H3_EXCESSIVE_LOAD)),
            },
            None if self.scan.is_between_frames() => Ok(None),
            None => Err(StreamErrorIncoming::StreamTerminated { error_code: Code::H3_FRAME_ERROR.value() }),
        })
    }

    fn stop_sending(&mut self, error_code: u64) {
        if self.reading {
            self.stop = Some(error_code);
        } else {
            self.stop_sending_now(error_code);
        }
    }

    fn recv_id(&self) -> StreamId {
        self.id
    }
}

/// A frame that is too long to be buffered.
#[derive(Debug, PartialEq, Eq)]
struct TooLong;

/// Follows the frames of a stream (RFC 9114 §7.1) by their headers alone.
#[derive(Debug)]
struct FrameScan {
    state: Scan,
    /// Bytes of a header that is not complete yet: two variable-length integers.
    header: [u8; 16],
    held: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum Scan {
    /// A unidirectional stream's type comes first.
    StreamType,
    /// Reading a frame's type and length.
    Header,
    /// Inside a frame, with so many bytes to go.
    Payload(u64),
    /// Not frames: QPACK instructions or an unknown stream type, which h3 reads or drops as they come.
    Opaque,
}

impl FrameScan {
    fn request() -> Self {
        Self { state: Scan::Header, header: [0; 16], held: 0 }
    }

    fn unidirectional() -> Self {
        Self { state: Scan::StreamType, ..Self::request() }
    }

    fn is_between_frames(&self) -> bool {
        match self.state {
            Scan::Header => self.held == 0,
            Scan::StreamType | Scan::Opaque => true,
            Scan::Payload(_) => false,
        }
    }

    fn feed(&mut self, mut bytes: &[u8]) -> Result<(), TooLong> {
        while !bytes.is_empty() {
            match self.state {
                Scan::Opaque => return Ok(()),
                Scan::Payload(left) => {
                    let skip = left.min(bytes.len() as u64);
                    bytes.advance(skip as usize);
                    self.state = if skip == left { Scan::Header } else { Scan::Payload(left - skip) };
                }
                Scan::StreamType | Scan::Header => {
                    self.header[self.held] = bytes[0];
                    self.held += 1;
                    bytes.advance(1);
                    self.step_header()?;
                }
            }
        }
        Ok(())
    }

    fn step_header(&mut self) -> Result<(), TooLong> {
        let held = &self.header[..self.held];
        let Some((first, rest)) = varint(held) else { return Ok(()) };
        if self.state == Scan::StreamType {
            self.state = if first == CONTROL_STREAM { Scan::Header } else { Scan::Opaque };
            self.held = 0;
            return Ok(());
        }
        let Some((length, _)) = varint(rest) else { return Ok(()) };
        if first != DATA && length > MAX_FRAME_BYTES {
            return Err(TooLong);
        }
        self.state = if length == 0 { Scan::Header } else { Scan::Payload(length) };
        self.held = 0;
        Ok(())
    }
}

/// A QUIC variable-length integer (RFC 9000 §16) and what follows it; `None` if it is not all there.
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let first = *bytes.first()?;
    let length = 1 << (first >> 6);
    let (own, rest) = bytes.split_at_checked(length)?;
    let value = own[1..].iter().fold(u64::from(first & 0x3f), |value, byte| value << 8 | u64::from(*byte));
    Some((value, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let mut out =
            vec![kind, 0x80 | (payload >> 24) as u8, (payload >> 16) as u8, (payload >> 8) as u8, payload as u8];
        out.resize(out.len() + payload, 0xab);
        out
    }

    #[test]
    fn a_long_frame_is_refused_by_its_header_alone() {
        let mut scan = FrameScan::request();
        assert_eq!(scan.feed(&frame(0x01, 100)), Ok(()));
        assert_eq!(scan.feed(&frame(0x01, MAX_FRAME_BYTES as usize + 1)[..5]), Err(TooLong));
        // An unknown frame is buffered by h3 too.
        assert_eq!(FrameScan::request().feed(&[0x21, 0x80, 0x10, 0, 0]), Err(TooLong));
    }

    #[test]
    fn data_may_be_as_long_as_it_likes() {
        let mut scan = FrameScan::request();
        assert_eq!(scan.feed(&[0x00, 0xc0, 0, 0, 0xff, 0, 0, 0, 0]), Ok(()));
        assert_eq!(scan.state, Scan::Payload(0xff_0000_0000));
    }

    #[test]
    fn only_the_control_stream_has_frames() {
        let mut control = FrameScan::unidirectional();
        assert_eq!(control.feed(&[0x00, 0x04, 0x80, 0x10, 0, 0]), Err(TooLong));
        let mut qpack = FrameScan::unidirectional();
        assert_eq!(qpack.feed(&[0x02, 0x04, 0x80, 0x10, 0, 0]), Ok(()));
    }

    proptest! {
        #[test]
        fn the_cut_into_chunks_does_not_matter(
            frames in proptest::collection::vec((0u8..0x30, 0usize..300), 1..6),
            cut in 1usize..7,
            short in 0usize..4,
        ) {
            let mut bytes: Vec<u8> = frames.iter().flat_map(|(kind, length)| frame(*kind, *length)).collect();
            let whole = short == 0;
            bytes.truncate(bytes.len() - short);
            let mut scan = FrameScan::request();
            for chunk in bytes.chunks(cut) {
                prop_assert_eq!(scan.feed(chunk), Ok(()));
            }
            prop_assert_eq!(scan.is_between_frames(), whole);
        }

        #[test]
        fn any_bytes_are_scanned_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = FrameScan::request().feed(&bytes);
            let _ = FrameScan::unidirectional().feed(&bytes);
        }
    }
}
