//! Messages on a stream: what it is, how long it is, and the message.

use crate::wire::{Message, WireError, message, put_varint, take_varint};

/// Most bytes in front of a frame's body: two variable-length integers.
pub const MAX_FRAME_HEADER_BYTES: usize = 20;

/// A message that can stand on a stream by itself.
pub trait Framed: Message {
    /// Number of its kind, in front of it.
    const KIND: u64;
}

/// Says what the messages of a protocol are.
macro_rules! kinds {
    ($($number:literal $type:ty),+ $(,)?) => {
        $( impl $crate::frame::Framed for $type { const KIND: u64 = $number; } )+
    };
}
pub(crate) use kinds;

/// Answer to a frame of a kind that the reader does not know: no offence, the asker is newer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    /// The kind that is not known.
    pub kind: u64,
}
message!(Unsupported { 1 kind });
kinds!(0 Unsupported);

/// `message` as a frame: kind, length and body.
pub fn frame<T: Framed>(message: &T) -> Vec<u8> {
    frame_of(T::KIND, &crate::wire::encode(message))
}

/// A body that is encoded already, as a frame.
pub fn frame_of(kind: u64, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(MAX_FRAME_HEADER_BYTES + body.len());
    put_varint(kind, &mut out);
    put_varint(body.len() as u64, &mut out);
    out.extend_from_slice(body);
    out
}

/// What stands before the body of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader<'a> {
    /// Of the message.
    pub kind: u64,
    /// Of the body, in bytes.
    pub length: usize,
    /// What follows of the bytes that it was read from.
    pub rest: &'a [u8],
}

/// Reads a frame's header; `None` while it is incomplete. Errors if it cannot become one, or announces more than `limit` bytes.
pub fn frame_header(bytes: &[u8], limit: usize) -> Result<Option<FrameHeader<'_>>, WireError> {
    let mut rest = bytes;
    let header = take_varint(&mut rest).and_then(|kind| Some((kind, take_varint(&mut rest)?)));
    match header {
        Some((kind, length)) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if length > limit {
                return Err(WireError::TooLong { length, limit });
            }
            Ok(Some(FrameHeader { kind, length, rest }))
        }
        None if bytes.len() >= MAX_FRAME_HEADER_BYTES => Err(WireError::Malformed("no frame".into())),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back() {
        let bytes = frame(&Unsupported { kind: 300 });
        for cut in 0..2 {
            assert_eq!(frame_header(&bytes[..cut], 100), Ok(None));
        }
        let FrameHeader { kind, length, rest: body } = frame_header(&bytes, 100).unwrap().unwrap();
        assert_eq!((kind, length), (0, body.len()));
        assert_eq!(crate::decode::<Unsupported>(body), Ok(Unsupported { kind: 300 }));
    }

    #[test]
    fn over_the_limit_is_refused_before_the_body_is_read() {
        let mut bytes = vec![1];
        put_varint(u64::MAX, &mut bytes);
        let error = WireError::TooLong { length: usize::MAX, limit: 1024 };
        assert_eq!(frame_header(&bytes, 1024), Err(error));
        assert!(frame_header(&[0xff; MAX_FRAME_HEADER_BYTES], 1024).is_err());
    }
}
