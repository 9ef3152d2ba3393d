//! Memory of this process: what it has, what it may have, and that what was needed once goes back to the system. glibc keeps what was
//! freed, unless it lies at the very end.
#![allow(unsafe_code)] // three calls to the allocator that no safe wrapper offers

use std::{
    path::{Component, Path},
    time::Duration,
};

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
pub(crate) async fn give_back() {
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
        give_back_now().await;
        (after, most) = (resident(), used);
    }
}

/// Gives back what is free at present. It takes some milliseconds, in which nobody else gets memory of the arena that it is at.
pub async fn give_back_now() {
    let _ = tokio::task::spawn_blocking(trim).await;
}

/// The allocator's books, in bytes. What it has given back it still counts as free.
#[derive(Default)]
struct Heap {
    used: usize,
    free: usize,
}

/// Resident memory of this process, in bytes; 0 if the system does not tell.
pub fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = pages.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or_default();
    pages * rustix::param::page_size()
}

/// What the control groups that this process is in let it have, in bytes, as with `MemoryMax=` of systemd; `None` without such a limit
/// (cgroups of version 2, `memory.max`).
pub fn allowed() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    allowed_in(Path::new("/sys/fs/cgroup"), &groups)
}

/// The least that a group or one above it has, of those below `root`. `groups` is as in `/proc/self/cgroup`.
fn allowed_in(root: &Path, groups: &str) -> Option<u64> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // Of a process that was moved, the kernel may say `/../x`: a place that cannot be seen from here.
    let own: Vec<_> = Path::new(own).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let limit = |depth| {
        let group = root.join(own[..depth].iter().collect::<std::path::PathBuf>());
        std::fs::read_to_string(group.join("memory.max")).ok()?.trim().parse::<u64>().ok()
    };
    (0..=own.len()).filter_map(limit).min()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("system.slice/edge.service");
        std::fs::create_dir_all(&group).unwrap();
        let allowed = || allowed_in(root.path(), "1:name=systemd:/x\n0::/system.slice/edge.service\n");
        assert_eq!(allowed(), None);
        std::fs::write(group.join("memory.max"), "max\n").unwrap();
        assert_eq!(allowed(), None);
        std::fs::write(root.path().join("system.slice/memory.max"), "2000\n").unwrap();
        assert_eq!(allowed(), Some(2000));
        std::fs::write(group.join("memory.max"), "1000\n").unwrap();
        assert_eq!(allowed(), Some(1000));
        assert_eq!(allowed_in(root.path(), "0::/\n"), None);
        assert_eq!(allowed_in(root.path(), "4:memory:/x\n"), None);
    }

    #[test]
    fn this_process_has_memory() {
        assert!(resident() > 1 << 20);
    }
}
