//! Questions to every live member at once: how do you see the mesh, and which documents do you have?

use std::{collections::BTreeMap, sync::Arc};

use starling_gossip::{Durable, MAX_LEAP, MemberView, Snapshot};
use starling_protocol::{DocumentSight, DocumentState, Name, NodeId, View, admin};
use tokio::{sync::watch, task::JoinSet};

use crate::{Documents, admin as api, mesh::links::Links};

/// Members that are asked at a time.
const AT_ONCE: usize = 32;

/// What each live member answered, by name; this node's own view among them.
async fn ask_all(snapshot: &Arc<Snapshot>, links: &Links, own: View) -> BTreeMap<String, Result<View, String>> {
    let mut answers = BTreeMap::new();
    let mut waiting: Vec<&MemberView> = snapshot.members.iter().filter(|m| m.is_live() && !m.is_self).collect();
    let mut asked = JoinSet::new();
    if let Some(me) = snapshot.me() {
        answers.insert(api::name_of(snapshot, &me.id), Ok(own));
    }
    loop {
        while asked.len() < AT_ONCE
            && let Some(member) = waiting.pop()
        {
            let (links, name) = (links.clone(), api::name_of(snapshot, &member.id));
            let ident = member.ident();
            asked.spawn(async move { (name, links.inspect(ident).await) });
        }
        match asked.join_next().await {
            Some(Ok((name, answer))) => drop(answers.insert(name, answer)),
            Some(Err(error)) => tracing::error!(%error, "a survey"),
            None => return answers,
        }
    }
}

/// Every live member's view of all members.
pub(crate) async fn views(snapshot: &Arc<Snapshot>, links: &Links) -> Vec<admin::ObserverView> {
    let own = View { members: api::sights(snapshot), documents: Vec::new() };
    let answers = ask_all(snapshot, links, own).await;
    let named = |id: &NodeId| api::name_of(snapshot, id);
    let view = |(observer, answer): (String, Result<View, String>)| match answer {
        Ok(view) => {
            let sees = view.members.iter().map(|sight| (named(&sight.id), sight.status)).collect();
            admin::ObserverView { observer, error: None, sees }
        }
        Err(error) => admin::ObserverView { observer, error: Some(error), sees: BTreeMap::new() },
    };
    answers.into_iter().map(view).collect()
}

/// The mesh's documents, with the edition that each live member has.
pub(crate) async fn documents(
    snapshot: &Arc<Snapshot>,
    links: &Links,
    documents: &Documents,
    durable: &watch::Receiver<Durable>,
) -> Vec<admin::Document> {
    let own = View { members: Vec::new(), documents: documents.sights() };
    let answers = ask_all(snapshot, links, own).await;
    // Of each kind the newest edition that anybody has: this node itself may be the one that lacks it.
    let mut sights: BTreeMap<Name, DocumentSight> = BTreeMap::new();
    let held = durable.borrow().documents.clone();
    // What this node has just been given it may not have looked at yet.
    let own = held.values().map(|view| DocumentSight { edition: view.edition(), state: DocumentState::Pending });
    let told = answers.values().flatten().flat_map(|view| &view.documents);
    // Others' word is not verified: nobody numbers the next edition by one that no mesh takes.
    let floor = |kind: &Name| held.get(kind).map_or(0, |view| view.document.version);
    let told = told.filter(|sight| sight.edition.version <= floor(&sight.edition.kind).saturating_add(MAX_LEAP));
    for sight in own.collect::<Vec<_>>().iter().chain(told) {
        let order = |s: &DocumentSight| (s.edition.version, s.edition.hash);
        match sights.get(&sight.edition.kind) {
            Some(known) if order(known) >= order(sight) => {}
            _ => drop(sights.insert(sight.edition.kind.clone(), sight.clone())),
        }
    }
    for sight in documents.sights() {
        // What this node does with it counts as the rule, if it has that edition.
        if let Some(known) = sights.get_mut(&sight.edition.kind).filter(|known| known.edition == sight.edition) {
            *known = sight;
        }
    }
    let describe = |sight: &DocumentSight| {
        let kind = &sight.edition.kind;
        let nodes: Vec<admin::NodeDocument> =
            answers.iter().map(|(node, answer)| edition(node, answer, sight)).collect();
        let differs = |n: &admin::NodeDocument| {
            n.error.is_none() && (n.hash != Some(sight.edition.hash.to_string()) || n.state != Some(sight.state))
        };
        let document = held.get(kind).filter(|view| view.hash == sight.edition.hash).map(|view| &view.document);
        admin::Document {
            kind: kind.clone(),
            version: sight.edition.version,
            hash: sight.edition.hash.to_string(),
            state: sight.state,
            not_before: api::rfc3339(document.map_or(0, |d| d.not_before)),
            expires: document.and_then(|d| d.expires).map(api::rfc3339),
            drift: nodes.iter().any(differs),
            nodes,
        }
    };
    sights.values().map(describe).collect()
}

fn edition(node: &str, answer: &Result<View, String>, sight: &DocumentSight) -> admin::NodeDocument {
    let held = |view: &View| view.documents.iter().find(|d| d.edition.kind == sight.edition.kind).cloned();
    let (found, error) = match answer {
        Ok(view) => (held(view), None),
        Err(error) => (None, Some(error.clone())),
    };
    admin::NodeDocument {
        node: node.into(),
        version: found.as_ref().map(|d| d.edition.version),
        hash: found.as_ref().map(|d| d.edition.hash.to_string()),
        state: found.map(|d| d.state),
        error,
    }
}
