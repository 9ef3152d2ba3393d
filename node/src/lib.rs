//! The peer proxy: identity, mutual TLS, QUIC endpoints, the mesh client, inbound, outbound and the admin API.
//!
//! [`Node::start`] composes it from a [`config::Config`]; [`MeshClient`] is how an edge calls into the mesh. The way of a
//! call: `outbound` (or an edge) -> `call` -> `call/choose` -> `call/connect` -> HTTP/3 == QUIC == HTTP/3 -> `inbound` ->
//! `inbound/local` -> the service. What HTTP itself needs is in the crate `starling_http`.

mod admin;
mod call;
mod identity;
mod inbound;
mod mesh;
mod observe;
mod outbound;
mod port;
mod run;
mod state;
mod takeover;

pub mod config;
pub mod memory;
pub mod web;

pub use admin::{ExtraAnswer, ExtraRoutes, rfc3339};
pub use call::{
    Call, CallError, Carried, Fault, HedgeAfter, HedgeSettings, LimitSettings, Limits, MadeByNode, MeshClient,
    RepeatSettings, RetrySettings, Sent,
};
pub use identity::{
    authority::{Admin, Authority, AuthorityError, TokenRequest},
    crypto_provider,
    join::JoinError,
    unix_now,
};
pub use mesh::{
    announced::{Announced, AnnouncedVersion, Announcements},
    documents::Documents,
    fleet::{Answering, Colleague, Fleet},
};
pub use observe::{
    observer::{Answered, Observed, Observer},
    readings::{Levels, Unit},
    trace,
};
pub use run::{EXIT_WITH, Node, StartError, TAKEOVER_ENVIRONMENT, Worker};
pub use state::{StateDir, StateError, StateLock};
pub use takeover::{Place, SOCKET as TAKEOVER_SOCKET, TakeoverError};
