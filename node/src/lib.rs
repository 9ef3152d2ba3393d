//! The peer proxy: identity, mutual TLS, QUIC endpoints, the mesh client, inbound, outbound and the admin API.
//!
//! [`Node::start`] composes it from a [`config::Config`]; [`MeshClient`] is how an edge calls into the mesh. The way of a
//! call: `outbound` (or an edge) -> `message` (the one normaliser) -> [`MeshClient`] -> `balance` -> `pool` -> h3 stream
//! == QUIC == `inbound` -> `local` -> the service.

mod admin;
mod balance;
mod body;
mod client;
mod documents;
mod drain;
mod endpoint;
mod guard;
mod health;
mod identity;
mod inbound;
mod links;
mod local;
mod metrics;
mod node;
mod outbound;
mod pool;
mod problem;
mod replay;
mod reuseport;
mod state;
mod stream;
mod survey;
mod tls;

pub mod config;
pub mod h3_server;
pub mod http_server;
pub mod message;

pub use admin::ExtraRoutes;
pub use body::{Body, BodyError};
pub use client::{Call, CallError, Fault, MeshClient, Sent};
pub use documents::Documents;
pub use drain::Drain;
pub use endpoint::Room;
pub use identity::{
    authority::{Admin, Authority, AuthorityError, TokenRequest},
    crypto_provider,
    join::JoinError,
    unix_now,
};
pub use metrics::Metrics;
pub use node::{Node, StartError};
pub use problem::{Problem, ProxyError, is_grpc, pseudonym};
pub use state::{StateDir, StateError, StateLock};
