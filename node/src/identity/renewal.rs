//! Renewal: at half of the certificate's life, from any issuer, without touching a live connection.

use std::{sync::Arc, time::Duration};

use rand::RngExt;
use rustls::pki_types::CertificateDer;
use starling_protocol::{JoinReply, JoinRequest, Renew};

use super::{Identity, admission::Admission, unix_now};
use crate::state::StateDir;

const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);

/// Renews for as long as the node runs; announces each new end.
pub(crate) async fn run(admission: Admission, state: StateDir) {
    let mut retry = RETRY_MIN;
    loop {
        tokio::time::sleep(until_half_life(&admission.identity)).await;
        match renew(&admission, &state).await {
            Ok(()) => {
                retry = RETRY_MIN;
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

/// Half of the life, less up to a tenth of it, so that nodes started together do not renew together.
fn until_half_life(identity: &Arc<Identity>) -> Duration {
    let (start, end) = identity.validity();
    let life = end.saturating_sub(start) as f64;
    let due = start as f64 + life / 2.0 - life / 10.0 * rand::rng().random_range(0.0..1.0);
    Duration::from_secs_f64((due - unix_now() as f64).max(0.0))
}

async fn renew(admission: &Admission, state: &StateDir) -> Result<(), String> {
    let identity = &admission.identity;
    let request = JoinRequest::Renew(Renew {
        csr: identity.csr(),
        chain: identity.current().chain.iter().map(|c| c.to_vec()).collect(),
    });
    // The same door that relays for joiners: the local issuer if there is one, any other if not.
    match admission.answer(request).await {
        JoinReply::Granted(grant) => {
            let chain = grant.chain.into_iter().map(CertificateDer::from).collect();
            identity.replace_chain(state, chain).map_err(|e| e.to_string())
        }
        JoinReply::Refused(refusal) => Err(refusal.to_string()),
    }
}
