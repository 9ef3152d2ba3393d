//! Summaries, deltas and pushes, with everything else that happens to a node.
#![no_main]

use libfuzzer_sys::fuzz_target;
use starling_fuzz::{values, watched::Watched};

fuzz_target!(|bytes: &[u8]| {
    let mut watched = Watched::new(0);
    for step in values(bytes) {
        watched.step(step);
    }
});
