//! When an answer is late.

use std::time::{Duration, Instant};

use crate::Source;

/// Resolves when an answer is late: `timeout` has passed since now, and since the upload last moved. Cancel safe.
pub async fn late(source: Option<&Source>, timeout: Duration) {
    let mut due = Instant::now() + timeout;
    loop {
        tokio::time::sleep_until(due.into()).await;
        match source.and_then(Source::uploading_since).map(|moved| moved + timeout) {
            Some(later) if later > due => due = later,
            _ => return,
        }
    }
}
