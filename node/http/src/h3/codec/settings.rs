//! SETTINGS (RFC 9114 §7.2.4, RFC 9204 §5, RFC 9220 §3, RFC 9297 §2.1.1).

use bytes::{BufMut, BytesMut};

use super::{frame, varint};
use crate::h3::{Code, Fault};

const QPACK_MAX_TABLE_CAPACITY: u64 = 0x01;
const MAX_FIELD_SECTION_SIZE: u64 = 0x06;
const QPACK_BLOCKED_STREAMS: u64 = 0x07;
const ENABLE_CONNECT_PROTOCOL: u64 = 0x08;
const H3_DATAGRAM: u64 = 0x33;

/// Longest frame with settings that is read, in bytes: room for a few hundred of them.
pub const MAX_BYTES: u64 = 4 << 10;

/// What an end of a connection says of itself. The size of QPACK's dynamic table is always 0 here, which is the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Largest field section that it takes, in bytes as RFC 9114 §4.2.2 counts them; `None` is no limit.
    pub max_field_section_bytes: Option<u64>,
    /// Whether it takes extended CONNECT.
    pub extended_connect: bool,
    /// Whether it takes HTTP datagrams.
    pub datagrams: bool,
}

/// What holds until the peer's settings come.
impl Default for Settings {
    fn default() -> Self {
        Self { max_field_section_bytes: None, extended_connect: false, datagrams: false }
    }
}

impl Settings {
    /// Appends the frame.
    pub fn encode(&self, out: &mut impl BufMut) {
        let mut payload = BytesMut::new();
        let mut put = |id: u64, value: u64| {
            varint::encode(id, &mut payload);
            varint::encode(value, &mut payload);
        };
        if let Some(bytes) = self.max_field_section_bytes {
            put(MAX_FIELD_SECTION_SIZE, bytes);
        }
        if self.extended_connect {
            put(ENABLE_CONNECT_PROTOCOL, 1);
        }
        if self.datagrams {
            put(H3_DATAGRAM, 1);
        }
        varint::encode(frame::SETTINGS, out);
        varint::encode(payload.len() as u64, out);
        out.put(payload);
    }

    /// Reads the payload of the frame. Unknown settings are ignored; those of HTTP/2 that have no meaning here, values out
    /// of bounds and a setting that comes twice are errors.
    pub fn decode(mut payload: &[u8]) -> Result<Self, Fault> {
        let wrong = |reason| Err(Fault::Connection(Code::H3_SETTINGS_ERROR, reason));
        let mut settings = Self::default();
        let mut seen: Vec<u64> = Vec::new();
        while !payload.is_empty() {
            let mut next = || {
                let (value, length) = varint::decode(payload)?;
                payload = &payload[length..];
                Some(value)
            };
            let (Some(id), Some(value)) = (next(), next()) else {
                return Err(Fault::Connection(Code::H3_FRAME_ERROR, "SETTINGS end inside a setting"));
            };
            if seen.contains(&id) {
                return wrong("a setting comes twice");
            }
            seen.push(id);
            match id {
                0x00 | 0x02 | 0x03 | 0x04 | 0x05 => return wrong("a setting of HTTP/2"),
                MAX_FIELD_SECTION_SIZE => settings.max_field_section_bytes = Some(value),
                ENABLE_CONNECT_PROTOCOL | H3_DATAGRAM if value > 1 => return wrong("a setting that is 0 or 1"),
                ENABLE_CONNECT_PROTOCOL => settings.extended_connect = value == 1,
                H3_DATAGRAM => settings.datagrams = value == 1,
                // What the peer's decoder could hold: nothing is ever put there.
                QPACK_MAX_TABLE_CAPACITY | QPACK_BLOCKED_STREAMS => {}
                _ => {}
            }
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_said_is_read() {
        let settings = Settings { max_field_section_bytes: Some(65536), extended_connect: true, datagrams: true };
        let mut frame = Vec::new();
        settings.encode(&mut frame);
        assert_eq!((frame[0], frame[1] as usize), (4, frame.len() - 2));
        assert_eq!(Settings::decode(&frame[2..]), Ok(settings));
        assert_eq!(Settings::decode(&[]), Ok(Settings::default()));
    }

    #[test]
    fn wrong_settings_are_refused() {
        let code = |payload: &[u8]| Settings::decode(payload).map_err(Fault::code);
        for reserved in [0, 2, 3, 4, 5] {
            assert_eq!(code(&[reserved, 1]), Err(Code::H3_SETTINGS_ERROR), "{reserved}");
        }
        assert_eq!(code(&[8, 2]), Err(Code::H3_SETTINGS_ERROR));
        assert_eq!(code(&[0x33, 2]), Err(Code::H3_SETTINGS_ERROR));
        assert_eq!(code(&[6, 1, 6, 1]), Err(Code::H3_SETTINGS_ERROR));
        assert_eq!(code(&[6]), Err(Code::H3_FRAME_ERROR));
        assert_eq!(code(&[6, 0x40]), Err(Code::H3_FRAME_ERROR));
        assert_eq!(code(&[0x21, 7, 1, 0, 7, 0]), Ok(Settings::default()));
    }

    proptest! {
        #[test]
        fn any_payload_is_read_or_refused(payload in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Settings::decode(&payload);
        }
    }
}
