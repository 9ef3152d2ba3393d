//! Whether others can reach this node at the address that it tells them. Nobody notices by himself: gossip goes over
//! connections that either side has made, and a node behind a wrong address makes all of its own.

use std::time::Duration;

use rand::seq::IteratorRandom;
use starling_gossip::{GossipHandle, Ident, MemberView};
use tokio::task::JoinSet;

use super::links::Links;
use crate::inbound::condition::Condition;

/// Members that are asked, at most, before it is believed that none reaches this node.
const ASKED: usize = 5;
/// Who must say that it does not, where there are so many: one may have a fault of its own, or lie.
const NO_BY: usize = 2;
/// How often it is looked at: while all is well, while nobody knows, and while it is not well.
const WELL: Duration = Duration::from_secs(60);
const UNKNOWN: Duration = Duration::from_secs(1);
const UNWELL: Duration = Duration::from_secs(5);

/// Asks others to dial this node, as long as it runs.
pub(crate) async fn watch(gossip: GossipHandle, links: Links, condition: Condition) {
    loop {
        let pause = match ask(&gossip, &links).await {
            None => UNKNOWN,
            Some(Ok(())) => {
                if condition.not_reached().is_some() {
                    tracing::info!("others reach this node again");
                }
                condition.reached(None).await;
                WELL
            }
            Some(Err(why)) => {
                if condition.not_reached().is_none() {
                    tracing::error!(
                        why,
                        "others cannot reach this node at the address that it tells them, so its services are not called; \
                         correct --advertise, or open the way"
                    );
                }
                condition.reached(Some(why)).await;
                UNWELL
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Whether one of a few members reaches this node; `None` if there is nobody who could say.
async fn ask(gossip: &GossipHandle, links: &Links) -> Option<Result<(), String>> {
    let snapshot = gossip.snapshot();
    let own = snapshot.me()?.addr;
    let others = snapshot.members.iter().filter(|m| !m.is_self && m.is_live() && m.record.is_some());
    let chosen: Vec<Ident> = others.map(MemberView::ident).sample(&mut rand::rng(), ASKED);
    let needed = NO_BY.min(chosen.len());
    let mut asked = JoinSet::new();
    for member in chosen {
        let links = links.clone();
        asked.spawn(async move { links.ask_dial_back(member).await });
    }
    let mut not = Vec::new();
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok(Ok(None)) => return Some(Ok(())),
            Ok(Ok(Some(why))) => not.push(why),
            // It says nothing about us.
            Ok(Err(_)) | Err(_) => {}
        }
    }
    let why = not.first().filter(|_| not.len() >= needed)?;
    Some(Err(format!("{own}: {why}")))
}
