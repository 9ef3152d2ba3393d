//! What a node can tell in figures, read at one moment.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
};

use starling_gossip::{Counters, MemberView, Refused, Snapshot};
use starling_protocol::Name;

use super::{
    distribution::Distribution,
    ledger::{Account, Ledger, Page},
    observer::Observer,
    otlp::ExportCounts,
    packets::PacketCounts,
    trace::Tracer,
};
use crate::{
    call::{Calls, Repeats},
    inbound::limiter::Figures,
};

/// One figure, or the same of several things. Names are OpenTelemetry's, or formed like these.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) unit: Unit,
    pub(crate) points: Vec<Point>,
}

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A number of things.
    Things,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
}

/// A figure that goes up and down, of several things, which an edge adds to what its node tells.
#[derive(Debug)]
pub struct Levels {
    /// As OpenTelemetry names such figures.
    pub name: &'static str,
    /// What it is.
    pub help: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// By labels.
    pub points: Vec<(Vec<(&'static str, String)>, i64)>,
}

impl From<Levels> for Reading {
    fn from(Levels { name, help, unit, points }: Levels) -> Self {
        let points = points.into_iter().map(|(labels, level)| Point { labels, value: Figure::Level(level) });
        Self { name, help, unit, points: points.collect() }
    }
}

#[derive(Debug)]
pub(crate) struct Point {
    pub(crate) labels: Vec<(&'static str, String)>,
    pub(crate) value: Figure,
}

#[derive(Debug)]
pub(crate) enum Figure {
    /// Only grows, since the start.
    Total(u64),
    /// Goes up and down.
    Level(i64),
    Times(Distribution),
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

/// What the node itself has to say.
pub(crate) struct OfNode<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) calls: &'a Calls,
    /// Requests sent to services once more.
    pub(crate) repeats: u64,
    /// How many calls each service behind this node gets.
    pub(crate) limits: Vec<(Name, Figures)>,
    pub(crate) gossip: &'a GossipFigures,
    /// Seconds until the certificate ends.
    pub(crate) cert_left: i64,
    /// Whether the last reload was taken.
    pub(crate) reloaded: bool,
}

/// What all workers note of calls.
pub(crate) struct Books {
    tracer: Tracer,
    /// Under which name this node's calls are counted.
    own: String,
    of_workers: Mutex<Vec<(Arc<Page>, Arc<Ledger>)>>,
    workers: usize,
    export: Arc<ExportCounts>,
    packets: Arc<PacketCounts>,
}

impl Books {
    /// Of so many workers.
    pub(crate) fn new(own: String, workers: usize, tracer: Tracer, export: Arc<ExportCounts>) -> Self {
        Self { tracer, own, of_workers: Mutex::default(), workers, export, packets: Arc::default() }
    }

    /// Notes the calls of one more worker.
    pub(crate) fn observer(&self) -> Observer {
        let (sent, served) = (Arc::new(Page::new(0)), Arc::new(Ledger::of_one(self.workers)));
        self.of_workers.lock().unwrap_or_else(|e| e.into_inner()).push((sent.clone(), served.clone()));
        Observer { sent, served, tracer: self.tracer.clone() }
    }

    /// Where UDP packets are counted.
    pub(crate) fn packets(&self) -> &Arc<PacketCounts> {
        &self.packets
    }

    /// Everything, with what all workers have noted added up.
    pub(crate) fn read(&self, node: &OfNode<'_>) -> Vec<Reading> {
        let mut readings = self.of_calls();
        readings.extend(of_node(node));
        let ExportCounts { exported, failed } = &*self.export;
        let spans = [
            ("exported", exported.load(Relaxed)),
            ("dropped", self.tracer.dropped()),
            ("failed", failed.load(Relaxed)),
        ];
        readings.push(Reading {
            name: "starling.spans",
            help: "Spans by what became of them: dropped had no room to wait, failed were not taken by the collector",
            unit: Unit::Things,
            points: totals("outcome", spans),
        });
        readings.push(Reading {
            name: "starling.udp.packets",
            help: "UDP packets: sent into the mesh as datagrams or, too large for that, on the stream; delivered out of it; dropped",
            unit: Unit::Things,
            points: totals("outcome", self.packets.read()),
        });
        readings
    }

    fn of_calls(&self) -> Vec<Reading> {
        let workers = self.of_workers.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let (mut sent, mut served): (Accounts, Accounts) = Default::default();
        for (own, others) in workers {
            own.read(|service, account| add(&mut sent, &self.own, service, account));
            others.read(|caller, service, account| add(&mut served, caller, service, account));
        }
        let heads = |accounts: &Accounts, with_caller: bool| {
            let mut points = Vec::new();
            for ((caller, service), account) in accounts {
                for answers in &account.heads {
                    let mut labels = labels(with_caller.then_some(caller), service);
                    labels.push(("http.request.method", answers.method.to_string()));
                    labels.push(("http.response.status_code", answers.status.to_string()));
                    points.push(Point { labels, value: Figure::Times(answers.times.clone()) });
                }
            }
            points
        };
        let of_both = |figures: fn(&Account) -> Vec<OfKind>| {
            let mut points = Vec::new();
            for (side, accounts) in [("client", &sent), ("server", &served)] {
                for ((caller, service), account) in accounts {
                    for (kind, value) in figures(account) {
                        let mut labels = labels(Some(caller), service);
                        labels.push(("side", side.into()));
                        labels.extend(kind.map(|(label, kind)| (label, kind.to_string())));
                        points.push(Point { labels, value });
                    }
                }
            }
            points
        };
        vec![
            Reading {
                name: "http.server.request.duration",
                help: "Calls served for other nodes, to the head of the answer",
                unit: Unit::Seconds,
                points: heads(&served, true),
            },
            Reading {
                name: "http.client.request.duration",
                help: "Calls made into the mesh, to the head of the answer",
                unit: Unit::Seconds,
                points: heads(&sent, false),
            },
            Reading {
                name: "starling.call.duration",
                help: "Calls to the end of the answer, or until it broke off",
                unit: Unit::Seconds,
                points: of_both(|account| vec![(None, Figure::Times(account.whole.clone()))]),
            },
            Reading {
                name: "starling.call.size",
                help: "Bytes of bodies",
                unit: Unit::Bytes,
                points: of_both(|account| {
                    let of = |what, bytes| (Some(("of", what)), Figure::Total(bytes));
                    vec![of("request", account.request_bytes), of("response", account.response_bytes)]
                }),
            },
            Reading {
                name: "starling.attempts",
                help: "Attempts at calls into the mesh, the first of each included",
                unit: Unit::Things,
                points: (sent.iter())
                    .map(|((_, service), account)| Point {
                        labels: labels(None, service),
                        value: Figure::Total(account.attempts),
                    })
                    .collect(),
            },
            Reading {
                name: "starling.calls.broken",
                help: "Calls that had no whole answer: cut, or abandoned by the caller before there was any",
                unit: Unit::Things,
                points: of_both(|account| {
                    let of = |why, calls| (Some(("why", why)), Figure::Total(calls));
                    vec![of("cut", account.cut), of("abandoned", account.abandoned)]
                }),
            },
        ]
    }
}

/// A figure, and which of several kinds it is of, by a label.
type OfKind = (Option<(&'static str, &'static str)>, Figure);

/// By caller and service, in order, so that a reading is always in the same.
type Accounts = BTreeMap<(String, String), Account>;

fn add(accounts: &mut Accounts, caller: &str, service: &str, account: &Account) {
    accounts.entry((caller.to_string(), service.to_string())).or_default().merge(account);
}

fn labels(caller: Option<&String>, service: &str) -> Vec<(&'static str, String)> {
    let caller = caller.map(|caller| ("caller", caller.clone()));
    caller.into_iter().chain([("service", service.to_string())]).collect()
}

fn totals<const N: usize>(label: &'static str, of: [(&'static str, u64); N]) -> Vec<Point> {
    of.map(|(value, total)| Point { labels: vec![(label, value.into())], value: Figure::Total(total) }).into()
}

