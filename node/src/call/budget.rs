//! How many retries there may be.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

/// What is saved up at most, in retries.
const MOST: f64 = 100.0;

/// Retries are bounded by what is asked: a share of the calls, and some a second for quiet times.
pub(crate) struct RetryBudget(Mutex<Budget>);

struct Budget {
    /// In retries. Below nothing it never goes.
    balance: f64,
    refilled: Instant,
}

impl Default for RetryBudget {
    fn default() -> Self {
        // With what a second would have brought.
        let now = Instant::now();
        Self(Mutex::new(Budget { balance: 0.0, refilled: now.checked_sub(Duration::from_secs(1)).unwrap_or(now) }))
    }
}

impl RetryBudget {
    /// A call earns a share of a retry.
    pub(crate) fn earn(&self, share: f64) {
        let mut budget = self.lock();
        budget.balance = (budget.balance + share).min(MOST);
    }

    /// Takes a retry out, if there is one, or the time has earned it.
    pub(crate) fn spend(&self, per_second: u32) -> bool {
        let mut budget = self.lock();
        let elapsed = budget.refilled.elapsed();
        budget.refilled = Instant::now();
        let per_second = f64::from(per_second);
        let earned = elapsed.as_secs_f64() * per_second;
        // Time alone never saves up more than a second's worth.
        budget.balance = budget.balance.max((budget.balance + earned).min(per_second));
        let enough = budget.balance >= 1.0;
        if enough {
            budget.balance -= 1.0;
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
    fn who_sets_no_retries_gets_none() {
        assert!(!RetryBudget::default().spend(0));
        let budget = RetryBudget::default();
        assert_eq!((0..5).filter(|_| budget.spend(2)).count(), 2, "a second's worth from the start");
    }

    #[test]
    fn retries_stay_within_a_fifth_of_the_calls() {
        let budget = RetryBudget::default();
        while budget.spend(10) {}
        for _ in 0..1000 {
            budget.earn(0.2);
        }
        let retries = (0..).take_while(|_| budget.spend(10)).count();
        assert!((99..=112).contains(&retries), "{retries}: capped at 100, and what the time of the test earned");
    }
}
