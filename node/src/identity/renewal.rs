//! Renewal: at half of the certificate's life, from any issuer, without touching a live connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rand::{RngExt, seq::SliceRandom};
use starling_protocol::{Renew, SignedAnswer};
use tokio::sync::watch;

use super::{
    Identity,
    admission::{Admission, ask},
    authority::CLOCK_SKEW,
    certificate::MeshCertificate,
    grant::{self, Expected, Request},
    unix_now,
};
use crate::{port::frames::Frame, state::StateDir};

const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);
/// Addresses that are asked in one round, where no issuer is known.
const CONTACTS: usize = 8;
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
                let proof = admission.authority.as_ref().map(|a| a.proof(admission.identity.id()));
                admission.gossip.announce(move |a| (a.cert_expires, a.issuer) = (ends, proof)).await;
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

/// Asks issuers, one after the other, until one gives a certificate that holds. That one refuses, or answers with anything
/// else, is a reason to ask the next.
async fn renew(admission: &Admission, state: &StateDir, contacts: &[SocketAddr]) -> Result<(), String> {
    let identity = &admission.identity;
    let chain = identity.current().chain.iter().map(|c| c.to_vec().into()).collect();
    let request = Request::new(&Renew { csr: identity.csr().into(), chain });
    let mut why = Vec::new();
    if let Some(signed) = admission.own_answer(&request).await {
        match take(identity, state, &signed, &request) {
            Ok(()) => return Ok(()),
            Err(error) => why.push(format!("the issuer here: {error}")),
        }
    }
    let issuers = admission.issuers();
    let issuers = issuers.iter().map(|(_, member)| (member.addr, Some(member.id)));
    // Those may carry it to an issuer that this node does not know of.
    let mut contacts = contacts.to_vec();
    contacts.shuffle(&mut rand::rng());
    for (addr, id) in issuers.chain(contacts.iter().take(CONTACTS).map(|addr| (*addr, None))) {
        let answer = ask(&admission.endpoint, identity, addr, id, &request).await;
        let taken = answer.and_then(|frame| read(&frame)).and_then(|signed| take(identity, state, &signed, &request));
        match taken {
            Ok(()) => return Ok(()),
            Err(error) => {
                tracing::debug!(%addr, error, "no new certificate from there");
                why.push(format!("{addr}: {error}"));
            }
        }
    }
    why.dedup();
    Err(if why.is_empty() { "no issuer is known".into() } else { why.join("; ") })
}

fn read(frame: &Frame) -> Result<SignedAnswer, String> {
    if let Ok(hint) = frame.read::<starling_protocol::Refusal>() {
        return Err(hint.to_string());
    }
    frame.read().map_err(|e| e.to_string())
}

/// Checks an answer in full, and takes the certificate in it.
fn take(identity: &Identity, state: &StateDir, signed: &SignedAnswer, request: &Request) -> Result<(), String> {
    let verdict = grant::verdict(signed, request, identity.root())?;
    let grant = verdict.outcome.map_err(|refusal| refusal.to_string())?;
    let grants = identity.grants();
    let expected = Expected { id: identity.id(), mesh: identity.mesh(), name: identity.name(), grants: &grants };
    let chain = grant::check_chain(&grant, verdict.issuer, identity.root(), &expected, identity.provider())
        .map_err(|why| format!("the new certificate is not taken: {why}"))?;
    let (ends, present) =
        (MeshCertificate::parse(&chain[0]).map_err(|e| e.to_string())?.not_after, identity.validity());
    let left = present.1.saturating_sub(unix_now());
    if ends <= present.1 && left > (present.1 - present.0) / 4 {
        return Err("the new certificate ends sooner than the present one".into());
    }
    identity.replace_chain(state, chain).map_err(|e| e.to_string())
}
