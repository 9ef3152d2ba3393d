//! A running edge: a node, its public listeners, and what a reload replaces.

use std::{net::Ipv4Addr, num::NonZeroU32, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};
use starling_http::{accept::Sources, shared_port::UdpGroup};
use starling_node::{
    Documents, ExtraAnswer, ExtraRoutes, Levels, Node, Place, StartError, StateDir, Unit, config::Config, memory,
    rfc3339, unix_now,
};
use starling_protocol::{
    Name, NodeKind,
    admin::{self, CertificateState},
};

use crate::{
    access_log::AccessLog,
    acme::{Acme, Challenges, Store},
    caller::caller_key,
    certificates::{Certificates, Shown},
    config::{EdgeSections, Network, Rate, read_config},
    gateway::{Gateway, Standing},
    handshakes::{self, Handshakes},
    key_file::{KeyError, KeyFile},
    limits::{Answerer, Counter, Limiter, Members, Tally},
    listener,
    policy::shown,
    rules::Rules,
    strain::{Lag, Memory},
    tls::Tls,
    watch::{self, Seen},
};

/// Tokens that do not verify, which an address may send at once, and each second in the long run.
const FAILURES_AT_ONCE: NonZeroU32 = NonZeroU32::new(50).unwrap();
const FAILURES_PER_SECOND: NonZeroU32 = NonZeroU32::new(2).unwrap();

/// The mesh document of what edges have in common.
pub const DOCUMENT: &str = "edge";
/// Pause between two looks at what nodes announce.
const FOLLOW: Duration = Duration::from_millis(50);
/// How long the documents that were kept may take to be read.
const LOOKED: Duration = Duration::from_secs(5);
/// Longest such pause.
const FORGET: Duration = Duration::from_secs(5);

/// Why an edge does not start.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// Its node.
    #[error(transparent)]
    Node(#[from] StartError),
    /// Its keys.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Its certificates or policy.
    #[error("{0}")]
    Config(String),
}

/// A running edge.
pub struct Edge {
    node: Node,
    /// Of its workers.
    public: Vec<quinn::Endpoint>,
    counter: Arc<Counter>,
}

