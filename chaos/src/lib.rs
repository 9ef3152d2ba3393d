//! Real Starling processes under control: a mesh started from the binary, clients for its doors, and load with a count of
//! what failed.
//!
//! A black-box user: it knows the binary's path, the admin API's JSON and the public protocols, and nothing of the node's
//! insides. The demo and the end-to-end tests stand on it; so will the chaos runner.

mod client;
mod cluster;
mod load;
mod ports;
mod process;

pub use client::{Answer, Client, Door, self_signed};
pub use cluster::{Cluster, NodeSpec, wait_for};
pub use load::{Load, Tally};
pub use ports::free_port;
pub use process::{Process, starling};
