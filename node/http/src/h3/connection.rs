//! What a connection is beside its requests: the control stream of each end, QPACK's streams, settings, and going away.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::{Mutex, Notify};

use super::{
    Code, Fault,
    codec::{
        control::{Control, Event, Role},
        frame,
        instructions::{DecoderStream, check_encoder},
        settings::Settings,
        varint,
    },
    datagrams::Dealer,
    order::{Line, Order},
};

/// Largest field section that we take, in bytes as RFC 9114 §4.2.2 counts them.
pub const MAX_SECTION_BYTES: u64 = 64 << 10;

/// Types of unidirectional streams (RFC 9114 §6.2, RFC 9204 §4.2).
const CONTROL: u64 = 0x00;
const PUSH: u64 = 0x01;
const ENCODER: u64 = 0x02;
const DECODER: u64 = 0x03;

/// Streams that we may reset, without their peer having stopped them, before the connection is replaced when its other requests
/// are done: quinn keeps some hundred bytes for each that was waited for with `stopped`, as long as the connection lives.
const MAX_REMEMBERED: u32 = 4096;

/// No GOAWAY came.
const STAYS: u64 = u64::MAX;

/// One HTTP/3 connection, shared by its streams.
pub(crate) struct Connection {
    quinn: quinn::Connection,
    role: Role,
    /// Where its streams stand, if they do.
    line: Option<Line>,
    dealer: Dealer,
    peer: OnceLock<Settings>,
    /// Its settings have come.
    told: Notify,
    /// From which stream id on the peer takes nothing.
    goaway: AtomicU64,
    ended: AtomicBool,
    remembered: AtomicU32,
    worn_out: Notify,
    /// Which of the streams that there may be only one of have come: a bit for each type.
    seen: AtomicU8,
    /// Our control stream. It stays open as long as the connection: to close it would be an error.
    control: Mutex<Option<quinn::SendStream>>,
}

impl Connection {
    /// Begins to speak HTTP/3 over an established connection: says our settings, and listens to what concerns all streams.
    pub(crate) fn start(quinn: quinn::Connection, role: Role, order: Order) -> Arc<Self> {
        let connection = Arc::new(Self {
            quinn,
            role,
            line: (order == Order::InLine).then(Line::default),
            dealer: Dealer::default(),
            peer: OnceLock::new(),
            told: Notify::new(),
            goaway: AtomicU64::new(STAYS),
            ended: AtomicBool::new(false),
            remembered: AtomicU32::new(0),
            worn_out: Notify::new(),
            seen: AtomicU8::new(0),
            control: Mutex::new(None),
        });
        tokio::spawn(connection.clone().drive());
        connection
    }

    pub(crate) fn quinn(&self) -> &quinn::Connection {
        &self.quinn
    }

    /// Where its streams stand in line, if they do.
    pub(crate) fn line(&self) -> Option<&Line> {
        self.line.as_ref()
    }

    /// Where its datagrams go.
    pub(super) fn dealer(&self) -> &Dealer {
        &self.dealer
    }

