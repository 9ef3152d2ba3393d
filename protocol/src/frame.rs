//! Length-bounded postcard frames: a big-endian u32 length, then that many bytes of postcard.

use serde::{Serialize, de::DeserializeOwned};

/// Bytes in front of each frame's body.
pub const FRAME_HEADER_BYTES: usize = 4;

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The announced length is over the reader's limit; nothing was allocated for it.
    #[error("frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The length that the frame announces, in bytes.
        length: usize,
        /// The reader's limit, in bytes.
        limit: usize,
    },
    /// The body is not the postcard encoding of the expected type, or bytes are left over.
    #[error("frame does not decode: {0}")]
    Malformed(String),
}

/// Postcard encoding of `value`, without a length.
///
/// # Panics
/// Never for the types of this crate: they hold nothing that postcard cannot encode.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("protocol types are encodable")
}

/// Decodes the whole of `bytes`; left-over bytes are an error, so that one value has one encoding length.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(FrameError::Malformed(format!("{} bytes left over", rest.len()))),
        Err(e) => Err(FrameError::Malformed(e.to_string())),
    }
}

/// `value` as a frame: length and body.
pub fn frame<T: Serialize>(value: &T) -> Vec<u8> {
    let body = encode(value);
    let mut out = Vec::with_capacity(FRAME_HEADER_BYTES + body.len());
    out.extend_from_slice(&u32::try_from(body.len()).expect("frames are far below 4 GiB").to_be_bytes());
    out.extend_from_slice(&body);
    out
}

/// The body's length that a frame header announces, refused when over `limit` bytes.
pub fn frame_length(header: [u8; FRAME_HEADER_BYTES], limit: usize) -> Result<usize, FrameError> {
    let length = u32::from_be_bytes(header) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back() {
        let bytes = frame(&("orders".to_string(), 7u32));
        let length = frame_length(bytes[..4].try_into().unwrap(), 100).unwrap();
        assert_eq!(length, bytes.len() - 4);
        assert_eq!(decode::<(String, u32)>(&bytes[4..]).unwrap(), ("orders".into(), 7));
    }

    #[test]
    fn over_the_limit_is_refused_before_the_body_is_read() {
        let err = frame_length(u32::MAX.to_be_bytes(), 1024).unwrap_err();
        assert_eq!(err, FrameError::TooLong { length: u32::MAX as usize, limit: 1024 });
    }

    #[test]
    fn left_over_bytes_are_refused() {
        let mut bytes = encode(&1u8);
        bytes.push(0);
        assert!(matches!(decode::<u8>(&bytes), Err(FrameError::Malformed(_))));
    }
}