impl Edge {
    /// Starts a node and its public listeners. `path` is where the configuration is read again on a reload. For `place` see
    /// [`Node::start`].
    pub async fn start(
        config: &Config,
        sections: EdgeSections,
        path: PathBuf,
        place: &mut Place,
    ) -> Result<Self, EdgeError> {
        let provider = starling_node::crypto_provider();
        let keys_path = config.node.state.clone().ok_or(StartError::NoState)?.join(KeyFile::NAME);
        let seen = Seen::now(&path, &keys_path);
        // Everything that can be wrong with files or ports is found out before a join token is spent.
        let state = StateDir::open(config.node.state.clone().ok_or(StartError::NoState)?).map_err(StartError::from)?;
        let (store, challenges) = (Store::new(state.clone()), Challenges::default());
        let certificates =
            Certificates::load(&sections.certificate, store.clone(), challenges.clone(), provider.clone());
        let certificates = Arc::new(certificates.map_err(EdgeError::Config)?);
        let rules = Arc::new(Rules::new(sections.clone(), state.clone()).map_err(EdgeError::Config)?);
        let listen = sections.edge.listen;
        let workers = config.node.workers;
        let ports = place.ports();
        // Where ports cannot be shared there is one socket of each kind; the node says so of its own.
        let UdpGroup { sockets, .. } =
            ports.quic(listen, 0, workers).map_err(|e| StartError::bind("the public port (UDP)", listen, e))?;
        let endpoints = sockets.len();
        let bound = sockets[0].local_addr().map_err(|e| StartError::bind("the public port (UDP)", listen, e))?;
        let owners: Vec<_> = (0..).take(endpoints).map(|index| ports.owned_by(index)).collect();
        let tcp = ports.tcp(bound, endpoints).map_err(|e| StartError::bind("the public port (TCP)", bound, e))?;
        let redirect = match sections.edge.redirect {
            Some(addr) => ports.tcp(addr, 1).map_err(|e| StartError::bind("the redirect port", addr, e))?.pop(),
            None => None,
        };
        let tls = {
            let policy = rules.policy();
            let asked = policy.client_subjects();
            Tls::new(provider, certificates.clone(), listener::transport(), asked).map_err(EdgeError::Config)?
        };
        let tls = Arc::new(tls);

        let node = Node::start(config, NodeKind::Edge, place).await?;
        let keys = Arc::new(KeyFile::open(state.clone())?);
        let issuing = sections.certificate.clone();
        let acme =
            Acme::new(store, challenges.clone(), node.fleet(), certificates.clone(), redirect.is_some(), issuing);
        let acme = Arc::new(acme);
        node.while_in_charge(acme.clone().run());
        let counter = Counter::new(state.path().join("quota.redb"));
        // What was published holds before anybody comes.
        {
            let (rules, counter) = (rules.clone(), counter.clone());
            node.documents().follow(document(), move |content| {
                rules.publish(content)?;
                if rules.policy().has_quotas() {
                    counter.begin(false);
                }
                Ok(())
            });
            let keys = keys.clone();
            node.documents().follow(KeyFile::DOCUMENT.parse().expect("a name"), move |content| keys.publish(content));
            let _ = tokio::time::timeout(LOOKED, node.documents().looked_at()).await;
        }
        if rules.policy().has_quotas() {
            // The process before has the file until this one is in charge.
            let (counter, waits) = (counter.clone(), place.predecessor().is_none());
            let _ = tokio::task::spawn_blocking(move || counter.begin(waits)).await;
        }
        // The next one gets it when it is.
        let counted = Counted(counter.clone());
        node.while_in_charge(async move {
            let _until_then = counted;
            std::future::pending::<()>().await;
        });
        let fleet = node.fleet();
        let members = Members::new(fleet.clone());
        members.count_in(members.store(sections.quota_store.as_ref()).map_err(EdgeError::Config)?);
        let tally = Tally::new(counter.clone(), Arc::new(members.clone()));
        fleet.answer_with(Arc::new(Answerer(tally.clone())));
        node.while_in_charge(tally.clone().run());
        let alt_svc_port = sections.edge.alt_svc_port.unwrap_or(bound.port());
        let memory = Arc::new(Memory::default());
        let shared = Arc::new(Standing {
            rules: rules.clone(),
            keys,
            certificates,
            log: AccessLog::start().map_err(|e| EdgeError::Config(format!("the access log: {e}")))?,
            alt_svc: match sections.edge.alt_svc {
                true => HeaderValue::from_str(&format!("h3=\":{alt_svc_port}\"; ma=86400")).ok(),
                false => None,
            },
            tally,
            tunnels: Sources::default(),
            memory: memory.clone(),
            handshakes: Handshakes::new(sections.edge.handshakes.unwrap_or(handshakes::USUAL)),
            looking: Sources::default(),
            deciding: Sources::default(),
            failures: Limiter::new(
                Rate { count: FAILURES_PER_SECOND, window: Duration::from_secs(1) },
                FAILURES_AT_ONCE,
            ),
        });
        {
            let rules = rules.clone();
            tokio::spawn(memory.watch(move || rules.policy().memory.or_else(memory::allowed)));
        }
        let lags: Vec<_> = node.workers().iter().map(|_| Arc::new(Lag::default())).collect();
        for (worker, lag) in node.workers().iter().zip(&lags) {
            worker.runtime().spawn(lag.clone().watch(worker.number()));
        }
        node.set_admin_routes(Arc::new(Routes {
            standing: shared.clone(),
            acme: acme.clone(),
            counter: counter.clone(),
            members: members.clone(),
            lags: lags.clone(),
        }));

        let mut announcements = node.announcements();
        rules.announce(announcements.now());
        tokio::spawn(async move {
            // Also without a change: what is gone is forgotten some time.
            while tokio::time::timeout(FORGET, announcements.changed()).await.unwrap_or(true) {
                // In a large mesh something changes all the time.
                tokio::time::sleep(FOLLOW).await;
                rules.announce(announcements.now());
            }
        });
        let reload = Reload {
            path,
            shared: shared.clone(),
            acme,
            counter: counter.clone(),
            tls: tls.clone(),
            members: members.clone(),
            documents: node.documents().clone(),
        };
        let path = reload.path.clone();
        node.set_reload(move || reload.all());
        watch::spawn(node.reloader(), path, keys_path, seen);

        let drain = node.drain_signal().clone();
        let carriers: Arc<[Network]> = sections.edge.proxy_protocol.clone().into();
        let places = listener::places(&carriers);
        let shelves: Vec<_> = node.workers().iter().map(|_| listener::shelf(node.workers().len())).collect();
        let mut public = Vec::new();
        let served = || node.workers().iter().zip(&lags).zip(&shelves);
        for ((((worker, lag), shelf), socket), owner) in served().zip(sockets).zip(owners) {
            let _runtime = worker.runtime().enter();
            let endpoint = listener::quic_endpoint(socket, owner, &tls)
                .map_err(|e| StartError::bind("the public port (UDP)", bound, e))?;
            let gateway = Gateway::on(worker, lag.clone(), shared.clone());
            let (shelf, drain) = (shelf.clone(), drain.clone());
            worker.runtime().spawn(listener::serve_quic(endpoint.clone(), endpoints, gateway, shelf, drain));
            public.push(endpoint);
        }
        for (((worker, lag), shelf), tcp) in served().cycle().zip(tcp) {
            let gateway = Gateway::on(worker, lag.clone(), shared.clone());
            let (tls, places, shelf, drain) = (tls.clone(), places.clone(), shelf.clone(), drain.clone());
            let carriers = carriers.clone();
            worker.runtime().spawn(async move {
                match tokio::net::TcpListener::from_std(tcp) {
                    Ok(tcp) => listener::serve_tcp(tcp, places, carriers, tls, gateway, shelf, drain).await,
                    Err(error) => tracing::error!(%error, "the public port"),
                }
            });
        }
        if let (Some(redirect), Some(worker)) = (redirect, node.workers().first()) {
            worker.runtime().spawn(async move {
                match tokio::net::TcpListener::from_std(redirect) {
                    Ok(redirect) => listener::serve_redirect(redirect, carriers, challenges, alt_svc_port, drain).await,
                    Err(error) => tracing::error!(%error, "the redirect port"),
                }
            });
        }
        Ok(Self { node, public, counter })
    }

