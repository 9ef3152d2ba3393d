//! The peer's control stream (RFC 9114 §6.2.1, §7.2).

use bytes::Bytes;

use super::{
    frame::{self, Frames, Handling, Piece},
    settings::{self, Settings},
    varint,
};
use crate::h3::{Code, Fault};

/// Which end of the connection *we* are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that dialled.
    Client,
    /// The one that answers.
    Server,
}

/// What the peer says on its control stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Its settings: once, at the start.
    Settings(Settings),
    /// It goes away: from that stream id on (towards a client), nothing is processed.
    GoAway(u64),
}

/// Reads the control stream, and holds the peer to what may stand there.
#[derive(Debug)]
pub struct Control {
    role: Role,
    frames: Frames,
    settled: bool,
    goaway: Option<u64>,
    max_push: Option<u64>,
}

impl Control {
    /// At the stream's start, behind its type.
    pub fn new(role: Role) -> Self {
        Self { role, frames: Frames::default(), settled: false, goaway: None, max_push: None }
    }

    /// The next event in `input`; `None` once that is used up. The stream must not end: whoever sees that reports
    /// H3_CLOSED_CRITICAL_STREAM.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Event>, Fault> {
        let Self { role, frames, settled, .. } = self;
        let mut rule = |kind, length| {
            if !*settled && kind != frame::SETTINGS {
                return Err(Fault::Connection(Code::H3_MISSING_SETTINGS, "the control stream starts without SETTINGS"));
            }
            match kind {
                frame::SETTINGS if *settled => unexpected("SETTINGS twice"),
                frame::SETTINGS if length > settings::MAX_BYTES => {
                    Err(Fault::Connection(Code::H3_EXCESSIVE_LOAD, "SETTINGS are too long"))
                }
                frame::SETTINGS => {
                    *settled = true;
                    Ok(Handling::Keep)
                }
                frame::DATA | frame::HEADERS | frame::PUSH_PROMISE => {
                    unexpected("a request's frame on the control stream")
                }
                frame::MAX_PUSH_ID if *role == Role::Client => unexpected("MAX_PUSH_ID from a server"),
                frame::GOAWAY | frame::MAX_PUSH_ID | frame::CANCEL_PUSH if length > 8 => wrong_layout(),
                frame::GOAWAY | frame::MAX_PUSH_ID | frame::CANCEL_PUSH => Ok(Handling::Keep),
                _ if frame::is_forbidden(kind) => unexpected("a frame of HTTP/2"),
                _ => Ok(Handling::Skip),
            }
        };
        while let Some(piece) = frames.next(input, &mut rule)? {
            let Piece::Frame(kind, payload) = piece else { continue };
            if kind == frame::SETTINGS {
                return Settings::decode(&payload).map(|settings| Some(Event::Settings(settings)));
            }
            let id = match varint::decode(&payload) {
                Some((id, length)) if length == payload.len() => id,
                _ => return wrong_layout().map(|_| None),
            };
            match kind {
                frame::GOAWAY => {
                    if *role == Role::Client && id % 4 != 0 {
                        return wrong_id("GOAWAY names a stream that is no request");
                    }
                    if self.goaway.is_some_and(|last| id > last) {
                        return wrong_id("GOAWAY names a later id than before");
                    }
                    self.goaway = Some(id);
                    return Ok(Some(Event::GoAway(id)));
                }
                frame::MAX_PUSH_ID => {
                    if self.max_push.is_some_and(|last| id < last) {
                        return wrong_id("MAX_PUSH_ID goes back");
                    }
                    self.max_push = Some(id);
                }
                // Nothing is ever pushed, in either direction.
                _ => return wrong_id("CANCEL_PUSH of a push that never was"),
            }
        }
        Ok(None)
    }
}

fn unexpected(reason: &'static str) -> Result<Handling, Fault> {
    Err(Fault::Connection(Code::H3_FRAME_UNEXPECTED, reason))
}

fn wrong_layout() -> Result<Handling, Fault> {
    Err(Fault::Connection(Code::H3_FRAME_ERROR, "a frame that should hold one id"))
}

