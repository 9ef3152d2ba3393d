//! Renewal: at half of the certificate's life, from any issuer, without touching a live connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rand::RngExt;
use rustls::pki_types::CertificateDer;
use starling_protocol::{JoinReply, JoinRequest, Renew};

use tokio::sync::watch;

use super::{
    Identity,
    admission::{Admission, ask},
    authority::CLOCK_SKEW,
    unix_now,
};
use crate::state::StateDir;

const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest sleep: timers stand still while a host is suspended, and the certificate's clock does not.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Renews for as long as the node runs; announces each new end. `contacts` are addresses to ask at when gossip knows no
/// issuer: a node whose certificate has ended is in no mesh until it has a new one.
pub(crate) async fn run(admission: Admission, state: StateDir, contacts: watch::Receiver<Vec<SocketAddr>>) {
    let mut retry = RETRY_MIN;
    loop {
        let due = half_life(&admission.identity);
        while let left @ 1.. = due.saturating_sub(unix_now()) {
            tokio::time::sleep(Duration::from_secs(left).min(LONGEST_SLEEP)).await;
        }
        let known = contacts.borrow().clone();
        match renew(&admission, &state, &known).await {
            Ok(()) => {
                retry = RETRY_MIN;
                tokio::time::sleep(RETRY_MIN).await;
                let (_, ends) = admission.identity.validity();
                tracing::info!(ends_in_s = ends.saturating_sub(unix_now()), "certificate renewed");
                admission.gossip.announce(move |a| a.cert_expires = ends).await;
            }
            Err(error) => {
                tracing::warn!(error, retry_in_s = retry.as_secs_f32(), "certificate not renewed");
                let pause = retry.mul_f32(rand::rng().random_range(0.8..1.2));
                tokio::time::sleep(pause).await;
                retry = (retry * 2).min(RETRY_MAX);
            }
        }
    }
}

/// Half of the life, less up to a tenth of it, so that nodes started together do not renew together; unix seconds.
fn half_life(identity: &Arc<Identity>) -> u64 {
    let (valid_from, end) = identity.validity();
    // Certificates begin a little in the past, for clocks that are late.
    let start = valid_from + CLOCK_SKEW.as_secs();
    let life = end.saturating_sub(start) as f64;
    (start as f64 + life / 2.0 - life / 10.0 * rand::rng().random_range(0.0..1.0)) as u64
}

async fn renew(admission: &Admission, state: &StateDir, contacts: &[SocketAddr]) -> Result<(), String> {
    let identity = &admission.identity;
    let request = JoinRequest::Renew(Renew {
        csr: identity.csr(),
        chain: identity.current().chain.iter().map(|c| c.to_vec()).collect(),
    });
    // The same door that relays for joiners: the local issuer if there is one, any other if not.
    let mut reply = admission.answer(request.clone()).await;
    for addr in contacts {
        if matches!(&reply, JoinReply::Refused(refusal) if refusal.is_transient())
            && let Ok(Ok(answer)) =
                tokio::time::timeout(ASK_TIMEOUT, ask(&admission.endpoint, identity, *addr, &request)).await
        {
            reply = answer;
        }
    }
    match reply {
        JoinReply::Granted(grant) => {
            let chain = grant.chain.into_iter().map(CertificateDer::from).collect();
            identity.replace_chain(state, chain).map_err(|e| e.to_string())
        }
        JoinReply::Refused(refusal) => Err(refusal.to_string()),
    }
}
