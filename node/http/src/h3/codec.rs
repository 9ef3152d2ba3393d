//! The bytes of HTTP/3, without I/O: what comes in is parsed and checked, what goes out is laid out. Everything here can be
//! fed byte by byte.

pub mod control;
pub mod datagram;
pub mod frame;
pub mod head;
pub mod instructions;
pub mod message;
pub mod qpack;
pub mod settings;
pub mod varint;
