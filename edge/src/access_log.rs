//! One JSON line per request on stdout, written by a thread of its own: a slow disk or a full pipe never blocks a call.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use serde::Serialize;

/// Lines that may wait; beyond it they are dropped and counted.
const MAX_WAITING: usize = 8192;

/// What is told of a request.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Entry {
    pub(crate) time: String,
    pub(crate) request_id: String,
    pub(crate) trace_id: String,
    pub(crate) client: String,
    pub(crate) protocol: &'static str,
    pub(crate) method: String,
    pub(crate) host: String,
    /// Without the query, which may carry secrets.
    pub(crate) path: String,
    pub(crate) status: u16,
    /// Whether the client got less than the whole answer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) cut: bool,
    pub(crate) duration_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) consumer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// Where entries go. Cheap to clone.
#[derive(Clone)]
pub(crate) struct AccessLog {
    lines: SyncSender<Entry>,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    /// Starts the writer.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (lines, waiting) = sync_channel(MAX_WAITING);
        std::thread::Builder::new().name("access-log".into()).spawn(move || write_all(&waiting))?;
        Ok(Self { lines, dropped: Arc::default() })
    }

    /// Hands an entry over, or drops it.
    pub(crate) fn write(&self, entry: Entry) {
        if self.lines.try_send(entry).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

fn write_all(waiting: &Receiver<Entry>) {
    let mut out = std::io::BufWriter::new(std::io::stdout());
    while let Ok(first) = waiting.recv() {
        let mut next = Some(first);
        while let Some(entry) = next {
            if serde_json::to_writer(&mut out, &entry).is_err() || out.write_all(b"\n").is_err() {
                // Nobody reads stdout any more.
                return;
            }
            next = waiting.try_recv().ok();
        }
        if out.flush().is_err() {
            return;
        }
    }
}
