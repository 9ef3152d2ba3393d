//! HTTP/3 (RFC 9114) on quinn, both roles, for the mesh and for the public side. `docs/http3.md` lists the requirements of
//! the RFC one by one.
//!
//! [`codec`] is all that can be said of bytes alone; [`server`] and [`client`] put it on streams.

pub mod client;
pub mod codec;
pub mod server;

mod code;
mod connection;
mod datagrams;
mod order;
mod pump;
mod stream;
mod upload;

pub use code::{Code, Fault};
pub use connection::MAX_SECTION_BYTES;
pub use order::Order;
pub use stream::Broken;

pub(crate) use self::{
    datagrams::{Flow, FlowSender, Unsendable},
    stream::Receiver,
    upload::UploadBody,
};
