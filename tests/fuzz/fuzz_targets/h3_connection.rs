//! A whole connection, several streams between each other, in chunks: the same as each stream by itself, byte by byte.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use starling_http::h3::{
    Fault,
    codec::{
        control::{Control, Role},
        datagram,
        head::{Limits, decode_request, decode_trailers},
        instructions::{DecoderStream, check_encoder},
        message::{Event, Message},
    },
};

const STREAMS: usize = 6;
const LIMITS: Limits = Limits { max_section_bytes: 8 << 10, extended_connect: false };

/// What a server keeps for the streams of a connection: the three of the connection itself, and requests.
struct Server {
    control: Control,
    decoder: DecoderStream,
    requests: [Message; STREAMS - 3],
    /// What came of each stream: heads read, bytes of bodies, the error that ended it.
    seen: [(usize, usize, Option<Fault>); STREAMS],
}

impl Server {
    fn new() -> Self {
        Self {
            control: Control::new(Role::Server),
            decoder: DecoderStream::default(),
            requests: std::array::from_fn(|_| Message::new(Role::Server, LIMITS.max_section_bytes)),
            seen: [(0, 0, None); STREAMS],
        }
    }

    fn feed(&mut self, stream: usize, bytes: &[u8]) {
        if self.seen[stream].2.is_some() {
            return;
        }
        if let Err(fault) = self.take(stream, Bytes::copy_from_slice(bytes)) {
            self.seen[stream].2 = Some(fault);
        }
    }

    fn take(&mut self, stream: usize, mut bytes: Bytes) -> Result<(), Fault> {
        match stream {
            0 => {
                while self.control.next(&mut bytes)?.is_some() {
                    self.seen[0].0 += 1;
                }
            }
            1 => check_encoder(&bytes)?,
            2 => self.decoder.check(&bytes)?,
            _ => {
                while let Some(event) = self.requests[stream - 3].next(&mut bytes)? {
                    match event {
                        Event::Head(section) => {
                            decode_request(&section, LIMITS)?;
                            self.seen[stream].0 += 1;
                        }
                        Event::Data(data) => self.seen[stream].1 += data.len(),
                        Event::Trailers(section) => {
                            decode_trailers(&section, LIMITS.max_section_bytes)?;
                            self.seen[stream].0 += 1;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

// Chunks: a byte for the stream and the length, then so many bytes.
fuzz_target!(|bytes: &[u8]| {
    let _ = datagram::decode(Bytes::copy_from_slice(bytes));
    let (mut mixed, mut alone) = (Server::new(), Server::new());
    let mut whole: [BytesMut; STREAMS] = std::array::from_fn(|_| BytesMut::new());
    let mut rest = bytes;
    while let [choice, more @ ..] = rest {
        let (stream, length) =
            (usize::from(choice % STREAMS as u8), usize::from(choice / STREAMS as u8).min(more.len()));
        mixed.feed(stream, &more[..length]);
        whole[stream].extend_from_slice(&more[..length]);
        rest = &more[length..];
    }
    for (stream, bytes) in whole.iter().enumerate() {
        for byte in bytes {
            alone.feed(stream, &[*byte]);
        }
    }
    assert_eq!(mixed.seen, alone.seen);
});
