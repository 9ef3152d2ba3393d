//! Error codes, and what an error costs.

use std::fmt;

/// An error code of HTTP/3 (RFC 9114 §8.1) or QPACK (RFC 9204 §6).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code(u64);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        impl Code {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    /// Nothing is wrong; the rest is not needed.
    H3_NO_ERROR = 0x100;
    /// Against the protocol in a way that has no code of its own.
    H3_GENERAL_PROTOCOL_ERROR = 0x101;
    /// Our own fault.
    H3_INTERNAL_ERROR = 0x102;
    /// A stream that must not be opened.
    H3_STREAM_CREATION_ERROR = 0x103;
    /// A stream that must stay open was closed or reset.
    H3_CLOSED_CRITICAL_STREAM = 0x104;
    /// A frame where it is not allowed.
    H3_FRAME_UNEXPECTED = 0x105;
    /// A frame whose layout or size is wrong.
    H3_FRAME_ERROR = 0x106;
    /// More than we bear.
    H3_EXCESSIVE_LOAD = 0x107;
    /// A stream or push id out of bounds.
    H3_ID_ERROR = 0x108;
    /// Wrong settings.
    H3_SETTINGS_ERROR = 0x109;
    /// No SETTINGS at the start of the control stream.
    H3_MISSING_SETTINGS = 0x10a;
    /// Not processed at all: safe to send again.
    H3_REQUEST_REJECTED = 0x10b;
    /// Not wanted any more.
    H3_REQUEST_CANCELLED = 0x10c;
    /// The request ended before it was complete.
    H3_REQUEST_INCOMPLETE = 0x10d;
    /// A malformed message.
    H3_MESSAGE_ERROR = 0x10e;
    /// A CONNECT stream's connection broke.
    H3_CONNECT_ERROR = 0x10f;
    /// Only another version of HTTP would do.
    H3_VERSION_FALLBACK = 0x110;
    /// A datagram that belongs nowhere (RFC 9297 §5.2).
    H3_DATAGRAM_ERROR = 0x33;
    /// A field section that cannot be decoded.
    QPACK_DECOMPRESSION_FAILED = 0x200;
    /// A wrong instruction of the peer's encoder.
    QPACK_ENCODER_STREAM_ERROR = 0x201;
    /// A wrong instruction of the peer's decoder.
    QPACK_DECODER_STREAM_ERROR = 0x202;
}

impl Code {
    /// The number on the wire.
    pub const fn value(self) -> u64 {
        self.0
    }

    /// As QUIC carries it.
    pub(crate) fn var_int(self) -> quinn::VarInt {
        quinn::VarInt::from_u64(self.0).unwrap_or(quinn::VarInt::MAX)
    }
}

impl From<Code> for quinn::VarInt {
    fn from(code: Code) -> Self {
        code.var_int()
    }
}

impl From<quinn::VarInt> for Code {
    fn from(code: quinn::VarInt) -> Self {
        Self(code.into_inner())
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#x}", self.0),
        }
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the peer did wrong, and whom it costs: as the RFC says, one stream or the whole connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// One message is malformed; its stream is reset, the others go on.
    Stream(Code, &'static str),
    /// A field section over our limit: one stream is concerned, and a server may still answer on it.
    TooLarge,
    /// The two ends do not understand each other any more; the connection is closed.
    Connection(Code, &'static str),
}

impl Fault {
    /// A malformed message (RFC 9114 §4.1.2).
    pub(crate) const fn malformed(reason: &'static str) -> Self {
        Self::Stream(Code::H3_MESSAGE_ERROR, reason)
    }

    /// The code that says it.
    pub fn code(self) -> Code {
        match self {
            Self::Stream(code, _) | Self::Connection(code, _) => code,
            Self::TooLarge => Code::H3_EXCESSIVE_LOAD,
        }
    }

    /// In words.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Stream(_, reason) | Self::Connection(_, reason) => reason,
            Self::TooLarge => "the header fields are too large",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reason(), self.code())
    }
}
