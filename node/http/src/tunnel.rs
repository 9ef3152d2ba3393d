//! Requests whose stream becomes a tunnel: bytes both ways, until either end has enough.
//!
//! Whatever protocol it came by, such a request has the method CONNECT. One that asks for a protocol has [`Protocol`] among its
//! extensions, as extended CONNECT has it (RFC 8441, RFC 9220), also where HTTP/1.1 said `Upgrade`; one without asks for bytes
//! to whoever is behind the authority (RFC 9110 §9.3.6). What the client sends through it is the request's body, and what it
//! gets is that of the answer, so that windows, counts and resets are those of every other exchange.

mod half;
mod packets;
pub(crate) mod websocket;

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response, StatusCode, response};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::oneshot,
};

use self::websocket::To;
pub use self::{
    half::Writing,
    packets::{Capsules, PacketReceiver, PacketSender, Passage, next_packet, packets},
    websocket::{Handshake, accept_of},
};
pub(crate) use self::{
    half::{Awaited, Reading},
    packets::{CapsuleBody, FlowSlot},
    websocket::Leaving,
};
use crate::{
    Body, Drain, Problem, ProxyError,
    h1::ServerStream,
    names,
    stall::{STALL, TUNNEL_STALL},
    tcp::Control,
};

/// The status of an answer that opens a tunnel.
pub const OPEN: StatusCode = StatusCode::OK;

/// Which protocol a tunnel is for, by its name in the registry of upgrade tokens, in lower case: among the extensions of a
/// request. HTTP/2 and 3 say `:protocol`, HTTP/1.1 says `Upgrade`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocol(pub String);

impl Protocol {
    /// WebSocket (RFC 6455).
    pub const WEBSOCKET: &'static str = "websocket";
    /// UDP (RFC 9298).
    pub const UDP: &'static str = "connect-udp";

    /// Reads a name; `None` if it is no token (RFC 9110 §5.6.2).
    pub fn read(text: &str) -> Option<Self> {
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(&byte);
        (!text.is_empty() && text.bytes().all(is_token)).then(|| Self(text.to_ascii_lowercase()))
    }

    /// Whether it is WebSocket.
    pub fn is_websocket(&self) -> bool {
        self.0 == Self::WEBSOCKET
    }

    /// Whether it is UDP.
    pub fn is_udp(&self) -> bool {
        self.0 == Self::UDP
    }

    /// Whether what goes through it would be HTTP itself, or hidden: requests that nobody would see, with fields that nobody took
    /// out.
    pub fn is_http(&self) -> bool {
        matches!(self.0.as_str(), "h2" | "h2c" | "h3") || self.0.starts_with("http/") || self.0.starts_with("tls/")
    }
}

/// Marks an answer, by an extension, that looks like consent and is none: an HTTP/1.1 server may answer a request to switch as if
/// it had not been asked.
#[derive(Debug, Clone, Copy)]
pub struct NotSwitched;

/// Whether an answer opens the tunnel that its request asked for.
pub fn is_open(method: &Method, answer: &response::Parts) -> bool {
    *method == Method::CONNECT && answer.status.is_success() && !is_not_switched(answer)
}

/// Between nodes a field says it.
fn is_not_switched(answer: &response::Parts) -> bool {
    answer.extensions.get::<NotSwitched>().is_some() || answer.headers.contains_key(&names::NOT_SWITCHED)
}

/// How long what a request brings, or is answered, may be left lying. Bytes that are no HTTP go to programs that pause as they
/// like.
pub fn patience_with(method: &Method, protocol: Option<&Protocol>) -> Duration {
    if *method == Method::CONNECT { patience_in(protocol) } else { STALL }
}

/// The same in a tunnel of that protocol; `None` is any bytes.
pub fn patience_in(protocol: Option<&Protocol>) -> Duration {
    if protocol.is_none() { TUNNEL_STALL } else { STALL }
}

/// What a client sends through a tunnel to a server, which is told when this node goes away, if the protocol has a word for that.
pub(crate) fn sent(body: Body, protocol: Option<&Protocol>, drain: &Drain) -> Body {
    match protocol {
        Some(protocol) if protocol.is_websocket() => Leaving::websocket(body, To::Server, drain.leaving()).into(),
        _ => body,
    }
}

/// An answer as HTTP/2 and 3 can give it, and whether it opens the tunnel that was asked for: there success does, so that nothing
/// else may look like it.
pub(crate) fn answered<B>(
    answer: Response<B>,
    method: &Method,
    protocol: Option<&Protocol>,
    drain: &Drain,
) -> Result<(Response<Leaving<B>>, bool), Problem> {
    let (head, body) = answer.into_parts();
    let is_open = is_open(method, &head);
    let is_told = head.headers.contains_key(&names::NOT_SWITCHED);
    if *method == Method::CONNECT && head.status.is_success() && !is_open && !is_told {
        let detail = "the service answered as if it had not been asked to change protocols";
        return Err(Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::HttpUpgradeFailed, detail));
    }
    let protocol = protocol.filter(|_| is_open);
    Ok((Response::from_parts(head, received(body, protocol, drain)), is_open))
}

/// What comes out of a tunnel to a client, which is told when this node goes away: a WebSocket at the deadline of the drain, and
/// who has sent packets at once, since they go elsewhere with the next one. Any other body as it is.
pub(crate) fn received<B>(body: B, protocol: Option<&Protocol>, drain: &Drain) -> Leaving<B> {
    match protocol {
        Some(protocol) if protocol.is_websocket() => Leaving::websocket(body, To::Client, drain.leaving()),
        Some(protocol) if protocol.is_udp() => Leaving::packets(body, drain.begun_as_a_whole()),
        _ => Leaving::plain(body),
    }
}

/// A connection that is one end of a tunnel.
#[derive(Debug)]
pub struct End {
    reading: Reading,
    writing: Writing,
}

impl End {
    /// A TCP connection. If the other end of the tunnel breaks off, it is reset, so that nobody takes what came for all.
    pub fn tcp(stream: TcpStream) -> Self {
        Self::server(ServerStream::new(stream), Bytes::new())
    }

    /// A connection to a server of which some was read already.
    pub(crate) fn server(stream: ServerStream, read: Bytes) -> Self {
        let (reading, other) = Reading::tcp(stream.clone(), read);
        Self { reading, writing: Writing::tcp(stream, other) }
    }

    /// Any other stream. If the other end of the tunnel breaks off, it is dropped without having been shut down.
    pub fn of(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        Self::controlled(stream, Control::default())
    }

    /// The same, of which somebody below is told if it is broken off.
    pub(crate) fn controlled(stream: impl AsyncRead + AsyncWrite + Send + 'static, control: Control) -> Self {
        let (read, write) = tokio::io::split(stream);
        let (reading, other) = Reading::io(Box::new(read));
        Self { reading, writing: Writing::io(Box::new(write), control, other) }
    }

    /// What comes from it, as a body, and the half that takes what goes there.
    pub fn divide(self) -> (Body, Writing) {
        (self.reading.into(), self.writing)
    }

    /// The same for one whose first half was promised already.
    pub(crate) fn fulfil(self, promise: oneshot::Sender<Reading>) -> Writing {
        // Nobody waits for it if the exchange is over, and then the reading half goes here.
        let _ = promise.send(self.reading);
        self.writing
    }
}
