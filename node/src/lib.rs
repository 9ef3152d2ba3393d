//! node
#![allow(dead_code, missing_docs)]
mod balance;
mod body;
mod client;
mod drain;
mod endpoint;
mod guard;
pub mod h3_server;
mod identity;
mod message;
mod pool;
mod problem;
mod replay;
mod reuseport;
mod state;
mod stream;
mod tls;
pub use body::{Body, BodyError};
pub use client::{Call, CallError, Fault, MeshClient, Sent};
pub use drain::Drain;
pub use problem::{Problem, ProxyError, is_grpc, pseudonym};
