//! Frames (RFC 9114 §7): types, and a reader that sees a frame's header before it keeps any of it.

use bytes::{Buf, Bytes, BytesMut};

use super::varint;
use crate::h3::{Code, Fault};

/// Part of a body.
pub const DATA: u64 = 0x00;
/// A field section.
pub const HEADERS: u64 = 0x01;
/// Takes a push back.
pub const CANCEL_PUSH: u64 = 0x03;
/// Settings of the connection.
pub const SETTINGS: u64 = 0x04;
/// Announces a push.
pub const PUSH_PROMISE: u64 = 0x05;
/// The end is near.
pub const GOAWAY: u64 = 0x07;
/// How many pushes may be made.
pub const MAX_PUSH_ID: u64 = 0x0d;

/// What is set aside for a frame that is kept, before its bytes have come.
const FIRST_BYTES: usize = 4096;

/// Frames of HTTP/2 that have no meaning here, and must not come (RFC 9114 §7.2.8).
pub fn is_forbidden(kind: u64) -> bool {
    matches!(kind, 0x02 | 0x06 | 0x08 | 0x09)
}

/// What becomes of a frame's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handling {
    /// Collected, and told when it is whole. Whoever says so has looked at the length.
    Keep,
    /// Handed on as it comes.
    Pass,
    /// Left out.
    Skip,
}

/// What a stream of frames holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// A whole frame that was kept: type and payload.
    Frame(u64, Bytes),
    /// Some of the payload of a frame that is passed.
    Part(Bytes),
}

/// Follows the frames of a stream.
#[derive(Debug, Default)]
pub struct Frames {
    state: State,
}

#[derive(Debug)]
enum State {
    /// In a frame's type and length, of which so many bytes are here.
    Header([u8; 16], usize),
    /// Collecting a payload of that length.
    Keeping(u64, usize, BytesMut),
    /// So much to be passed on.
    Passing(u64),
    /// So much to be left out.
    Skipping(u64),
}

impl Default for State {
    fn default() -> Self {
        Self::Header([0; 16], 0)
    }
}

impl Frames {
    /// The next piece of `input`, which it consumes; `None` once that is used up. `rule` is asked with each frame's type and
    /// length, before any of its payload is kept.
    pub fn next(
        &mut self,
        input: &mut Bytes,
        rule: &mut impl FnMut(u64, u64) -> Result<Handling, Fault>,
    ) -> Result<Option<Piece>, Fault> {
        loop {
            match &mut self.state {
                State::Header(header, held) => {
                    let Some((kind, length)) = read_header(header, held, input) else { return Ok(None) };
                    self.state = match rule(kind, length)? {
                        Handling::Keep if input.len() as u64 >= length => {
                            self.state = State::default();
                            return Ok(Some(Piece::Frame(kind, input.split_to(length as usize))));
                        }
                        Handling::Keep => State::Keeping(
                            kind,
                            length as usize,
                            BytesMut::with_capacity(FIRST_BYTES.min(length as usize)),
                        ),
                        _ if length == 0 => State::default(),
                        Handling::Pass => State::Passing(length),
                        Handling::Skip => State::Skipping(length),
                    };
                }
                State::Keeping(kind, length, kept) => {
                    let take = input.len().min(*length - kept.len());
                    kept.extend_from_slice(&input.split_to(take));
                    if kept.len() < *length {
                        return Ok(None);
                    }
                    let whole = Piece::Frame(*kind, std::mem::take(kept).freeze());
                    self.state = State::default();
                    return Ok(Some(whole));
                }
                State::Passing(left) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let take = (input.len() as u64).min(*left);
                    *left -= take;
                    if *left == 0 {
                        self.state = State::default();
                    }
                    return Ok(Some(Piece::Part(input.split_to(take as usize))));
                }
                State::Skipping(left) => {
                    let skip = (input.len() as u64).min(*left);
                    input.advance(skip as usize);
                    *left -= skip;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::default();
                }
            }
        }
    }

    /// The stream has ended: an error inside a frame (RFC 9114 §7.1).
    pub fn end(&self) -> Result<(), Fault> {
        match self.state {
            State::Header(_, 0) => Ok(()),
            _ => Err(Fault::Connection(Code::H3_FRAME_ERROR, "a stream ended inside a frame")),
        }
    }
}

