//! What the admin API asks of a running node.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use starling_gossip::{MemberView, Snapshot};
use starling_protocol::{DocumentEdition, Name, Strike, admin as json};

use super::Running;
use crate::{
    admin::{self, ExtraRoutes, Subject},
    identity::{names, unix_now},
    mesh::{documents, survey},
    observe::{
        readings::{GossipFigures, OfNode, Reading},
        text,
    },
};

/// What is said to who asks about names where none are given.
const NO_ISSUER: &str = "this node is no issuer; ask one: `starling status` says which nodes are";
/// How long a member may take to answer an operator's ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

impl Running {
    /// All that this node can tell in figures.
    pub(super) async fn readings(&self) -> Vec<Reading> {
        let cert_left = self.identity.validity().1 as i64 - unix_now() as i64;
        let (of_links, snapshot) = (self.links.counters(), self.snapshot());
        let figures = GossipFigures {
            counters: self.gossip.counters().await,
            streams_refused: of_links.streams_refused.load(Relaxed),
            flood: of_links.flood.load(Relaxed),
            dropped: self.gossip.dropped(),
            of_members: self
                .gossip
                .details()
                .await
                .iter()
                .map(|d| (admin::name_of(&snapshot, &d.id), d.refused))
                .collect(),
        };
        let mut readings = self.books.read(&OfNode {
            snapshot: &snapshot,
            calls: &self.calls,
            repeats: self.inbound.repeats(),
            limits: self.inbound.limits(),
            gossip: &figures,
            cert_left,
            reloaded: self.reloaded.load(Relaxed),
        });
        let edge = self.extra().routes.clone();
        readings.extend(edge.into_iter().flat_map(|edge| edge.readings()).map(Reading::from));
        readings
    }

    fn phase(&self) -> &'static str {
        match () {
            () if self.drain_asked.is_cancelled() => "draining",
            () if self.is_ready() => "ready",
            () => "starting",
        }
    }
}

