//! What `/metrics` tells, in OpenMetrics text.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};

use http::{Method, StatusCode};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use starling_gossip::{Counters, MemberView, Refused, Snapshot};

use crate::call::Calls;

/// Upper bounds in seconds, from half a millisecond.
const BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    service: String,
    http_request_method: String,
    http_response_status_code: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    what: String,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndedLabel {
    why: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemberLabels {
    member: String,
    what: String,
}

/// What gossip and its transport have counted.
#[derive(Debug, Default)]
pub(crate) struct GossipFigures {
    pub(crate) counters: Counters,
    pub(crate) streams_refused: u64,
    pub(crate) flood: u64,
    /// Messages dropped because a queue was full.
    pub(crate) dropped: u64,
    /// What was refused of members, by name.
    pub(crate) of_members: Vec<(String, Refused)>,
}

type Durations = Family<CallLabels, Histogram, fn() -> Histogram>;

/// Metrics of a node. Cheap to clone; each clone counts into the same.
#[derive(Clone)]
pub struct Metrics(Arc<Families>);

struct Families {
    registry: Mutex<Registry>,
    server: Durations,
    client: Durations,
    members: Family<StatusLabel, Gauge>,
    cert_expiry: Gauge,
    in_flight: Gauge,
    retries: Counter,
    refused: Family<RefusedLabels, Counter>,
    of_members: Family<MemberLabels, Counter>,
    lost: Counter,
    exchanges: Counter,
    doubt: Gauge,
    backlog: Gauge,
    panicking: Gauge,
    /// 1 if the last reload was taken.
    reload: Gauge,
    repeats: Counter,
    ended: Family<EndedLabel, Counter>,
    /// Handles by service: whoever counts a call makes no label. Methods and statuses are few, whatever strangers send.
    series: Mutex<HashMap<String, Vec<Series>>>,
}

struct Series {
    server: bool,
    method: &'static str,
    status: u16,
    histogram: Histogram,
}

/// Stands for what is not counted by name.
const OTHER: &str = "_OTHER";
/// Services that are counted by name; a mesh has fewer, but names come and go.
const MAX_SERVICES: usize = 4096;

fn method_label(method: &Method) -> &'static str {
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

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let server = Durations::new_with_constructor(histogram);
        let client = Durations::new_with_constructor(histogram);
        registry.register("http_server_request_duration_seconds", "Calls served for other nodes", server.clone());
        registry.register("http_client_request_duration_seconds", "Calls made into the mesh", client.clone());
        let (members, cert_expiry, in_flight) = (Family::default(), Gauge::default(), Gauge::default());
        registry.register("starling_members", "Members by status", Family::clone(&members));
        registry.register("starling_cert_expiry_seconds", "Seconds until the certificate ends", cert_expiry.clone());
        registry.register(
            "starling_calls_in_flight",
            "Calls into the mesh that have no complete answer",
            in_flight.clone(),
        );
        let retries = Counter::<u64, AtomicU64>::default();
        registry.register("starling_retries", "Attempts beyond a call's first", retries.clone());
        let repeats = Counter::<u64, AtomicU64>::default();
        let help = "Requests sent to a service once more, because a kept connection was closed";
        registry.register("starling_service_repeats", help, repeats.clone());
        let ended = Family::<EndedLabel, Counter>::default();
        let help = "Bodies that were ended because nobody took them, or to make room for others";
        registry.register("starling_bodies_ended", help, ended.clone());
        let refused = Family::<RefusedLabels, Counter>::default();
        registry.register("starling_gossip_refused", "Gossip refused or dropped, by what and why", refused.clone());
        let of_members = Family::<MemberLabels, Counter>::default();
        let help = "Things of a member that were refused: of one that lies, or has a bad link";
        registry.register("starling_gossip_refused_of_member", help, of_members.clone());
        let (lost, exchanges) = (Counter::default(), Counter::default());
        registry.register("starling_gossip_lost", "Times that the mesh declared this node dead", Counter::clone(&lost));
        registry.register("starling_gossip_exchanges", "Exchanges of state begun", Counter::clone(&exchanges));
        let (doubt, backlog, panicking) = (Gauge::default(), Gauge::default(), Gauge::default());
        registry.register("starling_gossip_doubt", "Doubt of this node's own judgement, 0 to 8", Gauge::clone(&doubt));
        registry.register("starling_gossip_backlog", "Updates that wait to be passed on", Gauge::clone(&backlog));
        registry.register(
            "starling_panicking_services",
            "Services most of whose instances vanished at once",
            Gauge::clone(&panicking),
        );
        let reload = Gauge::default();
        reload.set(1);
        registry.register("starling_config_reload_success", "Whether the last reload was taken", Gauge::clone(&reload));
        Self(Arc::new(Families {
            registry: Mutex::new(registry),
            server,
            client,
            members,
            cert_expiry,
            in_flight,
            retries,
            refused,
            of_members,
            lost,
            exchanges,
            doubt,
            backlog,
            panicking,
            reload,
            repeats,
            ended,
            series: Mutex::default(),
        }))
    }

    pub(crate) fn server_call(&self, service: &str, method: &Method, status: StatusCode, took: Duration) {
        self.observe(true, service, method, status, took);
    }

    /// Counts a call into the mesh.
    pub fn client_call(&self, service: &str, method: &Method, status: StatusCode, took: Duration) {
        self.observe(false, service, method, status, took);
    }

    pub(crate) fn reloaded(&self, taken: bool) {
        self.0.reload.set(i64::from(taken));
    }

    fn observe(&self, server: bool, service: &str, method: &Method, status: StatusCode, took: Duration) {
        let method = method_label(method);
        // One that nobody has registered means what the first of its class does (RFC 9110 §15).
        let status = match status.canonical_reason() {
            Some(_) => status.as_u16(),
            None => status.as_u16() / 100 * 100,
        };
        let mut series = self.0.series.lock().unwrap_or_else(|e| e.into_inner());
        let service = match series.contains_key(service) || series.len() < MAX_SERVICES {
            true => service,
            false => OTHER,
        };
        let of_service = match series.get_mut(service) {
            Some(known) => known,
            None => series.entry(service.to_string()).or_default(),
        };
        let known = of_service.iter().find(|s| s.server == server && s.status == status && s.method == method);
        if let Some(known) = known {
            return known.histogram.observe(took.as_secs_f64());
        }
        let labels = CallLabels {
            service: service.to_string(),
            http_request_method: method.into(),
            http_response_status_code: status,
        };
        let family = if server { &self.0.server } else { &self.0.client };
        let histogram = family.get_or_create(&labels).clone();
        histogram.observe(took.as_secs_f64());
        of_service.push(Series { server, method, status, histogram });
    }

    /// Everything, as text, with the gauges brought up to date.
    pub(crate) fn text(
        &self,
        snapshot: &Snapshot,
        calls: &Calls,
        repeats: u64,
        gossip: &GossipFigures,
        cert_left: i64,
    ) -> String {
        let shared = &self.0;
        for status in ["alive", "suspect", "down", "left"] {
            let of_status =
                |m: &&MemberView| crate::admin::status_of(m).to_string() == status && !snapshot.is_superseded(m);
            let count = snapshot.members.iter().filter(of_status).count();
            shared.members.get_or_create(&StatusLabel { status: status.into() }).set(count as i64);
        }
        shared.cert_expiry.set(cert_left);
        shared.in_flight.set(calls.in_flight() as i64);
        catch_up(&shared.retries, calls.retries());
        catch_up(&shared.repeats, repeats);
        let starling_http::TakenBack { stalled, cleared } = starling_http::taken_back();
        for (why, total) in [("stalled", stalled), ("room", cleared)] {
            catch_up(&shared.ended.get_or_create(&EndedLabel { why: why.into() }), total);
        }
        let counters = &gossip.counters;
        for (what, reason, total) in [
            ("packet", "invalid", counters.packets_refused),
            ("record", "invalid", counters.records_refused),
            ("record", "stale", counters.records_stale),
            ("packet", "later-version", counters.packets_unsupported),
            ("document", "invalid", counters.documents_refused),
            ("strike", "invalid", counters.strikes_refused),
            ("stream", "invalid", gossip.streams_refused),
            ("any", "flood", gossip.flood),
            ("any", "busy", gossip.dropped),
        ] {
            let labels = RefusedLabels { what: what.into(), reason: reason.into() };
            catch_up(&shared.refused.get_or_create(&labels), total);
        }
        for (member, refused) in &gossip.of_members {
            for (what, total) in [
                ("forged", refused.forged),
                ("malformed", refused.malformed),
                ("stranger", refused.strangers),
                ("complaint", refused.complaints),
            ] {
                if total > 0 {
                    let labels = MemberLabels { member: member.clone(), what: what.into() };
                    catch_up(&shared.of_members.get_or_create(&labels), total);
                }
            }
        }
        catch_up(&shared.lost, counters.lost);
        catch_up(&shared.exchanges, counters.exchanges);
        shared.doubt.set(counters.doubt as i64);
        shared.backlog.set(counters.backlog as i64);
        shared.panicking.set(snapshot.panicking.len() as i64);
        let mut text = String::new();
        if encode(&mut text, &shared.registry.lock().unwrap_or_else(|e| e.into_inner())).is_err() {
            let _ = writeln!(text, "# encoding failed");
        }
        text
    }
}

fn catch_up(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_make_no_series() {
        let metrics = Metrics::new();
        for i in 0..2000u32 {
            let method = Method::from_bytes(format!("M{i}").as_bytes()).unwrap();
            let status = StatusCode::from_u16(600 + (i % 400) as u16).unwrap();
            metrics.client_call("orders", &method, status, Duration::ZERO);
        }
        metrics.client_call("late", &Method::GET, StatusCode::OK, Duration::ZERO);
        let series = metrics.0.series.lock().unwrap();
        assert_eq!(series["orders"].len(), 4, "one for each class of statuses");
        assert_eq!(series["late"].len(), 1, "and nobody is blind for what comes later");
    }
}
