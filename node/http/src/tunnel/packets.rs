//! UDP packets through a tunnel (RFC 9298): as datagrams, or, where one does not fit, as a capsule on the stream (RFC 9297 §3).

use std::{
    cell::RefCell,
    io,
    sync::{Arc, Mutex},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::{net::UdpSocket, sync::mpsc};

use crate::{
    Body, BodyError,
    h3::{Flow, FlowSender, Unsendable, codec::varint},
};

/// The context of a payload that is one UDP packet (RFC 9298 §4).
const CONTEXT: u8 = 0;
/// The type of a capsule with a datagram.
const DATAGRAM: u64 = 0;
/// Longest UDP packet, and so longest capsule that is read.
const MAX_PACKET_BYTES: usize = 64 << 10;
/// Capsules that wait to be sent; more are dropped.
const WAITING: usize = 16;

thread_local! {
    /// Where packets are received: a flow that is silent holds no buffer.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_PACKET_BYTES].into());
}

/// The next packet that comes to a connected socket. Cancel safe.
///
/// # Errors
/// Of the system; that one has come to nobody says nothing about the next.
pub async fn next_packet(socket: &UdpSocket) -> io::Result<Bytes> {
    loop {
        socket.readable().await?;
        let received = SCRATCH.with_borrow_mut(|scratch| {
            socket.try_recv(scratch).map(|length| Bytes::copy_from_slice(&scratch[..length]))
        });
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
    }
}

/// What a tunnel for packets has beside its stream: among the extensions of its request at a server, and of its answer at a client.
/// It can be taken once.
#[derive(Debug, Clone)]
pub(crate) struct FlowSlot(Arc<Mutex<Option<Flow>>>);

impl FlowSlot {
    pub(crate) fn new(flow: Flow) -> Self {
        Self(Arc::new(Mutex::new(Some(flow))))
    }
}

/// Capsules that are to be sent, as the body of a message.
#[derive(Debug)]
pub struct Capsules(mpsc::Sender<Bytes>);

/// The body that capsules make.
#[derive(Debug)]
pub(crate) struct CapsuleBody(pub(crate) mpsc::Receiver<Bytes>);

impl Capsules {
    /// For a message that is to be sent: it ends when this is dropped.
    pub fn new() -> (Self, Body) {
        let (capsules, waiting) = mpsc::channel(WAITING);
        (Self(capsules), CapsuleBody(waiting).into())
    }
}

/// Sends packets through a tunnel.
#[derive(Debug)]
pub struct PacketSender {
    flow: FlowSender,
    capsules: Capsules,
}

/// What comes through a tunnel for packets.
#[derive(Debug)]
pub struct PacketReceiver<B> {
    flow: Flow,
    /// The other end's capsules.
    stream: B,
    read: BytesMut,
}

/// The two halves of a tunnel for packets, out of a message with those extensions and that body; `capsules` are those of the message
/// that it answers, or that answers it. `None` if the message is of no such tunnel.
pub fn packets<B>(
    extensions: &http::Extensions,
    capsules: Capsules,
    stream: B,
) -> Option<(PacketSender, PacketReceiver<B>)> {
    let FlowSlot(flow) = extensions.get()?;
    let flow = flow.lock().unwrap_or_else(|e| e.into_inner()).take()?;
    Some((PacketSender { flow: flow.sender(), capsules }, PacketReceiver { flow, stream, read: BytesMut::new() }))
}

/// Which way a packet went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// As a datagram.
    Datagram,
    /// On the stream.
    Capsule,
    /// Not at all.
    Dropped,
}

