//! HTTP datagrams (RFC 9297 §2.1): which request a QUIC datagram belongs to.

use bytes::{BufMut, Bytes, BytesMut};

use super::varint;
use crate::h3::{Code, Fault};

/// Puts a payload under the id of its request's stream, which is one that a client opened both ways.
pub fn encode(stream: u64, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(8 + payload.len());
    varint::encode(stream / 4, &mut out);
    out.put_slice(payload);
    out.freeze()
}

/// The stream id and the payload of a datagram.
pub fn decode(mut datagram: Bytes) -> Result<(u64, Bytes), Fault> {
    let wrong = |reason| Err(Fault::Connection(Code::H3_DATAGRAM_ERROR, reason));
    match varint::decode(&datagram) {
        Some((quarter, length)) if quarter <= varint::MAX / 4 => {
            let payload = datagram.split_off(length);
            Ok((quarter * 4, payload))
        }
        Some(_) => wrong("a datagram of a stream that cannot be"),
        None => wrong("a datagram without a stream"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_names_its_stream() {
        for stream in [0, 4, 4 * 70, 4 * 20_000] {
            assert_eq!(decode(encode(stream, b"hello")), Ok((stream, Bytes::from_static(b"hello"))));
        }
        for bad in [&[][..], &[0x40], &[0xff; 9]] {
            let refused = decode(Bytes::from_static(bad)).map_err(Fault::code);
            assert_eq!(refused, Err(Code::H3_DATAGRAM_ERROR), "{bad:x?}");
        }
    }
}
