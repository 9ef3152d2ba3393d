//! Application protocols on the mesh port (RFC 7301): one UDP port, told apart during the handshake.

/// Calls between services, HTTP/3 (RFC 9114).
pub const CALLS: &[u8] = b"h3";
/// SWIM datagrams and sync streams.
pub const GOSSIP: &[u8] = b"starling-gossip/1";
/// Joining and certificate renewal. The only protocol that a peer without a certificate may speak.
pub const JOIN: &[u8] = b"starling-join/1";
