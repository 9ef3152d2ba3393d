//! A second copy of a call that its first instance leaves without an answer for long.

use std::{pin::pin, time::Duration};

use http::request;
use starling_http::names;
use starling_protocol::NodeId;

use super::{
    CallError, Called, MeshClient, RetrySettings,
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
    /// What is answered first counts, unless it is a failure and the other one is none; the other is cancelled. Tells which
    /// instance it was that got the second copy.
    pub(super) async fn hedged(
        &self,
        candidate: &Candidate,
        parts: &mut request::Parts,
        terms: Terms<'_>,
        span: Option<Box<OpenSpan>>,
        hedge: Hedge<'_>,
        observed: &mut Observed,
    ) -> (Result<Attempted, CallError>, Option<NodeId>) {
        let mut copy = parts.clone();
        let mut first = pin!(self.attempt(candidate, parts, terms, span));
        tokio::select! {
            biased;
            outcome = &mut first => return (outcome, None),
            () = tokio::time::sleep(hedge.after) => {}
        }
        let wish = Wish { tried: &[candidate.instance.node], ..hedge.wish };
        let other = self.candidate(terms.service, wish, observed).ok().map(|(other, _)| other);
        let other = other.filter(|other| other.instance.node != candidate.instance.node);
        let Some(other) = other.filter(|_| hedge.called.may_hedge(hedge.retry)) else { return (first.await, None) };
        copy.headers.insert(names::ATTEMPT.clone(), names::numeral((hedge.earlier + 2).into()));
        observed.attempted();
        let span = observed.departure(&mut copy.headers).map(|span| of_attempt(span, terms.service, &other, 2));
        let mut second = pin!(self.attempt(&other, &mut copy, terms, span));
        let outcome = tokio::select! {
            biased;
            outcome = &mut first => match is_good(&outcome) {
                true => outcome,
                false => better(second.await, outcome),
            },
            outcome = &mut second => match is_good(&outcome) {
                true => outcome,
                false => better(first.await, outcome),
            },
        };
        (outcome, Some(other.instance.node))
    }
}

/// The later one, if it is an answer and the earlier one is none.
fn better(later: Result<Attempted, CallError>, earlier: Result<Attempted, CallError>) -> Result<Attempted, CallError> {
    if is_good(&later) { later } else { earlier }
}

fn is_good(outcome: &Result<Attempted, CallError>) -> bool {
    outcome.as_ref().is_ok_and(|answer| answer.unanswered.is_none() && !answer.response.status().is_server_error())
}
