//! What an edge changes about messages on their way, beside what every hop does.

pub(crate) mod coding;
pub(crate) mod fields;
pub(crate) mod size;