    /// Its node.
    pub fn node(&self) -> &Node {
        &self.node
    }
}

/// Lets go of the counts on disk when it is dropped.
struct Counted(Arc<Counter>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.counter.close();
        self.public.iter().for_each(|endpoint| endpoint.close(0u32.into(), b""));
    }
}

/// What a signal, a file change or the admin API does.
struct Reload {
    path: PathBuf,
    shared: Arc<Standing>,
    acme: Arc<Acme>,
    counter: Arc<Counter>,
    tls: Arc<Tls>,
    members: Members,
    documents: Documents,
}

impl Reload {
    /// Parses, checks, then swaps. On any error everything stays as it was.
    fn all(&self) -> Result<(), String> {
        // Keys first: a revoked key is revoked whatever is wrong with the file.
        self.shared.keys.reload().map_err(|e| e.to_string())?;
        let text =
            std::fs::read_to_string(&self.path).map_err(|e| format!("cannot read {}: {e}", self.path.display()))?;
        let (config, problems) = read_config(&text);
        let Some((_, sections)) = config else {
            // What is revoked is revoked as well; what is wrong with that is among the problems.
            let _ = self.shared.rules.reload_authorities();
            let lines = problems.iter().map(|p| format!("line {}: {}", p.line, p.problem));
            return Err(lines.collect::<Vec<_>>().join("; "));
        };
        let certificates = sections.certificate.clone();
        let store = self.members.store(sections.quota_store.as_ref())?;
        let reloaded = self.shared.rules.reload(sections, || self.shared.certificates.reload(&certificates));
        if reloaded.is_err() {
            let _ = self.shared.rules.reload_authorities();
            return reloaded;
        }
        self.members.count_in(store);
        let policy = self.shared.rules.policy();
        self.tls.ask_for(policy.client_subjects())?;
        if policy.has_quotas() {
            self.counter.begin(false);
        }
        self.acme.want(&certificates);
        // It may have been refused for what this file did not have.
        self.documents.read_again(&document());
        Ok(())
    }
}

/// An edge's part of the admin API.
struct Routes {
    standing: Arc<Standing>,
    acme: Arc<Acme>,
    counter: Arc<Counter>,
    members: Members,
    /// Of the workers.
    lags: Vec<Arc<Lag>>,
}

