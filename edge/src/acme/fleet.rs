//! Edges that have the same certificate: one of them has it issued, the others get it from there, and any of them shows an
//! authority what it looks for, because the name leads to all of them.
//!
//! Who has it issued follows from the certificate and the edges that are alive (rendezvous hashing), so that nobody has to be
//! asked; when that one dies, or does not get on, it is another one.

use std::{collections::VecDeque, sync::Mutex, time::Duration};

use bytes::Bytes;
use rustls::crypto::CryptoProvider;
use starling_node::Fleet;
use starling_protocol::{ChallengeShown, FindCertificate, FoundCertificate, NodeId, ShowChallenge};
use tokio::{task::JoinSet, time::Instant};

use super::{
    challenge::{Challenges, Shown},
    store::Id,
};
use crate::rendezvous::score;

/// For how long what another edge asked for is shown.
const HELD: Duration = Duration::from_secs(5 * 60);
/// How much of it, and how long each text may be, in bytes.
const MAX_HELD: usize = 1000;
const MAX_TEXT_BYTES: usize = 1024;
/// Failures in a row after which the next edge tries.
const MAX_FAILURES: u32 = 3;
/// Pause between two questions to all others: what edges take of each other is some fifty streams a second, with all else.
pub(super) const BETWEEN_QUESTIONS: Duration = Duration::from_millis(40);
/// How long an edge waits for another one that is to have a certificate issued; and for each that comes before it, in case that one
/// waits, too.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
const PATIENCE_FOR_EACH: Duration = Duration::from_secs(5 * 60);
/// How long it waits for others that live and do not answer.
const PATIENCE_WITH_SILENCE: Duration = Duration::from_secs(60);
/// How long others may take to show something.
const SHOW: Duration = Duration::from_secs(5);

/// What the others say of a certificate.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// Newer ones: key and chain in PEM.
    pub(super) newer: Vec<Bytes>,
    /// One of them is to have it issued, or is at it.
    busy: bool,
    /// One of them lives, and does not say.
    silent: bool,
    /// How many come before this edge.
    before: u32,
    count: usize,
}

impl Others {
    /// Whether this edge is to have it issued, after it has waited so long.
    pub(super) fn leave_it_to_us(&self, waited: Duration) -> bool {
        waited
            >= match self {
                Self { busy: true, before, .. } => PATIENCE + PATIENCE_FOR_EACH * *before,
                Self { silent: true, .. } => PATIENCE_WITH_SILENCE,
                _ => Duration::ZERO,
            }
    }

    pub(super) fn are_none(&self) -> bool {
        self.count == 0
    }

    fn hear(&mut self, id: &Id, own: &NodeId, edge: &NodeId, answer: Result<FoundCertificate, String>) {
        self.count += 1;
        let found = match answer {
            Ok(found) => found,
            Err(why) => {
                tracing::debug!(%edge, why, "an edge does not say whether it has a certificate");
                self.silent = true;
                return;
            }
        };
        let comes_first = found.wanted && score(id.as_str(), edge) > score(id.as_str(), own);
        self.before += u32::from(comes_first);
        self.busy |= found.ordering || comes_first && found.failures < MAX_FAILURES;
        if !found.pem.is_empty() {
            self.newer.push(found.pem);
        }
    }
}

/// Asks the other edges for a certificate that was issued later than that, in seconds since 1970.
pub(super) async fn ask(fleet: &Fleet, id: &Id, newer_than: u64) -> Others {
    let own = fleet.own();
    let mut asked = JoinSet::new();
    for edge in fleet.others() {
        let (fleet, question) = (fleet.clone(), FindCertificate { id: id.as_str().to_owned(), newer_than });
        asked.spawn(async move { (edge, fleet.ask::<_, FoundCertificate>(&edge, &question).await) });
    }
    let mut others = Others::default();
    while let Some(answer) = asked.join_next().await {
        if let Ok((edge, answer)) = answer {
            others.hear(id, &own, &edge, answer);
        }
    }
    others
}

