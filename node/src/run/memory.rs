//! Memory that was needed once goes back to the system: glibc keeps what was freed, unless it lies at the very end.
#![allow(unsafe_code)] // two calls to the allocator that no safe wrapper offers

use std::time::Duration;

/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// What the allocator may keep, in bytes, and what the process must have grown by since the last time.
const KEPT: usize = 8 << 20;
const GROWN: usize = 4 << 20;

/// Gives back what is free, as long as the node runs.
pub(super) async fn give_back() {
    let mut after = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        if resident() < after + GROWN || free() < KEPT {
            continue;
        }
        // Some milliseconds, in which nobody else gets memory of the arena that it is at.
        let _ = tokio::task::spawn_blocking(trim).await;
        after = resident();
    }
}

/// Resident memory of this process, in bytes; 0 if the system does not tell.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = pages.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or_default();
    pages * rustix::param::page_size()
}

#[cfg(target_env = "gnu")]
fn free() -> usize {
    // SAFETY: reads the allocator's own books, under its locks.
    unsafe { libc::mallinfo2() }.fordblks
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: gives back pages that no allocation has, under the allocator's locks.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
fn free() -> usize {
    0
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}
