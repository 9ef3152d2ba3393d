//! Export of traces and metrics to a collector: OTLP over HTTP, in protobuf.
//!
//! Nothing waits for it: spans that find no room are dropped and counted, and so are those that the collector does not take.

mod collector;
mod message;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use prost::Message;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use self::collector::Collector;
pub(crate) use self::{
    collector::{CollectorError, Settings, field},
    message::Resource,
};
use super::{readings::Reading, trace::Span};

/// Spans sent at once.
const MAX_BATCH: usize = 512;
/// How long the first span of a batch waits for others.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// How long the end of a node waits for its last spans and figures to be taken.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What became of spans.
#[derive(Debug, Default)]
pub(crate) struct ExportCounts {
    /// Taken by the collector.
    pub(crate) exported: AtomicU64,
    /// The collector did not take them.
    pub(crate) failed: AtomicU64,
}

/// Where to export to.
pub(crate) struct Collectors {
    traces: Collector,
    metrics: Collector,
    ending: CancellationToken,
}

impl Collectors {
    /// Reads what is needed to reach them; nothing is sent.
    pub(crate) fn new(settings: &Settings) -> Result<Self, CollectorError> {
        let ending = CancellationToken::new();
        let collector = |what| Collector::new(settings, what, ending.clone());
        Ok(Self { traces: collector("traces")?, metrics: collector("metrics")?, ending: ending.clone() })
    }
}

/// The export, under way.
pub(crate) struct Export {
    tasks: JoinSet<()>,
    ending: CancellationToken,
}

/// What is exported.
pub(crate) struct Sources<R> {
    pub(crate) spans: mpsc::Receiver<Span>,
    pub(crate) counts: Arc<ExportCounts>,
    /// Reads all figures.
    pub(crate) readings: R,
    pub(crate) interval: Duration,
    pub(crate) resource: Resource,
    pub(crate) since: SystemTime,
    /// Another process speaks for the node: this one's figures are sent a last time, and its spans as long as it goes on.
    pub(crate) superseded: CancellationToken,
}

impl Export {
    /// Starts it. It goes on until [`Export::finish`].
    pub(crate) fn start<R, F>(collectors: Collectors, sources: Sources<R>) -> Self
    where
        R: Fn() -> F + Send + 'static,
        F: Future<Output = Vec<Reading>> + Send + 'static,
    {
        let Sources { spans, counts, readings, interval, resource, since, superseded } = sources;
        let Collectors { traces, metrics, ending } = collectors;
        let end = ending.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(export_spans(traces, spans, counts, resource.clone(), ending.clone()));
        let until = async move {
            tokio::select! {
                () = ending.cancelled() => {}
                () = superseded.cancelled() => {}
            }
        };
        tasks.spawn(export_metrics(metrics, readings, interval, resource, since, until));
        Self { tasks, ending: end }
    }

    /// Sends what there is once more, if the collector takes it soon, and ends.
    pub(crate) async fn finish(mut self) {
        self.ending.cancel();
        let _ = tokio::time::timeout(LAST_WORDS, async { while self.tasks.join_next().await.is_some() {} }).await;
    }
}

async fn export_spans(
    mut collector: Collector,
    mut spans: mpsc::Receiver<Span>,
    counts: Arc<ExportCounts>,
    resource: Resource,
    ending: CancellationToken,
) {
    let mut batch = Vec::with_capacity(MAX_BATCH);
    loop {
        tokio::select! {
            biased;
            () = ending.cancelled(), if !spans.is_closed() => spans.close(),
            received = spans.recv_many(&mut batch, MAX_BATCH) => {
                if received == 0 {
                    return;
                }
                let more = async {
                    while batch.len() < MAX_BATCH {
                        let room = MAX_BATCH - batch.len();
                        if spans.recv_many(&mut batch, room).await == 0 {
                            return;
                        }
                    }
                };
                tokio::select! {
                    _ = tokio::time::timeout(BATCH_DELAY, more) => {}
                    () = ending.cancelled() => {}
                }
                let count = batch.len() as u64;
                let request = message::traces(&resource, batch.drain(..));
                let taken = match collector.send(request.encode_to_vec().into()).await {
                    Some(answer) => count.saturating_sub(message::rejected_spans(&answer)),
                    None => 0,
                };
                counts.exported.fetch_add(taken, Relaxed);
                counts.failed.fetch_add(count - taken, Relaxed);
            }
        }
    }
}

async fn export_metrics<R, F>(
    mut collector: Collector,
    readings: R,
    interval: Duration,
    resource: Resource,
    since: SystemTime,
    until: impl Future<Output = ()>,
) where
    R: Fn() -> F,
    F: Future<Output = Vec<Reading>>,
{
    let mut until = std::pin::pin!(until);
    let mut is_last = false;
    while !is_last {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = &mut until => is_last = true,
        }
        let request = message::metrics(&resource, &readings().await, since);
        let _ = collector.send(request.encode_to_vec().into()).await;
    }
}
