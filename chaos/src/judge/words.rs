//! What a verdict says.

use super::{Outcome, Verdict};
use crate::history::Side;

pub(super) fn and_more(count: usize) -> String {
    match count {
        0 | 1 => String::new(),
        more => format!(" (and {} more)", more - 1),
    }
}

pub(super) fn sign(side: Side, found: bool, what: &str) -> String {
    let side = match side {
        Side::Stage => "stage",
        Side::Product => "product",
        Side::Healed => "end",
    };
    format!("{side}: {}{what}", if found { "" } else { "not seen: " })
}

/// The verdict in one line.
pub(super) fn line(verdict: &Verdict) -> String {
    let first = verdict.checks.iter().filter(|check| check.outcome == verdict.outcome);
    let said = |verb: &str| {
        let mut complaints = first.clone().map(|check| match check.detail.as_str() {
            "" => check.name.clone(),
            detail => format!("{} ({detail})", check.name),
        });
        let first = complaints.next().unwrap_or_default();
        format!("{verb}: {first}{}", and_more(1 + complaints.count()))
    };
    match verdict.outcome {
        Outcome::Held => {
            let lost: usize = verdict.faults.iter().map(|fault| fault.lost).sum();
            format!(
                "held: {} faults acted, {} calls, {lost} lost, {} done twice, 0 false downs",
                verdict.faults.len(),
                verdict.calls,
                verdict.twice
            )
        }
        Outcome::Violated => said("violated"),
        Outcome::Unknown => said("unknown"),
    }
}
