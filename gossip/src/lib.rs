//! Who is in the mesh, and what each member serves.
//!
//! [`Gossip`] is a state machine: it takes what arrived and the time, and says what to send, what to store and what
//! changed. It opens no socket and reads no clock, so a test can run a whole mesh of them on simulated time. [`spawn`]
//! puts one of them on a task and connects it to channels.
//!
//! Membership is SWIM with suspicion (Das, Gupta, Motivala 2002), carried by the `foca` crate behind [`Gossip`]'s driver;
//! what a member serves is in its signed record, stored and forwarded apart from membership.

mod actor;
mod contacts;
mod gossip;
mod membership;
mod records;
mod snapshot;

pub use actor::{GossipHandle, spawn};
pub use gossip::{Announcement, Config, Counters, Credentials, Gossip, Outgoing, RecordError, Sync, Target};
pub use membership::Ident;
pub use snapshot::{Instance, MemberView, Snapshot};