/// Type and length of a frame, once both are there.
fn read_header(header: &mut [u8; 16], held: &mut usize, input: &mut Bytes) -> Option<(u64, u64)> {
    let parse = |bytes: &[u8]| {
        let (kind, first) = varint::decode(bytes)?;
        let (length, second) = varint::decode(&bytes[first..])?;
        Some((kind, length, first + second))
    };
    if *held == 0
        && let Some((kind, length, taken)) = parse(input)
    {
        input.advance(taken);
        return Some((kind, length));
    }
    while !input.is_empty() {
        header[*held] = input.get_u8();
        *held += 1;
        if let Some((kind, length, _)) = parse(&header[..*held]) {
            *held = 0;
            return Some((kind, length));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        varint::encode(kind, &mut out);
        varint::encode(payload.len() as u64, &mut out);
        out.extend_from_slice(payload);
        out
    }

    /// All pieces, with the parts of one payload joined.
    fn read(bytes: &[u8], cut: usize) -> (Vec<Piece>, Result<(), Fault>) {
        let (mut frames, mut out) = (Frames::default(), Vec::<Piece>::new());
        let mut rule = |kind, _| {
            Ok(match kind {
                DATA => Handling::Pass,
                HEADERS => Handling::Keep,
                _ => Handling::Skip,
            })
        };
        for chunk in bytes.chunks(cut) {
            let mut input = Bytes::copy_from_slice(chunk);
            while let Some(piece) = frames.next(&mut input, &mut rule).unwrap() {
                match (out.last_mut(), piece) {
                    (Some(Piece::Part(before)), Piece::Part(more)) => {
                        *before = [&before[..], &more].concat().into();
                    }
                    (_, piece) => out.push(piece),
                }
            }
            assert!(input.is_empty());
        }
        (out, frames.end())
    }

    #[test]
    fn a_long_frame_is_refused_by_its_header_alone() {
        let mut frames = Frames::default();
        let mut rule = |_, length| if length > 100 { Err(Fault::TooLarge) } else { Ok(Handling::Keep) };
        let header = Bytes::from_static(&[0x01, 0x80, 0x10, 0, 0]);
        for at in 0..header.len() - 1 {
            assert_eq!(frames.next(&mut header.slice(at..=at), &mut rule), Ok(None));
        }
        assert_eq!(frames.next(&mut header.slice(4..), &mut rule), Err(Fault::TooLarge));
    }

    #[test]
    fn data_may_be_as_long_as_it_likes() {
        let mut frames = Frames::default();
        let mut input = Bytes::from_static(&[0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 7]);
        let piece = frames.next(&mut input, &mut |_, _| Ok(Handling::Pass));
        assert_eq!(piece, Ok(Some(Piece::Part(Bytes::from_static(&[7])))));
    }

    proptest! {
        #[test]
        fn the_cut_into_chunks_does_not_matter(
            frames in proptest::collection::vec((0u64..0x30, proptest::collection::vec(any::<u8>(), 0..300)), 1..6),
            cut in 1usize..700,
            short in 0usize..4,
        ) {
            let mut bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            // And the start of one more.
            bytes.extend_from_slice(&[HEADERS as u8, 5, 1][..short]);
            let (pieces, end) = read(&bytes, cut);
            prop_assert_eq!(&pieces, &read(&bytes, 1).0);
            prop_assert_eq!(end.is_ok(), short == 0);
            let kept = pieces.iter().filter_map(|piece| match piece {
                Piece::Frame(HEADERS, payload) => Some(payload.to_vec()),
                _ => None,
            });
            let sent = frames.iter().filter(|frame| frame.0 == HEADERS).map(|frame| frame.1.clone());
            prop_assert_eq!(kept.collect::<Vec<_>>(), sent.collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut frames = Frames::default();
            let mut input = Bytes::from(bytes);
            let mut rule = |kind, length| if length > 64 { Err(Fault::TooLarge) } else if kind == DATA { Ok(Handling::Pass) } else { Ok(Handling::Keep) };
            while let Ok(Some(_)) = frames.next(&mut input, &mut rule) {}
        }
    }
}
