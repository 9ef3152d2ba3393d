//! Issuers tell each other which names they have given away.

use std::{collections::HashSet, sync::Arc, time::Duration};

use starling_protocol::{Ledger, Name, NodeId, Reservation, decode, encode};
use tokio::{task::JoinSet, time::Instant};

use super::{
    Identity,
    admission::{Admission, ask},
    authority::Authority,
    grant::Request,
};

/// Pause between two comparisons with all other issuers, and between two looks whether there is a new one.
const PERIOD: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(500);
/// How long another issuer may take before a name is given without it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Compares with the other issuers for as long as the node runs; with one that is new here at once.
pub(crate) async fn run(admission: Admission) {
    let (mut known, mut next) = (HashSet::new(), Instant::now());
    loop {
        let issuers: HashSet<NodeId> = admission.issuers().into_iter().map(|(_, issuer)| issuer.id).collect();
        if !issuers.is_subset(&known) || next <= Instant::now() {
            share(&admission, None).await;
            next = Instant::now() + PERIOD;
        }
        known = issuers;
        tokio::time::sleep(LOOK).await;
    }
}

/// Tells all other issuers that answer of that name, and hears what they have of it; or compares all names.
pub(crate) async fn share(admission: &Admission, name: Option<&Name>) {
    let Some(authority) = &admission.authority else { return };
    let issuers = admission.issuers();
    if issuers.is_empty() {
        return;
    }
    let mut exchanges = JoinSet::new();
    for (_, issuer) in issuers {
        let (admission, authority, name) = (admission.clone(), authority.clone(), name.cloned());
        exchanges.spawn(async move {
            let whom = (issuer.addr, issuer.id);
            if let Err(error) = compare(&admission, authority, whom, name).await {
                tracing::warn!(issuer = %issuer.addr, error, "names are not compared with another issuer");
            }
        });
    }
    let all = async { while exchanges.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(PATIENCE, all).await;
    // Who is late goes on by itself.
    exchanges.detach_all();
}

async fn compare(
    admission: &Admission,
    authority: Arc<Authority>,
    (addr, id): (std::net::SocketAddr, NodeId),
    name: Option<Name>,
) -> Result<(), String> {
    let ask = async |asked: Ledger| {
        let request = Request::new(&asked);
        let answer = ask(&admission.endpoint, &admission.identity, addr, Some(id), &request).await?;
        answer.read::<Ledger>().map_err(|e| e.to_string())
    };
    let about = |name: Option<Name>| {
        let authority = authority.clone();
        off_thread(move || {
            let (entries, digest) = (authority.reservations(name.as_ref()), authority.names_digest());
            Ledger { entries, whole: name.is_none(), digest: Some(digest), about: name.into_iter().collect() }
        })
    };
    if name.is_none() {
        // Mostly all have the same, and that is said in a few bytes.
        let ours = about(None).await?;
        let theirs = ask(Ledger { digest: ours.digest, ..Ledger::default() }).await?;
        if theirs.digest == ours.digest {
            return Ok(());
        }
    }
    let answer = ask(about(name).await?).await?;
    take(authority.clone(), admission.identity.clone(), answer).await
}

/// Answers another issuer: takes what it has, and gives what it lacks.
pub(super) async fn answer(
    authority: Arc<Authority>,
    identity: Arc<Identity>,
    asked: Ledger,
    from: &Name,
) -> Option<Ledger> {
    let (whole, theirs) = (asked.whole, asked.clone());
    if let Err(error) = take(authority.clone(), identity, asked).await {
        tracing::warn!(%from, error, "refused the names of another issuer");
        return None;
    }
    let answered = off_thread(move || {
        let known: HashSet<Vec<u8>> = theirs.entries.iter().map(encode).collect();
        let named = theirs.entries.iter().filter_map(|e| decode::<Reservation>(&e.body).ok()).map(|r| r.name);
        let names: HashSet<Name> = named.chain(theirs.about).collect();
        let ours = match whole {
            true => authority.reservations(None),
            false => names.iter().flat_map(|name| authority.reservations(Some(name))).collect(),
        };
        let entries = ours.into_iter().filter(|entry| !known.contains(&encode(entry))).collect();
        Ledger { entries, digest: Some(authority.names_digest()), ..Ledger::default() }
    });
    answered.await.ok()
}

async fn take(authority: Arc<Authority>, identity: Arc<Identity>, ledger: Ledger) -> Result<(), String> {
    match off_thread(move || authority.take_reservations(&ledger.entries, identity.root())).await?? {
        0 => Ok(()),
        wrong => Err(format!("{wrong} of its reservations are signed by no issuer")),
    }
}

/// The ledger is on disk, and large.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())
}
