//! How many retries there may be.

use std::{sync::Mutex, time::Instant};

/// Retries earned by each call, in thousandths, and by each second.
const BUDGET_PER_CALL: u64 = 200;
const BUDGET_PER_SECOND: u64 = 10_000;
const BUDGET_MAX: u64 = 100_000;

/// Retries are bounded by what succeeds: a fifth of the calls, and ten a second for quiet times.
pub(crate) struct RetryBudget(Mutex<Budget>);

struct Budget {
    /// In thousandths of a retry.
    balance: u64,
    refilled: Instant,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self(Mutex::new(Budget { balance: BUDGET_PER_SECOND, refilled: Instant::now() }))
    }
}

impl RetryBudget {
    pub(crate) fn earn(&self) {
        let mut budget = self.lock();
        budget.balance = (budget.balance + BUDGET_PER_CALL).min(BUDGET_MAX);
    }

    pub(crate) fn spend(&self) -> bool {
        let mut budget = self.lock();
        let elapsed = budget.refilled.elapsed();
        budget.refilled = Instant::now();
        let earned = (elapsed.as_secs_f64() * BUDGET_PER_SECOND as f64) as u64;
        // Time alone never saves up more than a second's worth.
        budget.balance = budget.balance.max((budget.balance + earned).min(BUDGET_PER_SECOND)).min(BUDGET_MAX);
        let enough = budget.balance >= 1000;
        if enough {
            budget.balance -= 1000;
        }
        enough
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Budget> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stay_within_a_fifth_of_the_calls() {
        let budget = RetryBudget::default();
        while budget.spend() {}
        for _ in 0..1000 {
            budget.earn();
        }
        let retries = (0..).take_while(|_| budget.spend()).count();
        assert!((99..=112).contains(&retries), "{retries}: capped at 100, and what the time of the test earned");
    }
}
