/// Why a node closed a QUIC connection: the application error code of CONNECTION_CLOSE (RFC 9000 §19.19) on the gossip and
/// join protocols. Calls use HTTP/3's own codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    /// Done; nothing is wrong.
    Done = 0,
    /// The protocol needs a certificate of this mesh and none, or no valid one, was shown.
    Unauthenticated = 1,
    /// Another connection between the same two nodes is kept instead.
    Duplicate = 2,
    /// The peer sent something outside the protocol.
    Protocol = 3,
    /// This node is going away.
    Leaving = 4,
    /// The peer restarted, or was given up: this connection belongs to its former life.
    Stale = 5,
    /// There is no place for more; later there may be.
    Busy = 6,
}
