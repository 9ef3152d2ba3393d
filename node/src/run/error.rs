//! Why a node does not start.

use std::{io, net::SocketAddr, path::PathBuf};

use starling_protocol::{Name, TokenError};

use crate::{identity::join::JoinError, state::StateError, takeover::TakeoverError};

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Settings that make no sense together.
    #[error("{key}: {problem}")]
    Config {
        /// Which.
        key: String,
        /// What to do.
        problem: String,
    },
    /// Threads for calls.
    #[error(
        "cannot start the threads that carry calls: {0}; ask for fewer with --workers, or raise the limit of processes"
    )]
    Threads(io::Error),
    /// The collector of traces and metrics.
    #[error("{0}")]
    Collector(String),
    /// No state directory.
    #[error("no state directory; give --state DIR")]
    NoState,
    /// No identity and no way to get one.
    #[error(
        "{path} holds no identity, and there is no token to join with; give --token (see `starling token create`), or run \
         `starling init` to make a new mesh"
    )]
    NoToken {
        /// The directory.
        path: String,
    },
    /// The token file.
    #[error("cannot read the token file {path}")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The join.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The certificate does not cover what the node is to serve.
    #[error(
        "the certificate of {name} does not grant service {service}; join again with --token from \
         `starling token create --service {service}`"
    )]
    NotGranted {
        /// The node.
        name: Name,
        /// The service.
        service: Name,
    },
    /// The certificate is not an edge's.
    #[error("the certificate of {name} is not an edge's; join again with --token from `starling token create --edge`")]
    NotAnEdge {
        /// The node.
        name: Name,
    },
    /// The state directory belongs to a node of another name.
    #[error("this state directory belongs to node {stored}; start it as --name {stored}, or give another --state")]
    OtherName {
        /// Whose it is.
        stored: Name,
    },
    /// A file.
    #[error(transparent)]
    State(#[from] StateError),
    /// The process that runs.
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
    /// The mesh does not answer a process that takes over, as it did the one before.
    #[error("none of the {members} members that the running process knows has answered; it stays in charge")]
    Alone {
        /// How many.
        members: usize,
    },
    /// An address.
    #[error("cannot listen on {what} {addr}: {hint}")]
    Bind {
        /// What for.
        what: &'static str,
        /// Where.
        addr: SocketAddr,
        /// What to do.
        hint: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl StartError {
    /// An address that cannot be listened on.
    pub fn bind(what: &'static str, addr: SocketAddr, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::AddrInUse => "another process has the port; stop it or choose another port",
            io::ErrorKind::AddrNotAvailable => "no interface of this host has the address",
            io::ErrorKind::PermissionDenied => "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE",
            _ => "the system refused",
        };
        Self::Bind { what, addr, hint: hint.into(), source }
    }
}