/// Asks the other edges to show an authority what it looks for, and waits until they do, for some seconds.
pub(super) async fn show_everywhere(fleet: &Fleet, challenges: &[ShowChallenge]) {
    let mut asked = JoinSet::new();
    for edge in fleet.others() {
        let (fleet, challenges) = (fleet.clone(), challenges.to_vec());
        asked.spawn(async move {
            for challenge in challenges {
                if let Err(why) = fleet.ask::<_, ChallengeShown>(&edge, &challenge).await {
                    let host = challenge.host;
                    tracing::warn!(%edge, host, why, "an edge does not show what an authority looks for; it may look there");
                    return;
                }
            }
        });
    }
    let all = async { while asked.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(SHOW, all).await;
}

/// What is shown because other edges asked for it.
#[derive(Debug, Default)]
pub(super) struct Held(Mutex<VecDeque<(Instant, Shown)>>);

impl Held {
    /// Shows it for some minutes; whether there is room for it.
    pub(super) fn hold(&self, asked: &ShowChallenge, challenges: &Challenges, provider: &CryptoProvider) -> bool {
        let now = Instant::now();
        let mut held = self.0.lock().unwrap_or_else(|e| e.into_inner());
        while held.front().is_some_and(|(since, _)| now - *since > HELD) {
            held.pop_front();
        }
        let is_short = [&asked.token, &asked.authorization].iter().all(|text| text.len() <= MAX_TEXT_BYTES);
        if held.len() >= MAX_HELD || !is_short {
            return false;
        }
        match challenges.show(asked, provider) {
            Ok(shown) => held.push_back((now, shown)),
            Err(why) => {
                tracing::warn!(host = asked.host, why, "what another edge asked for is not shown");
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_edge_orders_and_another_one_if_that_does_not_get_on() {
        let id = Id::of(
            &["a.example".to_owned()],
            &crate::config::Acme {
                directory: "https://x/".to_owned().try_into().unwrap(),
                email: None,
                ca: None,
                challenge: None,
                eab: None,
            },
        );
        let mut edges: Vec<NodeId> = (1..=3).map(|n| format!("{n:032x}").parse().unwrap()).collect();
        edges.sort_by_key(|edge| std::cmp::Reverse(score(id.as_str(), edge)));
        let [first, second, third] = edges[..] else { panic!("three edges") };
        let says = |wanted, ordering, failures| Ok(FoundCertificate { wanted, ordering, failures, pem: Bytes::new() });
        let heard = |own: &NodeId, answers: &[(NodeId, Result<FoundCertificate, String>)]| {
            let mut others = Others::default();
            for (edge, answer) in answers {
                others.hear(&id, own, edge, answer.clone());
            }
            others
        };
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        // The first one orders at once, the others wait for it; the third longer than the second.
        assert!(
            heard(&first, &[(second, says(true, false, 0)), (third, says(true, false, 0))]).leave_it_to_us(minutes(0))
        );
        let of_second = heard(&second, &[(first, says(true, false, 0)), (third, says(true, false, 0))]);
        assert!(!of_second.leave_it_to_us(minutes(19)) && of_second.leave_it_to_us(minutes(20)));
        let of_third = heard(&third, &[(first, says(true, false, 0)), (second, says(true, false, 0))]);
        assert!(!of_third.leave_it_to_us(minutes(24)) && of_third.leave_it_to_us(minutes(25)));
        // Who does not want it, is dead, or has failed three times is not waited for.
        for answer in [says(false, false, 0), says(true, false, 3)] {
            assert!(heard(&second, &[(first, answer)]).leave_it_to_us(minutes(0)));
        }
        assert!(heard(&second, &[]).leave_it_to_us(minutes(0)));
        // Who is at it is, wherever it stands; and who does not answer for a while.
        assert!(!heard(&first, &[(second, says(true, true, 9))]).leave_it_to_us(minutes(1)));
        let silent = heard(&first, &[(second, Err("no answer in time".into()))]);
        assert!(!silent.leave_it_to_us(Duration::from_secs(59)) && silent.leave_it_to_us(minutes(1)));
    }
}
