//! Requests whose stream becomes a tunnel: bytes both ways, until either end has enough.
//!
//! Whatever protocol it came by, such a request has the method CONNECT. One that asks for a protocol has [`Protocol`] among its
//! extensions, as extended CONNECT has it (RFC 8441, RFC 9220), also where HTTP/1.1 said `Upgrade`; one without asks for bytes
//! to whoever is behind the authority (RFC 9110 §9.3.6). What the client sends through it is the request's body, and what it
//! gets is that of the answer, so that windows, limits of time, counts and resets are those of every other exchange.

mod half;
mod packets;
pub(crate) mod websocket;

use bytes::Bytes;
use http::{Method, Response, StatusCode, response};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::oneshot,
};

use self::websocket::{Leaving, To};
pub use self::{
    half::Writing,
    packets::{Capsules, PacketReceiver, PacketSender, Sent, packets},
    websocket::{Handshake, accept_of},
};
pub(crate) use self::{
    half::{Awaited, Reading},
    packets::{CapsuleBody, Taken},
};
use crate::{Body, Drain, Problem, ProxyError, h1::ServerStream};

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
}

/// Marks an answer, by an extension, that looks like consent and is none: an HTTP/1.1 server may answer a request to switch as if
/// it had not been asked.
#[derive(Debug, Clone, Copy)]
pub struct NotSwitched;

/// Whether an answer opens the tunnel that its request asked for.
pub fn is_open(method: &Method, answer: &response::Parts) -> bool {
    *method == Method::CONNECT && answer.status.is_success() && answer.extensions.get::<NotSwitched>().is_none()
}

/// An answer as HTTP/2 and 3 can say it: there, success opens the tunnel that was asked for, and nothing else is success.
pub(crate) fn consented<B>(method: &Method, answer: Response<B>) -> Result<Response<B>, Problem> {
    if *method != Method::CONNECT || !answer.status().is_success() || answer.extensions().get::<NotSwitched>().is_none()
    {
        return Ok(answer);
    }
    let detail = "the service answered as if it had not been asked to change protocols";
    Err(Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::HttpUpgradeFailed, detail))
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
        let (reading, over) = Reading::tcp(stream.clone(), read);
        Self { reading, writing: Writing::tcp(stream, over) }
    }

    /// Any other stream.
    pub fn of(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (read, write) = tokio::io::split(stream);
        let (reading, over) = Reading::io(Box::new(read));
        Self { reading, writing: Writing::io(Box::new(write), over) }
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

/// What a client sends through a tunnel to a server; one that is told when this node goes away, if the protocol has a word for it.
pub(crate) fn sent(body: Body, protocol: Option<&Protocol>, drain: &Drain) -> Body {
    match protocol {
        Some(protocol) if protocol.is_websocket() => Leaving::websocket(body, To::Server, drain.leaving()).into(),
        _ => body,
    }
}

/// The same of what comes back. Takes any other body as it is.
pub(crate) fn answered<B>(body: B, protocol: Option<&Protocol>, drain: &Drain) -> Leaving<B> {
    match protocol {
        Some(protocol) if protocol.is_websocket() => Leaving::websocket(body, To::Client, drain.leaving()),
        _ => Leaving::plain(body),
    }
}

/// The status of an answer that opens a tunnel.
pub const OPEN: StatusCode = StatusCode::OK;
