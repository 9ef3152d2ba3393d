//! How many requests of a route may be under way at once, and how many of these may be one caller's.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// Of all places, what one caller may have: a quarter, so that whoever is slow does not hold up everybody.
const SHARE_OF_ONE: usize = 4;

/// Places for requests.
#[derive(Debug)]
pub(crate) struct Room {
    most: AtomicUsize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_caller: HashMap<String, usize>,
}

impl Room {
    pub(crate) fn new(most: NonZeroU32) -> Arc<Self> {
        Arc::new(Self { most: AtomicUsize::new(most.get() as usize), taken: Mutex::default() })
    }

    /// Another number from now on; what is under way stays so.
    pub(crate) fn resize(&self, most: NonZeroU32) {
        self.most.store(most.get() as usize, Relaxed);
    }

    /// A place for one more request of a caller; `None` if all are taken, or all that it may have.
    pub(crate) fn enter(self: &Arc<Self>, caller: &str) -> Option<Seat> {
        let most = self.most.load(Relaxed);
        let mut taken = self.lock();
        let of_caller = taken.by_caller.get(caller).copied().unwrap_or_default();
        if taken.all >= most || of_caller >= most.div_ceil(SHARE_OF_ONE) {
            return None;
        }
        taken.all += 1;
        taken.by_caller.insert(caller.to_owned(), of_caller + 1);
        Some(Seat { room: self.clone(), caller: caller.to_owned() })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    room: Arc<Room>,
    caller: String,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.room.lock();
        taken.all -= 1;
        if let Some(count) = taken.by_caller.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                taken.by_caller.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_places() {
        let room = Room::new(NonZeroU32::new(8).unwrap());
        let mut seats: Vec<Seat> = (0..2).map(|_| room.enter("a").unwrap()).collect();
        assert!(room.enter("a").is_none(), "a quarter");
        seats.extend(["b", "b", "c", "c", "d", "d"].map(|caller| room.enter(caller).unwrap()));
        assert!(room.enter("e").is_none(), "all");
        seats.remove(0);
        assert!(room.enter("e").is_some());
        room.resize(NonZeroU32::new(1).unwrap());
        assert!(room.enter("f").is_none());
        drop(seats);
        let _one = room.enter("f").unwrap();
        assert!(room.enter("g").is_none());
        assert_eq!(room.lock().by_caller.len(), 1);
    }
}
