//! The public side: listeners for HTTP/1.1, 2 and 3, and one policy for all of them: authentication, rate limits, versions
//! and routes into the mesh.
//!
//! [`Edge::start`] runs a node with public listeners; `gateway` is the way of a request. An edge never picks an instance and
//! holds no mesh socket: it hands each call to the node's mesh client.

mod access_log;
mod acme;
mod api_key;
mod caller;
mod certificates;
mod client_certificate;
mod config;
mod cors;
mod dress;
mod edge;
mod forward;
mod gateway;
mod grpc_web;
mod handshakes;
mod hops;
mod jwks;
mod jwt;
mod key_file;
mod key_pair;
mod limits;
mod listener;
mod policy;
mod proxy_protocol;
mod rendezvous;
mod room;
mod route;
mod rules;
mod strain;
mod tls;
mod transform;
mod version;
mod watch;

pub use config::{EdgeSections, doubts, published, read_config};
pub use edge::{DOCUMENT, Edge, EdgeError};
pub use key_file::{KeyError, KeyFile};
