//! A request's stream (RFC 9114 §4.1): a head, data, and perhaps trailers, in that order and nothing else.

use bytes::Bytes;

use super::{
    control::Role,
    frame::{self, Frames, Handling, Piece},
};
use crate::h3::{Code, Fault};

/// Frames in a row that carry nothing, empty ones and unknown ones, before the peer is taken for an attacker
/// (RFC 9114 §10.5).
const MAX_IDLE_FRAMES: u32 = 1000;

/// What comes on the stream. Field sections are still encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The head of the message, or of an interim one.
    Head(Bytes),
    /// Part of the body, never empty.
    Data(Bytes),
    /// The trailers.
    Trailers(Bytes),
}

/// Reads one message from its stream.
#[derive(Debug)]
pub struct Message {
    role: Role,
    phase: Phase,
    frames: Frames,
    idle: u32,
    max_section_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Head,
    Body,
    /// Behind the trailers.
    Done,
}

impl Message {
    /// A message to `role`, whose field sections have at most that many bytes on the wire.
    pub fn new(role: Role, max_section_bytes: u64) -> Self {
        Self { role, phase: Phase::Head, frames: Frames::default(), idle: 0, max_section_bytes }
    }

    /// The head that came last was an interim one (1xx): another follows.
    pub fn expect_another_head(&mut self) {
        self.phase = Phase::Head;
    }

