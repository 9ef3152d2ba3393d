//! Frames on QUIC streams, for the gossip and join protocols.

use serde::{Serialize, de::DeserializeOwned};
use starling_protocol::{FRAME_HEADER_BYTES, FrameError, decode, frame, frame_length};

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
    Frame(#[from] FrameError),
}

/// Reads one frame of at most `limit` bytes. Not cancel safe: a half-read frame is lost, so drop the stream with it.
pub(crate) async fn read_frame<T: DeserializeOwned>(
    stream: &mut quinn::RecvStream,
    limit: usize,
) -> Result<T, StreamFault> {
    let length = read_length(stream, limit).await?;
    read_body(stream, length).await
}

/// Reads how long the next frame's body is; refuses more than `limit` bytes. Not cancel safe.
pub(crate) async fn read_length(stream: &mut quinn::RecvStream, limit: usize) -> Result<usize, StreamFault> {
    let mut header = [0; FRAME_HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    Ok(frame_length(header, limit)?)
}

/// Reads the body of a frame of that length. Not cancel safe.
pub(crate) async fn read_body<T: DeserializeOwned>(
    stream: &mut quinn::RecvStream,
    length: usize,
) -> Result<T, StreamFault> {
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(decode(&body)?)
}

/// Writes one frame and ends the stream. If dropped before it returns, the stream is reset.
pub(crate) async fn write_frame<T: Serialize>(stream: &mut quinn::SendStream, value: &T) -> Result<(), StreamFault> {
    stream.write_all(&frame(value)).await?;
    let _ = stream.finish();
    Ok(())
}
