//! Edges that have the same certificate: one of them has it issued, the others get it from there, and any of them shows an
//! authority what it looks for, because the name leads to all of them.
//!
//! Who has it issued follows from the certificate and the edges that are alive (rendezvous hashing), so that nobody has to be
//! asked; when that one dies, or does not get on, it is another one.

use std::{collections::VecDeque, sync::Mutex, time::Duration};

use bytes::Bytes;
use rustls::crypto::CryptoProvider;
use sha2::{Digest, Sha256};
use starling_node::Fleet;
use starling_protocol::{ChallengeShown, FindCertificate, FoundCertificate, NodeId, ShowChallenge};
use tokio::{task::JoinSet, time::Instant};

use super::{
    challenge::{Challenges, Shown},
    store::Id,
};

/// For how long what another edge asked for is shown.
const HELD: Duration = Duration::from_secs(5 * 60);
/// How much of it.
const MAX_HELD: usize = 256;
/// Failures in a row after which the next edge tries.
const PATIENCE: u32 = 3;

/// What the others say of a certificate.
pub(super) enum Others {
    /// One of them has a newer one: key and chain in PEM.
    Newer(Bytes),
    /// One of them is to have it issued.
    Busy,
    /// This one is to have it issued.
    Nobody,
}

/// Asks the other edges for a certificate whose end is after `newer_than`.
pub(super) async fn ask(fleet: &Fleet, id: &Id, newer_than: u64) -> Others {
    let own = fleet.own();
    let mut asked = JoinSet::new();
    for edge in fleet.others() {
        let (fleet, question) = (fleet.clone(), FindCertificate { id: id.as_str().to_owned(), newer_than });
        asked.spawn(async move { (edge, fleet.ask::<_, FoundCertificate>(&edge, &question).await) });
    }
    let mut is_busy = false;
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok((_, Ok(found))) if !found.pem.is_empty() => return Others::Newer(found.pem),
            Ok((edge, Ok(found))) => {
                let is_first = score(id, &edge) > score(id, &own);
                is_busy |= found.ordering || found.wanted && is_first && found.failures < PATIENCE;
            }
            // Who cannot be asked cannot be waited for.
            Ok((edge, Err(why))) => tracing::debug!(%edge, why, "an edge does not say whether it has a certificate"),
            Err(_) => {}
        }
    }
    if is_busy { Others::Busy } else { Others::Nobody }
}

/// Asks the other edges to show an authority what it looks for, and waits until they do.
pub(super) async fn show_everywhere(fleet: &Fleet, challenge: ShowChallenge) {
    let mut asked = JoinSet::new();
    for edge in fleet.others() {
        let (fleet, challenge) = (fleet.clone(), challenge.clone());
        asked.spawn(async move { (edge, fleet.ask::<_, ChallengeShown>(&edge, &challenge).await) });
    }
    while let Some(answer) = asked.join_next().await {
        if let Ok((edge, Err(why))) = answer {
            tracing::warn!(%edge, why, "an edge does not show what an authority looks for; it may look there");
        }
    }
}

/// The edge with the highest one has a certificate issued.
fn score(id: &Id, edge: &NodeId) -> [u8; 32] {
    Sha256::new().chain_update(id.as_str()).chain_update([0]).chain_update(edge.to_string()).finalize().into()
}

/// What is shown because other edges asked for it.
#[derive(Debug, Default)]
pub(super) struct Held(Mutex<VecDeque<(Instant, Shown)>>);

impl Held {
    /// Shows it for some minutes.
    pub(super) fn hold(&self, asked: &ShowChallenge, challenges: &Challenges, provider: &CryptoProvider) {
        let now = Instant::now();
        let mut held = self.0.lock().unwrap_or_else(|e| e.into_inner());
        while held.front().is_some_and(|(since, _)| now - *since > HELD) || held.len() >= MAX_HELD {
            held.pop_front();
        }
        match challenges.show(asked, provider) {
            Ok(shown) => held.push_back((now, shown)),
            Err(why) => tracing::warn!(host = asked.host, why, "what another edge asked for is not shown"),
        }
    }
}
