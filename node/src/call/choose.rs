//! Which instance gets a call: two random choices, the less loaded one wins (Mitzenmacher 2001), load being the peak-sensitive
//! moving average of latency times the calls in flight, as in Finagle's and Linkerd's PeakEWMA.

mod experience;
mod pick;

pub(crate) use self::{
    experience::{PeerLoad, PendingCall},
    pick::{Candidate, pick},
};