impl ExtraRoutes for Routes {
    fn readings(&self) -> Vec<Levels> {
        let (now, certificates) = (unix_now(), self.standing.certificates.shown());
        let policy = self.standing.rules.policy();
        let (looks, alone) = (policy.looks(), |level| (Vec::new(), level));
        let store_silent = self.members.has_store().then(|| self.standing.tally.store_is_silent());
        let revoked_until = policy.client_authorities.as_ref().and_then(|authorities| authorities.current_until());
        let of = |shown: &Shown| vec![("hosts", shown.hosts.join(","))];
        let left = |shown: &Shown| Some((of(shown), shown.until? as i64 - now as i64));
        let failures = |shown: &Shown| Some((of(shown), self.acme.shown(shown.id.as_ref()?)?.failures.into()));
        vec![
            Levels {
                name: "starling.public_cert_expiry",
                help: "Seconds until a certificate ends that clients are shown",
                unit: Unit::Seconds,
                points: certificates.iter().filter_map(left).collect(),
            },
            Levels {
                name: "starling.public_cert_failures",
                help: "Tries to have a certificate issued that failed, one after the other",
                unit: Unit::Things,
                points: certificates.iter().filter_map(failures).collect(),
            },
            Levels {
                name: "starling.edge_refuses",
                help: "Whether new requests are refused because memory is short; workers that are behind, and refuse them",
                unit: Unit::Things,
                points: vec![
                    (vec![("short_of", "memory".into())], self.standing.memory.is_short().into()),
                    (vec![("short_of", "time".into())], self.lags.iter().filter(|lag| lag.is_behind()).count() as i64),
                ],
            },
            Levels {
                name: "starling.quota_unsaved",
                help: "Callers whose counts of quotas are not on disk yet",
                unit: Unit::Things,
                points: vec![alone(self.counter.unsaved() as i64)],
            },
            Levels {
                name: "starling.quota_edges_silent",
                help: "Edges that are alive and do not say what they have counted of quotas",
                unit: Unit::Things,
                points: vec![alone(self.standing.tally.silent() as i64)],
            },
            Levels {
                name: "starling.quota_store_silent",
                help: "Whether the store of quotas does not answer",
                unit: Unit::Things,
                points: store_silent.map(|silent| alone(silent.into())).into_iter().collect(),
            },
            Levels {
                name: "starling.client_crl_expiry",
                help: "Seconds until the next list of revoked client certificates is to be there",
                unit: Unit::Seconds,
                points: revoked_until.map(|until| alone(until as i64 - now as i64)).into_iter().collect(),
            },
            Levels {
                name: "starling.jwks_age",
                help: "Seconds since the issuer has told its keys",
                unit: Unit::Seconds,
                points: looks.iter().filter(|l| l.told_at > 0).map(|l| alone(now as i64 - l.told_at as i64)).collect(),
            },
            Levels {
                name: "starling.jwks_failures",
                help: "Times that the issuer did not tell its keys, one after the other",
                unit: Unit::Things,
                points: looks.iter().map(|looks| alone(looks.failures.into())).collect(),
            },
        ]
    }

    fn answer<'a>(&'a self, method: &'a Method, path: &'a str, body: &'a Bytes) -> ExtraAnswer<'a> {
        Box::pin(self.answered(method, path, body))
    }
}

