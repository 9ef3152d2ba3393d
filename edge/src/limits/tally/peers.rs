//! The other edges: who is there, and who says nothing.

use std::{pin::Pin, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use starling_node::Fleet;
use starling_protocol::{AskCounts, NodeId, TellCounts};
use tokio::time::Instant;

use super::{
    super::{Redis, share::STORE},
    Tally, lock,
};
use crate::config::{OnStoreDown, QuotaStore};

/// How long an edge may take to answer; one that does not is left out for a while, which doubles.
pub(crate) const PATIENCE: Duration = Duration::from_millis(700);
const SILENCE: Duration = Duration::from_secs(2);
pub(super) const MAX_SILENCE: Duration = Duration::from_secs(30);

/// The other edges.
pub(crate) trait Peers: Send + Sync {
    /// This one.
    fn own(&self) -> NodeId;
    /// The others that are alive.
    fn others(&self) -> Vec<NodeId>;
    /// Whether the mesh has been heard; before that there may be others that are not known.
    fn is_settled(&self) -> bool;
    /// Whether nothing passes that the store has not counted.
    fn needs_the_store(&self) -> bool {
        false
    }
    /// Asks one of them. Cancel safe, but that it may have heard the question.
    fn ask<'a>(
        &'a self,
        edge: &'a NodeId,
        ask: &'a AskCounts,
    ) -> Pin<Box<dyn Future<Output = Result<TellCounts, String>> + Send + 'a>>;
}

/// The edges of the mesh, and the store that they count in, if one is named.
#[derive(Clone)]
pub(crate) struct Members {
    fleet: Fleet,
    store: Arc<ArcSwapOption<Redis>>,
}

impl Members {
    pub(crate) fn new(fleet: Fleet) -> Self {
        Self { fleet, store: Arc::default() }
    }

    /// The store of that description, for [`Members::count_in`].
    ///
    /// # Errors
    /// What is wrong with the files that it names.
    pub(crate) fn store(&self, config: Option<&QuotaStore>) -> Result<Option<Arc<Redis>>, String> {
        let Some(config) = config else { return Ok(None) };
        let former = self.store.load_full();
        match former.filter(|former| former.config() == config && !config.url.tls) {
            Some(same) => Ok(Some(same)),
            // Also of the same description, where its certificates may be others now.
            None => Ok(Some(Arc::new(Redis::new(config, self.store.load().as_deref())?))),
        }
    }

    /// Counts there from now on, or among the edges alone.
    pub(crate) fn count_in(&self, store: Option<Arc<Redis>>) {
        self.store.store(store);
    }

    /// Whether a store is named.
    pub(crate) fn has_store(&self) -> bool {
        self.store.load().is_some()
    }
}

impl Peers for Members {
    fn own(&self) -> NodeId {
        self.fleet.own()
    }

    fn others(&self) -> Vec<NodeId> {
        let mut others = self.fleet.others();
        others.extend(self.has_store().then_some(STORE));
        others
    }

    fn is_settled(&self) -> bool {
        self.fleet.is_settled()
    }

    fn needs_the_store(&self) -> bool {
        self.store.load().as_ref().is_some_and(|store| store.config().on_store_down == OnStoreDown::Deny)
    }

    fn ask<'a>(
        &'a self,
        edge: &'a NodeId,
        ask: &'a AskCounts,
    ) -> Pin<Box<dyn Future<Output = Result<TellCounts, String>> + Send + 'a>> {
        Box::pin(async move {
            if *edge != STORE {
                return self.fleet.ask(edge, ask).await;
            }
            match self.store.load_full() {
                Some(store) => store.ask(ask).await,
                None => Err("no store is named any more".into()),
            }
        })
    }
}

impl Tally {
    /// Finds out who is there.
    pub(super) fn look(self: &Arc<Self>) {
        let now = Instant::now();
        let mut others = self.peers.others();
        let mut silent = lock(&self.silent);
        silent.retain(|edge, _| others.contains(edge));
        for (edge, (until, pause)) in silent.iter_mut().filter(|(_, (until, _))| *until <= now) {
            // It comes back when it has answered.
            *until = now + *pause;
            // What waits for the store is not to wait long for it when it is back.
            *pause = if *edge == STORE { SILENCE } else { (*pause * 2).min(MAX_SILENCE) };
            let (tally, edge) = (self.clone(), *edge);
            self.runtime.spawn(async move {
                let nothing = AskCounts::default();
                let answer = tokio::time::timeout(PATIENCE, tally.peers.ask(&edge, &nothing)).await;
                if matches!(answer, Ok(Ok(_))) {
                    lock(&tally.silent).remove(&edge);
                    tally.look();
                    if edge == STORE {
                        tracing::info!("the store of quotas answers again");
                    }
                }
            });
        }
        others.retain(|edge| !silent.contains_key(edge));
        drop(silent);
        let edges = self.edges.load();
        let next = edges.with(others);
        if **edges != next {
            self.edges.store(Arc::new(next));
        }
    }

    /// Finds out whether the store answers, if one is named that did so far.
    pub(super) fn greet_the_store(self: &Arc<Self>) {
        if self.edges.load().others().any(|edge| edge == STORE) {
            let tally = self.clone();
            self.runtime.spawn(async move {
                if let Err(why) = tally.put(&STORE, &AskCounts::default()).await {
                    tally.falls_silent(STORE, &why);
                }
            });
        }
    }

    /// Edges that are alive, and do not say what they have counted.
    pub(crate) fn silent(&self) -> usize {
        lock(&self.silent).keys().filter(|edge| **edge != STORE).count()
    }

    /// Whether the store, if one is named, does not answer.
    pub(crate) fn store_is_silent(&self) -> bool {
        lock(&self.silent).contains_key(&STORE)
    }

    /// Leaves an edge out until it answers again.
    pub(super) fn falls_silent(self: &Arc<Self>, edge: NodeId, why: &str) {
        let is_news = lock(&self.silent).insert(edge, (Instant::now() + SILENCE, SILENCE * 2)).is_none();
        if is_news && edge == STORE {
            let then = match self.peers.needs_the_store() {
                true => "calls that a quota counts are refused until it does",
                false => "edges count without it until it does",
            };
            tracing::warn!(why, "the store of quotas does not answer: {then}");
        } else if is_news {
            tracing::warn!(%edge, why, "an edge does not say what it has counted of quotas; the others share them without it");
        }
        self.look();
    }
}
