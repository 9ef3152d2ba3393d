//! The public side: listeners for HTTP/1.1, 2 and 3, and one policy for all of them: authentication, rate limits, versions
//! and routes into the mesh.
//!
//! [`Edge::start`] runs a node with public listeners; `gateway` is the way of a request. An edge never picks an instance and
//! holds no mesh socket: it hands each call to the node's mesh client.

mod access_log;
mod acme;
mod api_key;
mod certificates;
mod config;
mod cors;
mod edge;
mod gateway;
mod grpc_web;
mod jwks;
mod jwt;
mod key_file;
mod key_pair;
mod limits;
mod listener;
mod policy;
mod route;
mod transform;
mod version;
mod watch;

pub use config::{EdgeSections, doubts, read_config};
pub use edge::{Edge, EdgeError};
pub use key_file::{KeyError, KeyFile};