impl Subject for Running {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.gossip.snapshot()
    }

    fn services(&self) -> Vec<json::Service> {
        admin::services(&self.snapshot(), &self.calls, &self.inbound.limits())
    }

    fn is_ready(&self) -> bool {
        self.introduction.is_over(&self.snapshot()) && !self.drain_asked.is_cancelled()
    }

    async fn status(&self) -> json::Status {
        let snapshot = self.snapshot();
        let live: Vec<_> = snapshot.members.iter().filter(|m| m.is_live()).collect();
        let ends = live.iter().filter_map(|m| m.record.as_ref()).map(|r| r.cert_expires).min().unwrap_or_default();
        json::Status {
            name: self.identity.name().clone(),
            id: self.identity.id().to_string(),
            mesh: self.identity.mesh().to_string(),
            spiffe_id: self.identity.mesh().spiffe_id(self.identity.name()),
            kind: self.kind,
            version: env!("CARGO_PKG_VERSION").into(),
            phase: self.phase().into(),
            listen: self.listen,
            advertise: self.advertise,
            outbound: self.outbound,
            generation: snapshot.me().map_or(self.generation, |m| m.generation),
            uptime_s: self.started.elapsed().as_secs(),
            cert_expires: admin::rfc3339(self.identity.validity().1),
            issuer: self.authority.is_some(),
            members_alive: live.len(),
            members: snapshot.members.len(),
            issuers_alive: live.iter().filter(|m| m.record.as_ref().is_some_and(|r| r.issuer.is_some())).count(),
            first_cert_expires: admin::rfc3339(ends),
            in_flight: self.calls.in_flight() + self.inbound.in_flight(),
            doubt: self.gossip.counters().await.doubt,
            panicking: snapshot.panicking.clone(),
            unreachable_seeds: self.links.unreachable().iter().map(|(addr, why)| format!("{addr}: {why}")).collect(),
            not_reached: self.condition.not_reached(),
            predecessor: self.succession.predecessor(),
            also_at: snapshot.me().and_then(|m| m.also_at),
            reload_error: self.extra().reload_error.clone(),
        }
    }

    async fn metrics(&self) -> String {
        text::render(self.readings().await)
    }

    async fn members(&self, detailed: bool) -> Vec<json::Member> {
        let mut members = admin::members(&self.snapshot());
        if detailed {
            let (links, details) = (self.links.views(), self.gossip.details().await);
            let snapshot = self.snapshot();
            let told = |m: &MemberView| Some((m.id.to_string(), m.record.as_ref()?.speaks.software.clone()));
            let software: HashMap<String, String> = snapshot.members.iter().filter_map(told).collect();
            for member in members.iter_mut().filter(|m| !m.is_self) {
                let known = details.iter().find(|d| d.id.to_string() == member.id);
                let link = known.and_then(|d| links.get(&d.id));
                member.detail = Some(json::MemberDetail {
                    heard_ms_ago: known.and_then(|d| d.heard).map(|ago| ago.as_millis() as u64),
                    connection: link.map_or("none", |l| l.state).into(),
                    rtt_us: link.and_then(|l| l.rtt).map(|rtt| rtt.as_micros() as u64),
                    root: known.and_then(|d| d.root).map(|root| format!("{root:016x}")),
                    software: software.get(&member.id).cloned().unwrap_or_default(),
                    refused: known.map_or_else(json::Refused::default, |d| refused(&d.refused)),
                });
            }
        }
        members
    }

    async fn views(&self) -> Vec<json::ObserverView> {
        survey::views(&self.snapshot(), &self.links).await
    }

    async fn documents(&self) -> Vec<json::Document> {
        survey::documents(&self.snapshot(), &self.links, &self.documents, &self.gossip.durable()).await
    }

    async fn publish(&self, new: json::NewDocument) -> Result<DocumentEdition, String> {
        let bytes = STANDARD.decode(&new.signed).map_err(|e| format!("the document is not base64: {e}"))?;
        let signed = starling_protocol::decode(&bytes).map_err(|e| format!("the document does not decode: {e}"))?;
        documents::publish(&self.gossip, signed).await.map_err(|e| e.to_string())
    }

    async fn ping(&self, node: &str) -> Result<json::Pinged, String> {
        let snapshot = self.snapshot();
        let member = find(&snapshot, node)?;
        if member.is_self {
            return Err(format!("{node} is this node itself"));
        }
        let started = Instant::now();
        let pong = tokio::time::timeout(PING_TIMEOUT, self.links.ping(member.ident(), None)).await;
        let pong = pong.map_err(|_| format!("{node} does not answer within {PING_TIMEOUT:?}"))?;
        let pong = pong.map_err(|e| format!("{node} does not answer: {e}"))?;
        let rtt_us = started.elapsed().as_micros() as u64;
        let name = admin::name_of(&snapshot, &member.id);
        Ok(json::Pinged { node: name, addr: member.addr, rtt_us, generation: pong.generation })
    }

    async fn forget(&self, forget: json::Forget) -> Result<(), String> {
        let json::Forget { node, prune, signed } = forget;
        let signed = match (signed, &self.authority) {
            (Some(base64), _) => {
                let bytes = STANDARD.decode(&base64).map_err(|e| format!("the strike is not base64: {e}"))?;
                starling_protocol::decode(&bytes).map_err(|e| format!("the strike does not decode: {e}"))?
            }
            (None, Some(authority)) => {
                let snapshot = self.snapshot();
                let member = snapshot.dead_named(&node).map_or_else(|| find(&snapshot, &node), Ok)?;
                authority.strike(&Strike { id: member.id, generation: member.generation, prune })
            }
            (None, None) => {
                return Err("only an issuer or the admin key can strike a member off; ask an issuer's node, or add \
                            --state with the directory that `starling init` filled"
                    .into());
            }
        };
        let outcome = self.gossip.strike(signed).await.ok_or("the node is going away")?;
        outcome.map_err(|e| format!("{node}: {e}"))
    }

    fn names(&self) -> Result<Vec<json::OwnedName>, String> {
        let authority = self.authority.as_ref().ok_or(NO_ISSUER)?;
        let owned = |(name, id, since, until)| json::OwnedName {
            name,
            id,
            since: admin::rfc3339(since),
            until: admin::rfc3339(until),
        };
        Ok(authority.names().into_iter().map(owned).collect())
    }

    async fn free_name(&self, name: Name) -> Result<(), String> {
        let authority = self.authority.clone().ok_or(NO_ISSUER)?;
        let freed = {
            let name = name.clone();
            tokio::task::spawn_blocking(move || authority.free(&name)).await.map_err(|e| e.to_string())??
        };
        match freed {
            true => {
                names::share(&self.admission, Some(&name)).await;
                Ok(())
            }
            false => Err(format!("nobody has the name {name}")),
        }
    }

    async fn upgrade(&self, upgrade: json::Upgrade) -> Result<json::Upgraded, String> {
        self.start_successor(upgrade.binary).await
    }

    fn drain(&self) {
        self.drain_asked.cancel();
    }

    fn reload(&self) -> Result<(), String> {
        let mut extra = self.extra();
        let Some(reload) = &extra.reload else {
            let why = "this node was started without a configuration file; there is nothing to reload";
            tracing::warn!("{why}");
            return Err(why.into());
        };
        let outcome = reload();
        self.reloaded.store(outcome.is_ok(), Relaxed);
        extra.reload_error = outcome.clone().err();
        match &outcome {
            Ok(()) => tracing::info!("configuration reloaded"),
            Err(error) => tracing::error!(error, "configuration not reloaded; the old one stays"),
        }
        outcome
    }

    fn extra(&self) -> Option<Arc<dyn ExtraRoutes>> {
        Running::extra(self).routes.clone()
    }
}

fn refused(of: &starling_gossip::Refused) -> json::Refused {
    let starling_gossip::Refused { forged, malformed, strangers, complaints } = *of;
    json::Refused { forged, malformed, strangers, complaints }
}

pub(super) fn find<'a>(snapshot: &'a Snapshot, node: &str) -> Result<&'a MemberView, String> {
    let by_id = || snapshot.members.iter().find(|m| m.id.to_string() == node);
    snapshot.named(node).or_else(by_id).ok_or_else(|| format!("no member has the name or id {node:?}"))
}
