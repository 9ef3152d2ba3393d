//! A second copy of a call that its first instance leaves without an answer for long.

use std::{pin::pin, time::Duration};

use http::request;
use starling_http::names;
use starling_protocol::NodeId;

use super::{
    CallError, Called, Fault, MeshClient, RetrySettings,
    attempt::{Attempted, Terms},
    choose::{Candidate, Wish},
    of_attempt,
};
use crate::observe::{observer::Observed, trace::OpenSpan};

/// When and within what a second copy may go.
#[derive(Clone, Copy)]
pub(super) struct Hedge<'a> {
    pub(super) after: Duration,
    /// What is asked of an instance.
    pub(super) wish: Wish<'a>,
    pub(super) called: &'a Called,
    pub(super) retry: &'a RetrySettings,
    /// Attempts over all hops, without the first one here.
    pub(super) earlier: u32,
}

impl MeshClient {
    /// Makes the first attempt at a call without a body, and, if that is not answered in time, a second one at another instance.
    /// What a service answers first counts, and the other is cancelled; but for errors of a second one, which wait for the first.
    pub(super) async fn hedged(
        &self,
        candidate: &Candidate,
        parts: &mut request::Parts,
        terms: Terms<'_>,
        span: Option<Box<OpenSpan>>,
        hedge: Hedge<'_>,
        observed: &mut Observed,
    ) -> Hedged {
        let first_node = candidate.instance.node;
        let mut copy = parts.clone();
        let mut first = pin!(self.attempt(candidate, parts, terms, span));
        tokio::select! {
            biased;
            outcome = &mut first => return Hedged { outcome, node: first_node, other: None },
            () = tokio::time::sleep(hedge.after) => {}
        }
        let wish = Wish { tried: &[first_node], ..hedge.wish };
        let other = self.candidate(terms.service, wish, observed).ok().map(|(other, _)| other);
        // Whoever is in no use for others is no help either.
        let other = other.filter(|other| {
            other.instance.node != first_node && !other.peer.is_out() && !other.experience.is_ejected()
        });
        let Some(other) = other.filter(|_| hedge.called.may_hedge(hedge.retry)) else {
            return Hedged { outcome: first.await, node: first_node, other: None };
        };
        let other_node = other.instance.node;
        copy.headers.insert(names::ATTEMPT.clone(), names::numeral((hedge.earlier + 2).into()));
        observed.attempted();
        let span = observed.departure(&mut copy.headers).map(|span| of_attempt(span, terms.service, &other, 2));
        let mut second = pin!(self.attempt(&other, &mut copy, terms, span));
        let (earlier, node) = tokio::select! {
            biased;
            outcome = &mut first => (outcome, first_node),
            outcome = &mut second => (outcome, other_node),
        };
        let other = Some(other_node);
        let worth = |outcome: &_, node| worth(outcome, node == first_node);
        if worth(&earlier, node) == BEST {
            return Hedged { outcome: earlier, node, other };
        }
        let (later, later_node) =
            if node == first_node { (second.await, other_node) } else { (first.await, first_node) };
        match worth(&later, later_node) > worth(&earlier, node) {
            true => Hedged { outcome: later, node: later_node, other },
            false => Hedged { outcome: earlier, node, other },
        }
    }
}

/// What became of a call of which there were two copies, perhaps.
pub(super) struct Hedged {
    pub(super) outcome: Result<Attempted, CallError>,
    /// Whose outcome it is.
    pub(super) node: NodeId,
    /// Who got the second copy, if it went.
    pub(super) other: Option<NodeId>,
}

/// Worth of what a service has answered itself.
const BEST: u8 = 4;

/// What an outcome is worth to the caller beside another one. A copy that fails at once must not take the place of an answer that is on
/// its way.
fn worth(outcome: &Result<Attempted, CallError>, is_first: bool) -> u8 {
    match outcome {
        Ok(answer) if answer.unanswered.is_some() => 2,
        Ok(answer) if !is_first && answer.response.status().is_server_error() => 3,
        Ok(_) => BEST,
        Err(error) if error.fault != Fault::Mesh => 1,
        Err(_) => 0,
    }
}
