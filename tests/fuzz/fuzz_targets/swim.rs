//! Datagrams, from bytes at random to packets that are right in all their parts, and time between them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use starling_fuzz::{
    values,
    watched::{Step, Watched},
};

fuzz_target!(|bytes: &[u8]| {
    let mut watched = Watched::new(0);
    // The first bytes are a datagram by themselves, too.
    watched.step(Step::Datagram { from: 1, bytes: bytes.to_vec() });
    for step in values(bytes) {
        let of_swim = matches!(
            step,
            Step::Run { .. }
                | Step::Stall { .. }
                | Step::Datagram { .. }
                | Step::Packet { .. }
                | Step::Tell { .. }
                | Step::Ping { .. }
                | Step::Checked { .. }
                | Step::Leave
        );
        if of_swim {
            watched.step(step);
        }
    }
});
