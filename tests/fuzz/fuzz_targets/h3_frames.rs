//! Streams of frames: the cut into chunks changes nothing, limits hold, and what is refused is refused at the same place.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use starling_http::h3::{
    Fault,
    codec::{
        control::{self, Control, Role},
        message::{self, Message},
    },
};

const MAX_SECTION_BYTES: u64 = 4096;

/// All that a request's stream holds, data joined, and how it ends.
fn message(role: Role, bytes: &[u8], cut: usize) -> (Vec<message::Event>, Option<Fault>) {
    let mut reader = Message::new(role, MAX_SECTION_BYTES);
    let mut events: Vec<message::Event> = Vec::new();
    for chunk in bytes.chunks(cut) {
        let mut input = Bytes::copy_from_slice(chunk);
        loop {
            match reader.next(&mut input) {
                Ok(Some(message::Event::Data(data))) => {
                    assert!(!data.is_empty());
                    match events.last_mut() {
                        Some(message::Event::Data(before)) => *before = [&before[..], &data].concat().into(),
                        _ => events.push(message::Event::Data(data)),
                    }
                }
                Ok(Some(event)) => {
                    let (message::Event::Head(section) | message::Event::Trailers(section)) = &event else {
                        unreachable!()
                    };
                    assert!(section.len() as u64 <= MAX_SECTION_BYTES);
                    events.push(event);
                }
                Ok(None) => break,
                Err(fault) => return (events, Some(fault)),
            }
        }
        assert!(input.is_empty(), "nothing is left behind");
    }
    (events, reader.end().err())
}

fn control(role: Role, bytes: &[u8], cut: usize) -> (Vec<control::Event>, Option<Fault>) {
    let mut reader = Control::new(role);
    let mut events = Vec::new();
    for chunk in bytes.chunks(cut) {
        let mut input = Bytes::copy_from_slice(chunk);
        loop {
            match reader.next(&mut input) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(fault) => return (events, Some(fault)),
            }
        }
    }
    (events, None)
}

// First byte: role, and how the stream is cut.
fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let role = if choice & 1 == 0 { Role::Client } else { Role::Server };
    let cut = usize::from(choice >> 1).max(1);
    assert_eq!(message(role, bytes, cut), message(role, bytes, usize::MAX));
    assert_eq!(control(role, bytes, cut), control(role, bytes, usize::MAX));
});
