//! Whole meshes of the shipped gossip state machine on a simulated clock: thousands of nodes in one process, each run the same
//! as the last of its seed. Its own tests ask it questions; [`run`] carries out the gossip part of a chaos plan on it, and
//! [`search`] looks for a plan that breaks something.

#![cfg_attr(not(test), expect(dead_code, reason = "half of what a world can tell is what the tests here ask it"))]

mod credentials;
mod invariants;
mod liars;
mod links;
mod network;
mod plan;
mod questions;
mod search;
mod view;
mod world;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use self::{
    plan::run,
    search::{Found, random_plan, search, shrink},
};

const S: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
