//! Who is in the mesh, what each member serves, and what all have agreed on.
//!
//! [`Gossip`] is a state machine: it takes what arrived and the time, and says what to send, what to store and what
//! changed. It opens no socket and reads no clock, so a test can run a whole mesh of them on simulated time. [`spawn`]
//! puts one of them on a task and connects it to channels.
//!
//! Membership is SWIM with suspicion (Das, Gupta, Motivala 2002), carried by the `foca` crate, and with Lifeguard's local
//! health (Dadgar, Phillips, Currey 2018), which the driver adds. What a member serves is in its signed record, and what
//! the mesh has agreed on in signed documents; both are stored and forwarded apart from membership.

mod actor;
mod awareness;
mod config;
mod contacts;
mod documents;
mod gossip;
mod membership;
mod outgoing;
mod records;
mod recovery;
mod roster;
mod snapshot;
mod suspicion;
mod trust;
mod twins;

pub use actor::{Durable, GossipHandle, spawn};
pub use config::{Announcement, Config, Credentials, Memory, Profile, RecordError};
pub use documents::{DocumentError, DocumentView, MAX_LEAP};
pub use gossip::Gossip;
pub use membership::Ident;
pub use outgoing::{Counters, Detail, ForgetError, Outgoing, Reach, Sync, Target, Via};
pub use snapshot::{Instance, MemberView, SUBSET, Snapshot};
pub use trust::Refused;
