//! What one worker has counted of calls: an account for each caller and service.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use http::{Method, StatusCode};

use tokio::sync::Semaphore;

use super::{distribution::Distribution, trace};

/// Stands for all that is not counted by name.
pub(crate) const OTHER: &str = "_OTHER";
/// Callers that are counted by name on one worker. Those that have gone make room for others.
const MAX_CALLERS: usize = 256;
/// Services of one caller that are counted by name; a mesh has fewer, but names come and go.
const MAX_SERVICES: usize = 4096;

/// Accounts by caller and service. Only its worker writes into them, so that nobody waits for a lock but while they are read.
#[derive(Debug)]
pub(crate) struct Ledger {
    callers: Mutex<HashMap<Arc<str>, Arc<Page>>>,
    /// For spans of one caller's calls.
    places: usize,
}

/// The accounts of one caller, by service.
#[derive(Debug)]
pub(crate) struct Page {
    services: Mutex<HashMap<Box<str>, SharedAccount>>,
    /// For spans of its calls.
    pub(crate) places: Arc<Semaphore>,
}

type SharedAccount = Arc<Mutex<Account>>;

/// What is counted of one caller's calls to one service.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Account {
    /// Time to the head of the answer, by what was asked and answered.
    pub(crate) heads: Vec<Answers>,
    /// Time to the end of the answer, or until it broke off.
    pub(crate) whole: Distribution,
    /// Attempts at calls, the first of each included; none where calls are served.
    pub(crate) attempts: u64,
    /// Bytes of requests' bodies.
    pub(crate) request_bytes: u64,
    /// Bytes of answers' bodies.
    pub(crate) response_bytes: u64,
    /// Answers that did not end as they promised.
    pub(crate) cut: u64,
    /// Calls whose caller went before there was an answer.
    pub(crate) abandoned: u64,
}

/// Answers of one kind.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answers {
    pub(crate) method: &'static str,
    pub(crate) status: u16,
    pub(crate) times: Distribution,
}

/// Methods that are told apart: few, whatever strangers send.
pub(crate) fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => OTHER,
    }
}

impl Ledger {
    /// One of so many workers.
    pub(crate) fn of_one(workers: usize) -> Self {
        Self { callers: Mutex::default(), places: trace::MAX_OF_ONE / workers.max(1) }
    }

    /// The page of a caller, which counts by name for as long as it is held.
    pub(crate) fn page(&self, caller: &str) -> Arc<Page> {
        let new_page = || Arc::new(Page::new(self.places));
        let mut callers = self.callers();
        if let Some(page) = callers.get(caller) {
            return page.clone();
        }
        // Nobody holds the page of one that has gone: what it did stays counted, but not by its name.
        if callers.len() > MAX_CALLERS {
            let gone = callers.iter().find(|(name, page)| &***name != OTHER && Arc::strong_count(page) == 1);
            let Some(gone) = gone.map(|(name, _)| name.clone()) else {
                return callers.entry(OTHER.into()).or_insert_with(new_page).clone();
            };
            let page = callers.remove(&gone);
            let others = callers.entry(OTHER.into()).or_insert_with(new_page);
            page.iter().for_each(|page| others.take_over(page));
        }
        callers.entry(caller.into()).or_insert_with(new_page).clone()
    }