    /// The next event in `input`; `None` once that is used up.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Event>, Fault> {
        let Self { role, phase, frames, idle, max_section_bytes } = self;
        let unexpected = |reason| Err(Fault::Connection(Code::H3_FRAME_UNEXPECTED, reason));
        let piece = frames.next(input, &mut |kind, length| {
            let handling = match (kind, *phase) {
                (frame::DATA, Phase::Head) => return unexpected("DATA before HEADERS"),
                (frame::DATA | frame::HEADERS, Phase::Done) => return unexpected("a frame behind the trailers"),
                (frame::DATA, Phase::Body) => Handling::Pass,
                (frame::HEADERS, _) if length > *max_section_bytes => return Err(Fault::TooLarge),
                (frame::HEADERS, _) => Handling::Keep,
                (frame::PUSH_PROMISE, _) if *role == Role::Client => {
                    return Err(Fault::Connection(Code::H3_ID_ERROR, "PUSH_PROMISE, where no push is allowed"));
                }
                (frame::PUSH_PROMISE, _) => return unexpected("PUSH_PROMISE from a client"),
                (frame::SETTINGS | frame::GOAWAY | frame::CANCEL_PUSH | frame::MAX_PUSH_ID, _) => {
                    return unexpected("a frame of the control stream on a request's");
                }
                _ if frame::is_forbidden(kind) => return unexpected("a frame of HTTP/2"),
                _ => Handling::Skip,
            };
            *idle = if handling == Handling::Skip || length == 0 { *idle + 1 } else { 0 };
            if *idle > MAX_IDLE_FRAMES {
                return Err(Fault::Stream(Code::H3_EXCESSIVE_LOAD, "too many frames that carry nothing"));
            }
            Ok(handling)
        })?;
        Ok(match piece {
            None => None,
            Some(Piece::Part(data)) => Some(Event::Data(data)),
            Some(Piece::Frame(_, section)) if *phase == Phase::Head => {
                *phase = Phase::Body;
                Some(Event::Head(section))
            }
            Some(Piece::Frame(_, section)) => {
                *phase = Phase::Done;
                Some(Event::Trailers(section))
            }
        })
    }

    /// The stream has ended: was that the end of a message?
    pub fn end(&self) -> Result<(), Fault> {
        self.frames.end()?;
        match (self.phase, self.role) {
            (Phase::Head, Role::Server) => Err(Fault::Stream(Code::H3_REQUEST_INCOMPLETE, "a request without a head")),
            (Phase::Head, Role::Client) => Err(Fault::malformed("an answer without a head")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds a stream byte by byte, then ends it.
    fn read(role: Role, bytes: &[u8]) -> Result<Vec<Event>, Code> {
        let (mut message, mut events) = (Message::new(role, 1000), Vec::new());
        for byte in bytes {
            let mut input = Bytes::copy_from_slice(&[*byte]);
            while let Some(event) = message.next(&mut input).map_err(Fault::code)? {
                events.push(event);
            }
        }
        message.end().map_err(Fault::code)?;
        Ok(events)
    }

    const HEAD: &[u8] = &[1, 1, 7];

    #[test]
    fn a_message_is_head_data_trailers() {
        let events = read(
            Role::Server,
            &[HEAD, &[0x21, 1, 0], &[0, 0], &[0, 2, 8, 9], &[0, 0], &[1, 1, 5], &[0x21, 0]].concat(),
        );
        let byte = |b: u8| Bytes::copy_from_slice(&[b]);
        assert_eq!(
            events,
            Ok(vec![Event::Head(byte(7)), Event::Data(byte(8)), Event::Data(byte(9)), Event::Trailers(byte(5))]),
            "unknown frames and empty ones are passed over"
        );
    }

    #[test]
    fn frames_out_of_order_end_the_connection() {
        let unexpected = Err(Code::H3_FRAME_UNEXPECTED);
        for role in [Role::Client, Role::Server] {
            assert_eq!(read(role, &[0, 0]), unexpected, "data first");
            assert_eq!(read(role, &[HEAD, HEAD, &[0, 1, 1]].concat()), unexpected, "data behind trailers");
            assert_eq!(read(role, &[HEAD, HEAD, HEAD].concat()), unexpected, "a third section");
            for kind in [3, 4, 7, 0x0d, 2, 6, 8, 9] {
                assert_eq!(read(role, &[HEAD, &[kind, 1, 0]].concat()), unexpected, "{kind:#x}");
                assert_eq!(read(role, &[kind, 1, 0]), unexpected, "{kind:#x}");
            }
        }
        assert_eq!(read(Role::Server, &[5, 2, 0, 0]), unexpected);
        assert_eq!(read(Role::Client, &[5, 2, 0, 0]), Err(Code::H3_ID_ERROR));
    }

    #[test]
    fn a_message_that_is_cut_is_an_error() {
        assert_eq!(read(Role::Server, &[]), Err(Code::H3_REQUEST_INCOMPLETE));
        assert_eq!(read(Role::Client, &[]), Err(Code::H3_MESSAGE_ERROR));
        for cut in [&HEAD[..1], &HEAD[..2]] {
            assert_eq!(read(Role::Server, cut), Err(Code::H3_FRAME_ERROR));
        }
        assert_eq!(read(Role::Server, &[HEAD, &[0, 3, 1, 2]].concat()), Err(Code::H3_FRAME_ERROR));
        assert_eq!(read(Role::Server, &[HEAD, &[0x21, 3]].concat()), Err(Code::H3_FRAME_ERROR));
    }

    #[test]
    fn limits_come_before_buffers() {
        assert_eq!(read(Role::Server, &[1, 0x43, 0xe9]), Err(Code::H3_EXCESSIVE_LOAD), "a section of 1001 bytes");
        let idle = [HEAD, &[0x21, 0].repeat(1001)].concat();
        assert_eq!(read(Role::Server, &idle), Err(Code::H3_EXCESSIVE_LOAD));
        let empty = [HEAD, &[0, 0].repeat(1001)].concat();
        assert_eq!(read(Role::Server, &empty), Err(Code::H3_EXCESSIVE_LOAD));
        let mixed = [HEAD, &[&[0, 0].repeat(600)[..], &[0, 1, 1]].concat().repeat(4)].concat();
        assert_eq!(read(Role::Server, &mixed).unwrap().len(), 5, "progress forgives");
    }
}
