//! HTTP on byte streams and on QUIC: what nodes and edges need to carry a message, whoever calls whom.
//!
//! It knows no identity, no gossip and no configuration.

mod body;
mod deadline;
mod drain;
mod guarded;
mod interim;
mod outgoing;
mod patience;
mod problem;
mod replay;
mod shelf;
mod stall;
mod transport;

pub mod accept;
pub mod h1;
pub mod h3;
pub mod names;
pub mod normal;
pub mod shared_port;
pub mod tcp;
pub mod tunnel;

pub use body::{Body, BodyError, Recoded};
pub use deadline::{Due, Late};
pub use drain::Drain;
pub use guarded::{Guard, Guarded};
pub use interim::Interim;
pub use outgoing::Head;
pub use problem::{Problem, ProxyError, grpc_timeout, is_grpc, pseudonym};
pub use replay::Source;
pub use shelf::{Shelf, TakenBack, taken_back};
pub use tcp::{offence, was_refused};
pub use transport::{Datagrams, Transport, takes_large_packets};