/// Counts, by kind where there are several.
type CountsByKind = Vec<(Option<&'static str>, u64)>;

fn repeats_of(calls: &Calls, figures: fn(&Repeats) -> CountsByKind) -> Vec<Point> {
    let of_service = |(service, repeats): (Name, Repeats)| {
        let point = move |(kind, total): (Option<&'static str>, u64)| {
            let mut labels = labels(None, service.as_str());
            labels.extend(kind.map(|kind| ("kind", kind.to_string())));
            Point { labels, value: Figure::Total(total) }
        };
        figures(&repeats).into_iter().map(point).collect::<Vec<_>>()
    };
    calls.repeats().into_iter().flat_map(of_service).collect()
}

fn of_limits(limits: &[(Name, Figures)], value: fn(&Figures) -> Figure) -> Vec<Point> {
    let of_service =
        |(service, figures): &(Name, Figures)| Point { labels: labels(None, service.as_str()), value: value(figures) };
    limits.iter().map(of_service).collect()
}

fn of_node(node: &OfNode<'_>) -> Vec<Reading> {
    let OfNode { snapshot, calls, repeats, limits, gossip, cert_left, reloaded } = node;
    let alone = |value| vec![Point { labels: Vec::new(), value }];
    let things = |name, help, points| Reading { name, help, unit: Unit::Things, points };
    let of_status = |status: &'static str| {
        let has_it = |m: &&MemberView| crate::admin::status_of(m).to_string() == status && !snapshot.is_superseded(m);
        let count = snapshot.members.iter().filter(has_it).count();
        Point { labels: vec![("status", status.into())], value: Figure::Level(count as i64) }
    };
    let counters = &gossip.counters;
    let refused = [
        ("packet", "invalid", counters.packets_refused),
        ("record", "invalid", counters.records_refused),
        ("record", "stale", counters.records_stale),
        ("packet", "later-version", counters.packets_unsupported),
        ("document", "invalid", counters.documents_refused),
        ("strike", "invalid", counters.strikes_refused),
        ("stream", "invalid", gossip.streams_refused),
        ("any", "flood", gossip.flood),
        ("any", "busy", gossip.dropped),
    ];
    let refused = refused.map(|(what, reason, total)| Point {
        labels: vec![("what", what.into()), ("reason", reason.into())],
        value: Figure::Total(total),
    });
    let of_member = |(member, refused): &(String, Refused)| {
        let of = [
            ("forged", refused.forged),
            ("malformed", refused.malformed),
            ("stranger", refused.strangers),
            ("complaint", refused.complaints),
        ];
        let point = |(what, total): (&str, u64)| Point {
            labels: vec![("member", member.clone()), ("what", what.into())],
            value: Figure::Total(total),
        };
        of.into_iter().filter(|(_, total)| *total > 0).map(point).collect::<Vec<_>>()
    };
    let starling_http::TakenBack { stalled, cleared } = starling_http::taken_back();
    vec![
        things("starling.members", "Members by status", ["alive", "suspect", "down", "left"].map(of_status).into()),
        Reading {
            name: "starling.cert_expiry",
            help: "Seconds until the certificate ends",
            unit: Unit::Seconds,
            points: alone(Figure::Level(*cert_left)),
        },
        things(
            "starling.calls_in_flight",
            "Calls into the mesh that have no complete answer",
            alone(Figure::Level(calls.in_flight() as i64)),
        ),
        things(
            "starling.retries",
            "Attempts beyond a call's first: after a failure, or, hedged, before one",
            repeats_of(calls, |repeats| vec![(Some("retry"), repeats.retries), (Some("hedge"), repeats.hedges)]),
        ),
        things(
            "starling.retries_denied",
            "Retries and hedges that were not made, because their service's budget was spent",
            repeats_of(calls, |repeats| vec![(None, repeats.denied)]),
        ),
        things(
            "starling.shed",
            "Calls that were refused at once, because the service had as many as it answers in time",
            of_limits(limits, |figures| Figure::Total(figures.shed)),
        ),
        things(
            "starling.concurrency_limit",
            "Calls that a service gets at a time",
            of_limits(limits, |figures| Figure::Level(figures.limit as i64)),
        ),
        things(
            "starling.service_repeats",
            "Requests sent to a service once more, because a kept connection was closed",
            alone(Figure::Total(*repeats)),
        ),
        things(
            "starling.bodies_ended",
            "Bodies that were ended because nobody took them, or to make room for others",
            totals("why", [("stalled", stalled), ("room", cleared)]),
        ),
        things("starling.gossip_refused", "Gossip refused or dropped, by what and why", refused.into()),
        things(
            "starling.gossip_refused_of_member",
            "Things of a member that were refused: of one that lies, or has a bad link",
            gossip.of_members.iter().flat_map(of_member).collect(),
        ),
        things(
            "starling.gossip_lost",
            "Times that the mesh declared this node dead",
            alone(Figure::Total(counters.lost)),
        ),
        things("starling.gossip_exchanges", "Exchanges of state begun", alone(Figure::Total(counters.exchanges))),
        things(
            "starling.gossip_doubt",
            "Doubt of this node's own judgement, 0 to 8",
            alone(Figure::Level(counters.doubt as i64)),
        ),
        things(
            "starling.gossip_backlog",
            "Updates that wait to be passed on",
            alone(Figure::Level(counters.backlog as i64)),
        ),
        things(
            "starling.panicking_services",
            "Services most of whose instances vanished at once",
            alone(Figure::Level(snapshot.panicking.len() as i64)),
        ),
        things(
            "starling.config_reload_success",
            "Whether the last reload was taken",
            alone(Figure::Level(i64::from(*reloaded))),
        ),
    ]
}
