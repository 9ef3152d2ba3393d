//! Memory that was needed once goes back to the system: glibc keeps what was freed, unless it lies at the very end.
#![allow(unsafe_code)] // three calls to the allocator that no safe wrapper offers

use std::time::Duration;

/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// It is time when so many bytes less are in use than were since the last time; or when so many are free, in a process that
/// has grown meanwhile.
const LESS: usize = 4 << 20;
const FREE: usize = 8 << 20;
const GROWN: usize = 4 << 20;

/// So much that is free stays, and pieces up to this size are cut from it: what comes and goes with every large body must not be
/// asked of the system each time.
#[cfg(target_env = "gnu")]
const STAYS: libc::c_int = 2 << 20;

/// Gives back what is free, as long as the node runs.
pub(super) async fn give_back() {
    stay();
    let (mut after, mut most) = (0, 0);
    loop {
        tokio::time::sleep(LOOK).await;
        // It goes through all that is free.
        let Heap { used, free } = tokio::task::spawn_blocking(heap).await.unwrap_or_default();
        most = most.max(used);
        // What came and went between two looks shows only in how large the process is.
        let unseen = resident() >= after + GROWN && free >= FREE;
        if most - used < LESS && !unseen {
            continue;
        }
        // Some milliseconds, in which nobody else gets memory of the arena that it is at.
        let _ = tokio::task::spawn_blocking(trim).await;
        (after, most) = (resident(), used);
    }
}

/// The allocator's books, in bytes. What it has given back it still counts as free.
#[derive(Default)]
struct Heap {
    used: usize,
    free: usize,
}

/// Resident memory of this process, in bytes; 0 if the system does not tell.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = pages.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or_default();
    pages * rustix::param::page_size()
}

#[cfg(target_env = "gnu")]
fn heap() -> Heap {
    // SAFETY: reads the allocator's own books, under its locks.
    let books = unsafe { libc::mallinfo2() };
    Heap { used: books.uordblks, free: books.fordblks }
}

#[cfg(target_env = "gnu")]
fn stay() {
    // SAFETY: sets numbers that the allocator goes by, under its locks.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, STAYS);
        libc::mallopt(libc::M_MMAP_THRESHOLD, STAYS);
    }
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: gives back pages that no allocation has, under the allocator's locks.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
fn heap() -> Heap {
    Heap::default()
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}

#[cfg(not(target_env = "gnu"))]
fn stay() {}
