//! node
#![allow(dead_code, missing_docs)]
mod endpoint;
mod identity;
mod reuseport;
mod state;
mod stream;
mod tls;