    fn callers(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Page>>> {
        self.callers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Shows every account, with caller and service.
    pub(crate) fn read(&self, mut show: impl FnMut(&str, &str, &Account)) {
        let pages: Vec<_> = self.callers().iter().map(|(caller, page)| (caller.clone(), page.clone())).collect();
        for (caller, page) in pages {
            page.read(|service, account| show(&caller, service, account));
        }
    }
}

impl Page {
    /// With so many places for spans.
    pub(crate) fn new(places: usize) -> Self {
        Self { services: Mutex::default(), places: Arc::new(Semaphore::new(places)) }
    }

    /// The account of a service.
    pub(crate) fn account(&self, service: &str) -> SharedAccount {
        let mut services = self.services();
        if let Some(account) = services.get(service) {
            return account.clone();
        }
        let service = if services.len() < MAX_SERVICES { service } else { OTHER };
        services.entry(service.into()).or_default().clone()
    }

    fn services(&self) -> MutexGuard<'_, HashMap<Box<str>, SharedAccount>> {
        self.services.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Shows every account, with its service.
    pub(crate) fn read(&self, mut show: impl FnMut(&str, &Account)) {
        let accounts: Vec<_> = self.services().iter().map(|(name, account)| (name.clone(), account.clone())).collect();
        for (service, account) in accounts {
            show(&service, &open(&account));
        }
    }

    fn take_over(&self, other: &Self) {
        other.read(|service, account| open(&self.account(service)).merge(account));
    }
}

/// An account, to be written or read.
pub(crate) fn open(account: &Mutex<Account>) -> MutexGuard<'_, Account> {
    account.lock().unwrap_or_else(|e| e.into_inner())
}

impl Account {
    /// Counts an answer whose head is there.
    pub(crate) fn answered(&mut self, method: &'static str, status: StatusCode, took: Duration) {
        // One that nobody has registered means what the first of its class does (RFC 9110 §15).
        let status = match status.canonical_reason() {
            Some(_) => status.as_u16(),
            None => status.as_u16() / 100 * 100,
        };
        self.answers(method, status).add(took);
    }

    fn answers(&mut self, method: &'static str, status: u16) -> &mut Distribution {
        let known = self.heads.iter().position(|of| of.status == status && of.method == method);
        let at = known.unwrap_or_else(|| {
            self.heads.push(Answers { method, status, times: Distribution::default() });
            self.heads.len() - 1
        });
        &mut self.heads[at].times
    }

    /// Adds all that the other has counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        for Answers { method, status, times } in &other.heads {
            self.answers(method, *status).merge(times);
        }
        self.whole.merge(&other.whole);
        self.attempts += other.attempts;
        self.request_bytes += other.request_bytes;
        self.response_bytes += other.response_bytes;
        self.cut += other.cut;
        self.abandoned += other.abandoned;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_make_no_series() {
        let mut account = Account::default();
        for i in 0..2000u32 {
            let method = Method::from_bytes(format!("M{i}").as_bytes()).unwrap();
            let status = StatusCode::from_u16(600 + (i % 400) as u16).unwrap();
            account.answered(method_label(&method), status, Duration::ZERO);
        }
        assert_eq!(account.heads.len(), 4, "one for each class of statuses");
        assert_eq!(account.heads.iter().map(|answers| answers.times.count()).sum::<u64>(), 2000);
    }

    #[test]
    fn callers_that_have_gone_make_room_and_stay_counted() {
        let ledger = Ledger::of_one(1);
        let held: Vec<_> = (0..10).map(|i| ledger.page(&format!("held-{i}"))).collect();
        for i in 0..2 * MAX_CALLERS {
            let page = ledger.page(&format!("caller-{i}"));
            open(&page.account("orders")).cut += 1;
        }
        held.iter().for_each(|page| open(&page.account("orders")).cut += 1);
        let (mut pages, mut cut, mut held_by_name) = (0, 0, 0);
        ledger.read(|caller, _, account| {
            pages += 1;
            cut += account.cut;
            held_by_name += u64::from(caller.starts_with("held-"));
        });
        assert_eq!(cut, 2 * MAX_CALLERS as u64 + 10, "nothing is lost");
        assert!(pages <= MAX_CALLERS + 2, "{pages}");
        assert_eq!(held_by_name, 10, "whoever is here is counted by name");
    }

    #[test]
    fn where_everybody_stays_others_are_counted_together() {
        let ledger = Ledger::of_one(1);
        let _held: Vec<_> = (0..=MAX_CALLERS).map(|i| ledger.page(&format!("held-{i}"))).collect();
        let (a, b) = (ledger.page("late"), ledger.page("later"));
        assert!(Arc::ptr_eq(&a, &b));
        for i in 0..MAX_SERVICES + 10 {
            open(&a.account(&format!("s{i}"))).abandoned += 1;
        }
        assert_eq!(open(&a.account("new")).abandoned, 10, "and so are services beyond all bounds");
    }
}
