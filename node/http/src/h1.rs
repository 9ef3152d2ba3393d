//! HTTP/1.1 (RFC 9112) as a client speaks it, in the task of the call itself: to the service beside a node.
//!
//! The codec makes and reads messages without I/O; a [`Connection`] exchanges them over a [`ServerStream`].

mod client;
mod codec;
mod stream;

pub(crate) use self::client::Receiver;
pub use self::{
    client::{Connection, ExchangeError, Outgoing, Switched},
    codec::Offence,
    stream::ServerStream,
};
