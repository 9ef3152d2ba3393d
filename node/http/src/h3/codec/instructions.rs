//! What may come on QPACK's own streams (RFC 9204 §4.3, §4.4) when there is no dynamic table: next to nothing.

use crate::h3::{Code, Fault};

/// Checks some of what the peer's encoder sends. It may set the capacity to 0, which it is; anything else would need a table.
pub fn check_encoder(bytes: &[u8]) -> Result<(), Fault> {
    const SET_CAPACITY_0: u8 = 0x20;
    if bytes.iter().all(|byte| *byte == SET_CAPACITY_0) {
        Ok(())
    } else {
        Err(Fault::Connection(Code::QPACK_ENCODER_STREAM_ERROR, "an instruction for a dynamic table, which has size 0"))
    }
}

/// Checks what the peer's decoder sends: it may say that it gave a stream up; there is nothing to acknowledge.
#[derive(Debug, Default)]
pub struct DecoderStream {
    /// Bytes so far of a stream id that goes on.
    in_id: usize,
}

impl DecoderStream {
    /// Checks the next bytes.
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        /// 62 bits behind a prefix of 6.
        const MAX_ID_BYTES: usize = 9;
        let wrong = |reason| Err(Fault::Connection(Code::QPACK_DECODER_STREAM_ERROR, reason));
        for byte in bytes {
            if self.in_id > 0 {
                self.in_id = if byte & 0x80 == 0 { 0 } else { self.in_id + 1 };
                if self.in_id > MAX_ID_BYTES {
                    return wrong("a stream id that is too long");
                }
            } else if byte & 0xc0 == 0x40 {
                self.in_id = usize::from(byte & 0x3f == 0x3f);
            } else {
                return wrong("an acknowledgement of what was never sent");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_needs_a_table_is_refused() {
        assert_eq!(check_encoder(&[0x20, 0x20]), Ok(()));
        // Set the capacity to 30 and to 220, insert with and without a name's reference, duplicate.
        for bad in [&[0x3e][..], &[0x3f, 0xbd, 0x01], &[0xc0, 0x00], &[0x41, 0x61, 0x00], &[0x00]] {
            assert_eq!(check_encoder(bad).map_err(Fault::code), Err(Code::QPACK_ENCODER_STREAM_ERROR), "{bad:x?}");
        }
    }

    #[test]
    fn only_cancellations_come_from_a_decoder() {
        let check = |bytes: &[u8]| {
            let mut stream = DecoderStream::default();
            bytes.iter().try_for_each(|byte| stream.check(&[*byte])).map_err(Fault::code)
        };
        assert_eq!(check(&[0x44, 0x7f, 0x81, 0x01, 0x40]), Ok(()));
        for bad in
            [&[0x84][..], &[0x00], &[0x01], &[0x3f, 0x01], &[0x7f, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255]]
        {
            assert_eq!(check(bad), Err(Code::QPACK_DECODER_STREAM_ERROR), "{bad:x?}");
        }
    }
}