impl Routes {
    async fn answered(&self, method: &Method, path: &str, body: &Bytes) -> Option<(StatusCode, serde_json::Value)> {
        let json = |status, value: serde_json::Result<serde_json::Value>| (status, value.unwrap_or_default());
        let refuse = |status, error: String| json(status, serde_json::to_value(admin::Error { error }));
        let failed = |error: KeyError| match error {
            KeyError::Invalid(why) => refuse(StatusCode::UNPROCESSABLE_ENTITY, why),
            KeyError::State(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        };
        let keys = &self.standing.keys;
        Some(match (method.as_str(), path) {
            ("GET", "/v1/routes") => {
                let policy = self.standing.rules.policy();
                let routes: Vec<admin::Route> =
                    policy.shown().map(|(route, versions)| shown(route, &versions)).collect();
                json(StatusCode::OK, serde_json::to_value(routes))
            }
            ("POST", "/v1/explain") => match serde_json::from_slice(body) {
                Ok(asked) => match self.standing.rules.policy().explain(&asked) {
                    Ok(told) => json(StatusCode::OK, serde_json::to_value(told)),
                    Err(error) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error),
                },
                Err(error) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
            },
            ("POST", "/v1/quotas/show") => match serde_json::from_slice(body) {
                Ok(of) => match key_of(&of) {
                    Some(key) => json(StatusCode::OK, serde_json::to_value(self.quotas(&key).await)),
                    None => refuse(StatusCode::UNPROCESSABLE_ENTITY, NO_CALLER.into()),
                },
                Err(error) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
            },
            ("POST", "/v1/quotas/reset") => match serde_json::from_slice(body) {
                Ok(of) => match key_of(&of) {
                    Some(key) => {
                        self.reset_quotas(&key).await;
                        json(StatusCode::OK, Ok(serde_json::json!({"reset": true})))
                    }
                    None => refuse(StatusCode::UNPROCESSABLE_ENTITY, NO_CALLER.into()),
                },
                Err(error) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
            },
            ("GET", "/v1/certificates") => json(StatusCode::OK, serde_json::to_value(self.certificates())),
            ("POST", "/v1/certificates/renew") => match serde_json::from_slice(body) {
                Ok(admin::RenewCertificate { host }) if self.acme.hurry(&host.to_ascii_lowercase()) => {
                    json(StatusCode::ACCEPTED, Ok(serde_json::json!({"renewing": true})))
                }
                Ok(_) => {
                    let why = "no certificate that an authority issues is for that host, or it is not looked after yet; see `starling certificates`";
                    refuse(StatusCode::NOT_FOUND, why.into())
                }
                Err(error) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
            },
            ("GET", "/v1/keys") => json(StatusCode::OK, serde_json::to_value(keys.list())),
            ("POST", "/v1/keys") => match serde_json::from_slice(body) {
                Ok(new) => match keys.create(new) {
                    Ok(key) => json(StatusCode::CREATED, serde_json::to_value(key)),
                    Err(error) => failed(error),
                },
                Err(error) => refuse(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
            },
            ("DELETE", _) if path.starts_with("/v1/keys/") => match keys.revoke(&path["/v1/keys/".len()..]) {
                Ok(true) => json(StatusCode::OK, Ok(serde_json::json!({"revoked": true}))),
                Ok(false) => refuse(StatusCode::NOT_FOUND, "no key has that id; see `starling keys list`".into()),
                Err(error) => failed(error),
            },
            _ => return None,
        })
    }
}

impl Routes {
    /// How it stands with all quotas that a caller may have, as far as edges answer.
    async fn quotas(&self, caller: &str) -> Vec<admin::QuotaUse> {
        let (policy, tally) = (Arc::clone(&self.standing.rules.policy()), &self.standing.tally);
        tally.learn(&policy.plans().flat_map(|limit| limit.keys(caller)).collect::<Vec<_>>()).await;
        policy.plans().flat_map(|limit| limit.shown(caller, tally)).collect()
    }

    async fn reset_quotas(&self, caller: &str) {
        let policy = Arc::clone(&self.standing.rules.policy());
        self.standing.tally.reset(&policy.plans().flat_map(|limit| limit.keys(caller)).collect::<Vec<_>>()).await;
    }

    fn certificates(&self) -> Vec<admin::Certificate> {
        let now = unix_now();
        let shown = self.standing.certificates.shown().into_iter();
        let certificate = |shown: Shown| admin::Certificate {
            state: match shown.until {
                _ if shown.stands_in => CertificateState::StandIn,
                Some(until) if until <= now => CertificateState::Ended,
                _ => CertificateState::Valid,
            },
            until: shown.until.map(rfc3339),
            issuance: shown.id.and_then(|id| self.acme.shown(&id)),
            hosts: shown.hosts,
        };
        shown.map(certificate).collect()
    }
}

fn document() -> Name {
    DOCUMENT.parse().expect("a name")
}

const NO_CALLER: &str = "name a consumer, or an address";

/// What an operator calls a caller, as limits do.
fn key_of(of: &admin::QuotaOf) -> Option<String> {
    match (&of.consumer, of.address) {
        (Some(consumer), None) => Some(caller_key(Some(consumer), Ipv4Addr::UNSPECIFIED.into())),
        (None, Some(address)) => Some(caller_key(None, address)),
        _ => None,
    }
}
