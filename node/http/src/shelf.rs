//! What streams hold that nobody takes, and taking it back.
//!
//! All streams of a QUIC or HTTP/2 connection share its window. A body that nobody reads fills its own stream's window; a
//! few dozen of them fill the connection's, and then nobody gets anything. So a body that may wait for its reader stands on a
//! shelf: it has room for so many that stand still, and those that stand longest make room for others.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::Method;

use crate::body::Kind;

/// A body that was not asked for more for so long stands, as far as room for others is concerned.
const STANDS: Duration = Duration::from_secs(1);
/// How often the shelf is looked at, while there is room and while there is not.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_FULL: Duration = Duration::from_millis(250);

/// Bodies of this process that were ended because nobody took them.
static STALLED: AtomicU64 = AtomicU64::new(0);
/// Bodies of this process that were ended to make room.
static CLEARED: AtomicU64 = AtomicU64::new(0);

/// What this process took back from readers and writers that stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakenBack {
    /// Because nobody took anything for 30 seconds.
    pub stalled: u64,
    /// Earlier, because others needed the room.
    pub cleared: u64,
}

/// What this process took back so far.
pub fn taken_back() -> TakenBack {
    TakenBack { stalled: STALLED.load(Relaxed), cleared: CLEARED.load(Relaxed) }
}

/// Bodies that may stand still. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shelf(Arc<Shelved>);

#[derive(Debug)]
struct Shelved {
    /// Bodies that may stand at a time: the memory that there is for them, by the window of one.
    room: usize,
    bodies: Mutex<Bodies>,
}

#[derive(Debug, Default)]
struct Bodies {
    all: Vec<Weak<Standing>>,
    /// Somebody looks after them.
    kept: bool,
}

/// When a body is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Now,
    /// When a tunnel is open, which may take its time; who sends into it before fills its own window, and no more.
    Later,
}

impl Wanted {
    /// What a request with that method brings.
    pub(crate) fn with(method: &Method) -> Self {
        if *method == Method::CONNECT { Self::Later } else { Self::Now }
    }
}

/// A body on a shelf.
pub(crate) struct Standing {
    state: Mutex<State>,
}

struct State {
    kind: Kind,
    /// How long nobody may take it.
    patience: Duration,
    /// Since when nobody has asked for more; `None` while somebody waits for it.
    since: Option<Instant>,
}

impl std::fmt::Debug for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standing").finish_non_exhaustive()
    }
}

impl Shelf {
    /// A shelf for streams that hold up to `window_bytes` each, of up to `budget_bytes` altogether.
    pub fn new(budget_bytes: u64, window_bytes: u64) -> Self {
        let room = (budget_bytes / window_bytes.max(1)).max(1) as usize;
        Self(Arc::new(Shelved { room, bodies: Mutex::default() }))
    }

    /// Puts a body on it. It stands from now on, or, if it is `wanted` later only, from when it is first read.
    pub(crate) fn put(&self, kind: Kind, patience: Duration, wanted: Wanted) -> Arc<Standing> {
        let since = match wanted {
            Wanted::Now => Some(Instant::now()),
            Wanted::Later => None,
        };
        let state = State { kind, patience, since };
        let standing = Arc::new(Standing { state: Mutex::new(state) });
        let mut bodies = self.lock();
        if bodies.all.len() == bodies.all.capacity() {
            // Before it grows: most of a busy connection's bodies are over soon.
            bodies.all.retain(|body| body.strong_count() > 0);
        }
        bodies.all.push(Arc::downgrade(&standing));
        if !std::mem::replace(&mut bodies.kept, true) {
            let shelf = Arc::downgrade(&self.0);
            tokio::spawn(keep(shelf));
        }
        standing
    }

    /// Takes back what stands too long; whether the shelf is full. `None` if it is empty.
    fn look(&self, now: Instant) -> Option<bool> {
        let all: Vec<Arc<Standing>> = {
            let mut bodies = self.lock();
            bodies.all.retain(|body| body.strong_count() > 0);
            let all: Vec<_> = bodies.all.iter().filter_map(Weak::upgrade).collect();
            bodies.kept = !all.is_empty();
            all
        };
        if all.is_empty() {
            return None;
        }
        let standing_since = |body: &Arc<Standing>| {
            let state = body.lock();
            Some((state.since?, state.patience))
        };
        let mut standing: Vec<(Instant, Duration, &Arc<Standing>)> = all
            .iter()
            .filter_map(|body| standing_since(body).map(|(since, patience)| (since, patience, body)))
            .collect();
        standing.retain(|(since, ..)| now.saturating_duration_since(*since) >= STANDS);
        standing.sort_by_key(|(since, ..)| *since);
        let excess = standing.len().saturating_sub(self.0.room);
        for (i, (since, patience, body)) in standing.iter().enumerate() {
            if now.saturating_duration_since(*since) >= *patience {
                body.end("nobody took it", &STALLED);
            } else if i < excess {
                body.end("nobody took it, and others needed the room", &CLEARED);
            }
        }
        Some(all.len() >= self.0.room)
    }

    fn lock(&self) -> MutexGuard<'_, Bodies> {
        self.0.bodies.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Looks after a shelf until it is empty.
async fn keep(shelf: Weak<Shelved>) {
    let mut pause = LOOK_FULL;
    loop {
        tokio::time::sleep(pause).await;
        let Some(shelf) = shelf.upgrade().map(Shelf) else { return };
        pause = match shelf.look(Instant::now()) {
            Some(true) => LOOK_FULL,
            Some(false) => LOOK,
            None => return,
        };
    }
}

impl Standing {
    /// Reads of the body; what `read` gives says whether the reader has something now, and is to come back for more.
    pub(crate) fn with<T>(&self, read: impl FnOnce(&mut Kind) -> T, waits: impl FnOnce(&T) -> bool) -> T {
        let mut state = self.lock();
        let read = read(&mut state.kind);
        state.since = (!waits(&read)).then(Instant::now);
        read
    }

    /// Looks at the body without reading.
    pub(crate) fn peek<T>(&self, look: impl FnOnce(&Kind) -> T) -> T {
        look(&self.lock().kind)
    }

    /// Ends the body: its stream gives back what it holds, and whoever comes for more is told why there is none.
    fn end(&self, why: &'static str, count: &AtomicU64) {
        let mut state = self.lock();
        if state.since.take().is_some() && state.kind.end(why) {
            count.fetch_add(1, Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}
