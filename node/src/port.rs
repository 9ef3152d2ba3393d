//! The mesh port: one UDP port for everything, its sockets and endpoints, and frames on streams.

pub(crate) mod endpoint;
pub(crate) mod frames;
