//! node
#![allow(dead_code, missing_docs)]
mod body;
mod endpoint;
mod guard;
mod identity;
mod message;
mod problem;
mod replay;
mod reuseport;
mod state;
mod stream;
mod tls;
pub use body::{Body, BodyError};