impl PacketSender {
    /// Sends a packet. Waits while there is no room on the connection. Cancel safe: it is sent, or not.
    pub async fn send(&self, packet: &[u8]) -> Passage {
        let mut payload = BytesMut::with_capacity(1 + packet.len());
        payload.put_u8(CONTEXT);
        payload.put_slice(packet);
        match self.flow.send(&payload).await {
            Ok(()) => Passage::Datagram,
            Err(Unsendable::Lost) => Passage::Dropped,
            Err(Unsendable::TooLarge) => {
                let mut capsule = BytesMut::with_capacity(16 + payload.len());
                varint::encode(DATAGRAM, &mut capsule);
                varint::encode(payload.len() as u64, &mut capsule);
                capsule.put(payload);
                // A stream that is behind is no place for packets that are late by then.
                self.capsules.0.try_send(capsule.freeze()).map_or(Passage::Dropped, |()| Passage::Capsule)
            }
        }
    }

    /// Resolves when nobody takes capsules any more: the message that they are the body of is over. Cancel safe.
    pub async fn closed(&self) {
        self.capsules.0.closed().await;
    }
}

impl<B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin> PacketReceiver<B> {
    /// The next packet; `None` when the tunnel has ended. Cancel safe.
    pub async fn receive(&mut self) -> Option<Bytes> {
        loop {
            match next_capsule(&mut self.read) {
                Ok(Some(packet)) => return Some(packet),
                Ok(None) => {}
                Err(why) => {
                    tracing::debug!(why, "a tunnel for packets");
                    return None;
                }
            }
            tokio::select! {
                payload = self.flow.receive() => {
                    if let Some(packet) = packet_of(payload) {
                        return Some(packet);
                    }
                }
                frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut self.stream).poll_frame(cx)) => {
                    let data = frame?.ok()?.into_data().ok()?;
                    self.read.extend_from_slice(&data);
                }
            }
        }
    }
}

/// What a payload carries, if it is a packet: others have a meaning that nobody has agreed upon.
fn packet_of(mut payload: Bytes) -> Option<Bytes> {
    (payload.first() == Some(&CONTEXT)).then(|| payload.split_off(1))
}

/// Takes the next packet out of what was read of the stream; passes over capsules of other types (RFC 9297 §3.3).
fn next_capsule(read: &mut BytesMut) -> Result<Option<Bytes>, &'static str> {
    loop {
        let Some((kind, first)) = varint::decode(read) else { return Ok(None) };
        let Some((length, second)) = varint::decode(&read[first..]) else { return Ok(None) };
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_PACKET_BYTES + 8);
        let length = length.ok_or("a capsule that is longer than any packet")?;
        if read.len() < first + second + length {
            return Ok(None);
        }
        read.advance(first + second);
        let payload = read.split_to(length).freeze();
        if kind == DATAGRAM
            && let Some(packet) = packet_of(payload)
        {
            return Ok(Some(packet));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn capsule(kind: u64, payload: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        varint::encode(kind, &mut out);
        varint::encode(payload.len() as u64, &mut out);
        out.put_slice(payload);
        out
    }

    #[test]
    fn packets_come_out_of_capsules() {
        let mut read = capsule(DATAGRAM, b"\0one");
        read.unsplit(capsule(77, b"unknown"));
        read.unsplit(capsule(DATAGRAM, b"\x02of another context"));
        read.unsplit(capsule(DATAGRAM, b"\0"));
        let last = capsule(DATAGRAM, b"\0three");
        read.extend_from_slice(&last[..4]);
        assert_eq!(next_capsule(&mut read), Ok(Some("one".into())));
        assert_eq!(next_capsule(&mut read), Ok(Some("".into())));
        assert_eq!(next_capsule(&mut read), Ok(None));
        read.extend_from_slice(&last[4..]);
        assert_eq!(next_capsule(&mut read), Ok(Some("three".into())));
        assert_eq!((next_capsule(&mut read), read.len()), (Ok(None), 0));
        let mut endless = BytesMut::new();
        varint::encode(DATAGRAM, &mut endless);
        varint::encode(1 << 20, &mut endless);
        assert!(next_capsule(&mut endless).is_err());
    }

    proptest! {
        #[test]
        fn anything_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut read = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = next_capsule(&mut read) {}
        }
    }
}
