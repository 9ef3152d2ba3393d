//! Frames on QUIC streams, for the gossip and join protocols.

use bytes::Bytes;
use starling_protocol::{
    FrameHeader, Framed, MAX_FRAME_HEADER_BYTES, Unsupported, WireError, decode, frame, frame_header, frame_of,
};

/// Why an exchange over a stream failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamFault {
    #[error(transparent)]
    Dial(#[from] quinn::ConnectError),
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
    #[error(transparent)]
    Read(#[from] quinn::ReadExactError),
    #[error(transparent)]
    Frame(#[from] WireError),
    /// The peer is older: what was asked is nothing to it.
    #[error("the other side does not know the question")]
    Unsupported,
    #[error("an answer of kind {0}")]
    Unexpected(u64),
    #[error("more than a member has to say")]
    Flood,
}

/// A message, and what it says it is.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: u64,
    pub(crate) body: Bytes,
}

impl Frame {
    /// The message, which must be of that type.
    pub(crate) fn read<T: Framed>(&self) -> Result<T, StreamFault> {
        match self.kind {
            kind if kind == T::KIND => Ok(decode(&self.body)?),
            kind if kind == Unsupported::KIND => Err(StreamFault::Unsupported),
            kind => Err(StreamFault::Unexpected(kind)),
        }
    }
}

/// Reads kind and length of the next frame; refuses more than `limit` bytes. Not cancel safe: a half-read frame is lost, so
/// drop the stream with it.
pub(crate) async fn read_header(stream: &mut quinn::RecvStream, limit: usize) -> Result<(u64, usize), StreamFault> {
    let mut header = [0; MAX_FRAME_HEADER_BYTES];
    for length in 1..=header.len() {
        stream.read_exact(&mut header[length - 1..length]).await?;
        if let Some(FrameHeader { kind, length, .. }) = frame_header(&header[..length], limit)? {
            return Ok((kind, length));
        }
    }
    Err(WireError::Malformed("no frame".into()).into())
}

/// Reads the body of a frame of that length. Not cancel safe.
pub(crate) async fn read_body(
    stream: &mut quinn::RecvStream,
    (kind, length): (u64, usize),
) -> Result<Frame, StreamFault> {
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Frame { kind, body: body.into() })
}

/// Reads one frame of at most `limit` bytes. Not cancel safe.
pub(crate) async fn read_frame(stream: &mut quinn::RecvStream, limit: usize) -> Result<Frame, StreamFault> {
    let header = read_header(stream, limit).await?;
    read_body(stream, header).await
}

/// Writes one frame and ends the stream. If dropped before it returns, the stream is reset.
pub(crate) async fn write_frame<T: Framed>(stream: &mut quinn::SendStream, value: &T) -> Result<(), StreamFault> {
    write_bytes(stream, &frame(value)).await
}

/// The same for a message that is encoded already.
pub(crate) async fn write_encoded(stream: &mut quinn::SendStream, kind: u64, body: &[u8]) -> Result<(), StreamFault> {
    write_bytes(stream, &frame_of(kind, body)).await
}

pub(crate) async fn write_bytes(stream: &mut quinn::SendStream, bytes: &[u8]) -> Result<(), StreamFault> {
    stream.write_all(bytes).await?;
    let _ = stream.finish();
    Ok(())
}
