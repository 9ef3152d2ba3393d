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
    let mut header = [0; FRAME_HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; frame_length(header, limit)?];
    stream.read_exact(&mut body).await?;
    Ok(decode(&body)?)
}

/// Writes one frame and ends the stream. If dropped before it returns, the stream is reset.
pub(crate) async fn write_frame<T: Serialize>(stream: &mut quinn::SendStream, value: &T) -> Result<(), StreamFault> {
    stream.write_all(&frame(value)).await?;
    let _ = stream.finish();
    Ok(())
}
