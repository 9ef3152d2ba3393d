//! HTTP/3 (RFC 9114) on quinn, both roles, for the mesh and for the public side. See `docs/http3.md` for the requirements of
//! the RFC one by one.

pub mod codec;

mod code;

pub use code::{Code, Fault};