fn wrong_id(reason: &'static str) -> Result<Option<Event>, Fault> {
    Err(Fault::Connection(Code::H3_ID_ERROR, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds a control stream byte by byte.
    fn read(role: Role, bytes: &[u8]) -> Result<Vec<Event>, Code> {
        let (mut control, mut events) = (Control::new(role), Vec::new());
        for byte in bytes {
            let mut input = Bytes::copy_from_slice(&[*byte]);
            while let Some(event) = control.next(&mut input).map_err(Fault::code)? {
                events.push(event);
            }
        }
        Ok(events)
    }

    /// The same, behind empty SETTINGS.
    fn behind_settings(role: Role, bytes: &[u8]) -> Result<Vec<Event>, Code> {
        read(role, &[&[4, 0], bytes].concat()).map(|events| events[1..].to_vec())
    }

    #[test]
    fn settings_come_first_and_once() {
        for role in [Role::Client, Role::Server] {
            assert_eq!(read(role, &[4, 2, 6, 9]).unwrap().len(), 1);
            assert_eq!(read(role, &[7, 1, 0]), Err(Code::H3_MISSING_SETTINGS));
            assert_eq!(read(role, &[0x21, 0]), Err(Code::H3_MISSING_SETTINGS), "not even an unknown frame");
            assert_eq!(behind_settings(role, &[4, 0]), Err(Code::H3_FRAME_UNEXPECTED));
            assert_eq!(read(role, &[4, 0x80, 1, 0, 0]), Err(Code::H3_EXCESSIVE_LOAD));
        }
    }

    #[test]
    fn frames_stand_where_they_may() {
        for role in [Role::Client, Role::Server] {
            for kind in [0x00, 0x01, 0x05, 0x02, 0x06, 0x08, 0x09] {
                assert_eq!(behind_settings(role, &[kind, 0]), Err(Code::H3_FRAME_UNEXPECTED), "{kind:#x}");
            }
            assert_eq!(behind_settings(role, &[0x21, 3, 1, 2, 3, 0x40, 0x5f, 0]), Ok(vec![]), "unknown frames");
            assert_eq!(behind_settings(role, &[3, 1, 0]), Err(Code::H3_ID_ERROR));
        }
        assert_eq!(behind_settings(Role::Client, &[0x0d, 1, 0]), Err(Code::H3_FRAME_UNEXPECTED));
        assert_eq!(behind_settings(Role::Server, &[0x0d, 1, 4, 0x0d, 1, 4]), Ok(vec![]));
        assert_eq!(behind_settings(Role::Server, &[0x0d, 1, 4, 0x0d, 1, 3]), Err(Code::H3_ID_ERROR));
    }

    #[test]
    fn ids_never_go_up() {
        assert_eq!(
            behind_settings(Role::Client, &[7, 1, 8, 7, 1, 8, 7, 1, 4]),
            Ok(vec![Event::GoAway(8), Event::GoAway(8), Event::GoAway(4)])
        );
        assert_eq!(behind_settings(Role::Client, &[7, 1, 4, 7, 1, 8]), Err(Code::H3_ID_ERROR));
        assert_eq!(behind_settings(Role::Client, &[7, 1, 1]), Err(Code::H3_ID_ERROR), "not a request's stream");
        assert_eq!(behind_settings(Role::Server, &[7, 1, 1]), Ok(vec![Event::GoAway(1)]), "a push id");
        assert_eq!(behind_settings(Role::Server, &[7, 1, 1, 7, 1, 2]), Err(Code::H3_ID_ERROR));
        for kind in [7, 3] {
            assert_eq!(behind_settings(Role::Client, &[kind, 0]), Err(Code::H3_FRAME_ERROR));
            assert_eq!(behind_settings(Role::Client, &[kind, 2, 4, 4]), Err(Code::H3_FRAME_ERROR));
            assert_eq!(behind_settings(Role::Client, &[kind, 9]), Err(Code::H3_FRAME_ERROR));
        }
    }
}
