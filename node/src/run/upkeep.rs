//! What a node looks after while it runs: seeds, and what is known of members that are gone.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use starling_gossip::GossipHandle;
use tokio::{runtime::Handle, sync::watch};

use super::Running;
use crate::MeshClient;

/// How often seeds' names are resolved again.
const RESOLVE_PERIOD: Duration = Duration::from_secs(10);

/// Tells gossip, and whoever must find an issuer without gossip, where the seeds are.
pub(super) async fn resolve_seeds(
    mut seeds: watch::Receiver<Vec<String>>,
    gossip: GossipHandle,
    contacts: watch::Sender<Vec<SocketAddr>>,
) {
    let remembered = contacts.borrow().clone();
    loop {
        let mut resolved = Vec::new();
        let names = seeds.borrow_and_update().clone();
        for seed in &names {
            match tokio::net::lookup_host(seed).await {
                Ok(addrs) => resolved.extend(addrs),
                Err(error) => tracing::warn!(seed, %error, "cannot resolve a seed; trying again"),
            }
        }
        contacts.send_replace([&resolved[..], &remembered].concat());
        gossip.set_seeds(resolved).await;
        if let Ok(Err(_)) = tokio::time::timeout(RESOLVE_PERIOD, seeds.changed()).await {
            return;
        }
    }
}

pub(super) async fn take_stock(running: Arc<Running>, workers: Vec<(Handle, MeshClient)>) {
    let mut watch = running.gossip.watch();
    while watch.changed().await.is_ok() {
        let snapshot = watch.borrow_and_update().clone();
        for (runtime, client) in &workers {
            let client = client.clone();
            runtime.spawn(async move { client.forget_strangers() });
        }
        running.links.forget_unreachable(&snapshot.members.iter().filter(|m| m.is_live()).map(|m| m.addr).collect());
    }
}