    /// Whether the peer takes HTTP datagrams, as far as it has said so.
    pub(crate) fn peer_takes_datagrams(&self) -> bool {
        self.peer.get().is_some_and(|settings| settings.datagrams)
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// Largest field section that the peer takes, as far as it has said so.
    pub(crate) fn peer_max_section_bytes(&self) -> u64 {
        self.peer.get().and_then(|settings| settings.max_field_section_bytes).unwrap_or(u64::MAX)
    }

    /// What the peer says of itself, once that has come. Cancel safe.
    pub(crate) async fn peer(&self) -> Settings {
        loop {
            let told = self.told.notified();
            match self.peer.get() {
                Some(settings) => return *settings,
                None => told.await,
            }
        }
    }

    /// Whether the peer neither goes away nor is gone.
    pub(crate) fn takes_requests(&self) -> bool {
        self.goaway.load(Relaxed) == STAYS && !self.ended.load(Relaxed)
    }

    /// Whether the connection had better be replaced.
    pub(crate) fn is_worn_out(&self) -> bool {
        self.remembered.load(Relaxed) >= MAX_REMEMBERED
    }

    /// The peer broke the protocol: closes everything.
    pub(crate) fn fail(&self, code: Code, reason: &str) {
        tracing::debug!(peer = %self.quinn.remote_address(), %code, reason, "closing an HTTP/3 connection");
        self.quinn.close(code.var_int(), reason.as_bytes());
    }

    /// Says that nothing from this stream id on will be processed (RFC 9114 §5.2), as soon as the peer lets us.
    pub(crate) fn go_away(self: &Arc<Self>, from: u64) {
        let mut id = BytesMut::new();
        varint::encode(from, &mut id);
        let mut out = BytesMut::new();
        varint::encode(frame::GOAWAY, &mut out);
        varint::encode(id.len() as u64, &mut out);
        out.extend_from_slice(&id);
        let connection = self.clone();
        tokio::spawn(async move {
            // Whoever comes second waits here for the first: the ids must not go up.
            if let Some(control) = &mut *connection.control.lock().await {
                let _ = control.write_all(&out).await;
            }
        });
    }

    /// Counts a stream that quinn remembers: see [`MAX_REMEMBERED`].
    pub(crate) fn count_remembered(&self) {
        if self.remembered.fetch_add(1, Relaxed) + 1 == MAX_REMEMBERED {
            self.worn_out.notify_one();
        }
    }

    /// Resolves when the connection remembers so many streams that it had better be replaced. Cancel safe.
    pub(crate) async fn worn_out(&self) {
        self.worn_out.notified().await;
    }

    async fn drive(self: Arc<Self>) {
        let peers_streams = async {
            while let Ok(stream) = self.quinn.accept_uni().await {
                tokio::spawn(self.clone().listen(stream));
            }
        };
        tokio::join!(self.announce(), peers_streams);
        self.ended.store(true, Relaxed);
    }

    /// Opens our control stream. QPACK's are never opened: with a table of size 0 there is nothing to say on them
    /// (RFC 9204 §4.2).
    async fn announce(&self) {
        let settings = Settings {
            max_field_section_bytes: Some(MAX_SECTION_BYTES),
            extended_connect: self.role == Role::Server,
            datagrams: self.quinn.max_datagram_size().is_some(),
        };
        let mut out = BytesMut::new();
        varint::encode(CONTROL, &mut out);
        settings.encode(&mut out);
        let Ok(mut control) = self.quinn.open_uni().await else { return };
        let stopped = control.stopped();
        if let Err(quinn::WriteError::ConnectionLost(_)) = control.write_all(&out).await {
            return;
        }
        *self.control.lock().await = Some(control);
        if let Ok(Some(_)) = stopped.await {
            self.fail(Code::H3_CLOSED_CRITICAL_STREAM, "our control stream was stopped");
        }
    }

    async fn listen(self: Arc<Self>, mut stream: quinn::RecvStream) {
        let mut read = BytesMut::new();
        let kind = loop {
            if let Some((kind, length)) = varint::decode(&read) {
                read.advance(length);
                break kind;
            }
            // A stream that ends before its type is known is nobody's (RFC 9114 §6.2).
            let Ok(Some(chunk)) = stream.read_chunk(usize::MAX, true).await else { return };
            read.extend_from_slice(&chunk.bytes);
        };
        let outcome = match kind {
            PUSH if self.role == Role::Server => wrong(Code::H3_STREAM_CREATION_ERROR, "a push stream from a client"),
            PUSH => wrong(Code::H3_ID_ERROR, "a push stream, where no push is allowed"),
            CONTROL | ENCODER | DECODER if self.seen.fetch_or(1 << kind, Relaxed) & 1 << kind != 0 => {
                wrong(Code::H3_STREAM_CREATION_ERROR, "a second stream of a type that there is once")
            }
            CONTROL => {
                let mut control = Control::new(self.role);
                self.follow(stream, read, |mut bytes| {
                    while let Some(event) = control.next(&mut bytes)? {
                        self.take(event);
                    }
                    Ok(())
                })
                .await
            }
            ENCODER => self.follow(stream, read, |bytes| check_encoder(&bytes)).await,
            DECODER => {
                let mut decoder = DecoderStream::default();
                self.follow(stream, read, |bytes| decoder.check(&bytes)).await
            }
            _ => {
                let _ = stream.stop(Code::H3_STREAM_CREATION_ERROR.var_int());
                Ok(())
            }
        };
        if let Err(fault) = outcome {
            self.fail(fault.code(), fault.reason());
        }
    }

    /// Reads a stream that must not end before the connection.
    async fn follow(
        &self,
        mut stream: quinn::RecvStream,
        first: BytesMut,
        mut check: impl FnMut(Bytes) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        check(first.freeze())?;
        loop {
            match stream.read_chunk(usize::MAX, true).await {
                Ok(Some(chunk)) => check(chunk.bytes)?,
                Err(quinn::ReadError::ConnectionLost(_)) => return Ok(()),
                Ok(None) | Err(_) => return wrong(Code::H3_CLOSED_CRITICAL_STREAM, "a critical stream was closed"),
            }
        }
    }

    fn take(&self, event: Event) {
        match event {
            // Settings come once; the control stream's reader sees to it.
            Event::Settings(settings) => {
                let _ = self.peer.set(settings);
                self.told.notify_waiters();
            }
            // Towards a server it names pushes, of which there are none.
            Event::GoAway(from) if self.role == Role::Client => self.goaway.store(from, Relaxed),
            Event::GoAway(_) => {}
        }
    }
}

fn wrong(code: Code, reason: &'static str) -> Result<(), Fault> {
    Err(Fault::Connection(code, reason))
}
