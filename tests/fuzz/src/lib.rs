//! What the fuzz targets share.

#[path = "../../../gossip/tests/watched/mod.rs"]
pub mod watched;

/// Steps that one input may take, so that each run is short.
pub const MAX_STEPS: usize = 64;

/// The values that `bytes` encode, one after the other, until something does not decode.
pub fn values<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Vec<T> {
    let mut rest = bytes;
    let next = || {
        let (value, after) = postcard::take_from_bytes(rest).ok()?;
        rest = after;
        Some(value)
    };
    std::iter::from_fn(next).take(MAX_STEPS).collect()
}
