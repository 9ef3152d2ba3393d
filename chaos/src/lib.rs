//! Chaos: real Starling processes under control, faults done to them, and what held.
//!
//! A black-box user: it knows the binary's path, the admin API's JSON and the public protocols, and nothing of the node's
//! insides. A [`Plan`] is [run](run()) on a backend and becomes a [`History`]; [`judge()`] makes a [`Verdict`] of it. The demo
//! and the end-to-end tests use the lower half: [`Cluster`], [`Client`], [`Load`].

mod client;
mod cluster;
pub mod history;
pub mod judge;
mod load;
pub mod plan;
mod ports;
mod process;
pub mod report;
mod run;
mod service;
mod stage;

pub use client::{Answer, Client, Door, self_signed};
pub use cluster::{Cluster, NodeSpec, wait_for};
pub use history::History;
pub use judge::{Verdict, judge};
pub use load::{Load, Tally};
pub use plan::Plan;
pub use ports::free_port;
pub use process::{Process, starling};
pub use run::{Options, Progress, Sabotage, check_lab, run, sweep};
pub use service::run as serve;
