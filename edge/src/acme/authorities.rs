//! The authorities that were met, each with our account.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use super::{
    issue::{Authority, IssueError},
    store::Store,
};
use crate::config;

/// By what [`account_of`] says.
#[derive(Default)]
pub(super) struct Authorities(Mutex<HashMap<config::Acme, Arc<Met>>>);

/// One at a time meets an authority, so that one account is made.
type Met = tokio::sync::Mutex<Option<Arc<Authority>>>;

impl Authorities {
    /// The authority, with the account that is kept, or with a new one. On failure: for how long it wants to be left alone, too.
    pub(super) async fn meet(
        &self,
        acme: &config::Acme,
        store: &Store,
    ) -> Result<Arc<Authority>, (IssueError, Option<Duration>)> {
        let met = self.met().entry(account_of(acme)).or_default().clone();
        let mut met = met.lock().await;
        if let Some(authority) = &*met {
            return Ok(authority.clone());
        }
        let authority = Arc::new(Authority::meet(acme, store).await?);
        Ok(met.insert(authority).clone())
    }

    /// After a failure with it an authority is met anew; with a new account, if it does not know ours. Whoever has met it anew meanwhile
    /// is left alone.
    pub(super) async fn distrust(&self, acme: &config::Acme, of: &Arc<Authority>, error: &IssueError, store: &Store) {
        let Some(met) = self.met().get(&account_of(acme)).cloned() else { return };
        let mut met = met.lock().await;
        if !met.as_ref().is_some_and(|current| Arc::ptr_eq(current, of)) {
            return;
        }
        *met = None;
        if error.is("accountDoesNotExist") {
            tracing::warn!(directory = acme.directory.0, "the authority does not know our account; a new one is made");
            store.forget_account(acme);
        }
    }

    /// Whether there is an account already.
    pub(super) fn have_account(&self, acme: &config::Acme, store: &Store) -> bool {
        self.met().contains_key(&account_of(acme)) || store.account(acme).is_some()
    }

    fn met(&self) -> MutexGuard<'_, HashMap<config::Acme, Arc<Met>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// With whom, and as whom.
fn account_of(acme: &config::Acme) -> config::Acme {
    config::Acme { challenge: None, ..acme.clone() }
}
