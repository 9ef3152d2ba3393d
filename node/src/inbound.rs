//! Calls from other nodes to the services behind this one.

pub(crate) mod condition;
pub(crate) mod health;
pub(crate) mod limiter;
pub(crate) mod local;
mod peers;

use std::{
    collections::HashMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::{HeaderValue, Request, Response, StatusCode, Uri, request, uri};
use starling_http::{
    Body, Drain, Due, Guard, Guarded, Late, Problem, ProxyError, Source,
    h3::server,
    names,
    normal::{self, Origin, Tunnel, number},
    tunnel::NotSwitched,
};
use starling_protocol::{Name, NodeId, headers, service_of_host};

use crate::{
    Sent,
    call::Kind,
    config::ServiceConfig,
    identity::tls::Peer,
    inbound::{
        limiter::{Admitted, Figures},
        local::{LocalService, Place},
        peers::{Here, Peers},
    },
    observe::{
        caller_name,
        ledger::Page,
        observer::{Answered, Observer},
        packets::PacketCounts,
    },
    port::endpoint::{self, Windows},
};

/// Calls at once; beyond it they are refused at once, not queued.
const MAX_IN_FLIGHT: usize = 10_000;
/// The same of tunnels, which have places of their own.
const MAX_TUNNELS: usize = 32_768;

/// Serves the calls of other nodes, on one worker.
#[derive(Clone)]
pub(crate) struct Inbound(Arc<Services>);

struct Services {
    services: HashMap<Name, LocalService>,
    pseudonym: String,
    /// On all workers.
    in_flight: Arc<AtomicUsize>,
    /// The same.
    tunnels: Arc<AtomicUsize>,
    /// The same.
    peers: Arc<Peers>,
    observer: Observer,
    windows: Windows,
}

impl Inbound {
    pub(crate) fn new(
        services: &[ServiceConfig],
        pseudonym: String,
        observer: Observer,
        packets: &Arc<PacketCounts>,
        windows: Windows,
    ) -> Self {
        let services = services.iter().map(|s| (s.name.clone(), LocalService::new(s, packets.clone()))).collect();
        let (in_flight, tunnels, peers) = Default::default();
        Self(Arc::new(Services { services, pseudonym, in_flight, tunnels, peers, observer, windows }))
    }

    /// The same for another worker: with connections of its own to the services.
    pub(crate) fn for_another(&self, observer: Observer) -> Self {
        let Services { services, pseudonym, in_flight, tunnels, peers, windows, .. } = &*self.0;
        let services = services.iter().map(|(name, service)| (name.clone(), service.for_another())).collect();
        let (pseudonym, in_flight, tunnels, peers) =
            (pseudonym.clone(), in_flight.clone(), tunnels.clone(), peers.clone());
        Self(Arc::new(Services { services, pseudonym, in_flight, tunnels, peers, observer, windows: *windows }))
    }

    /// Calls in flight, without tunnels.
    pub(crate) fn in_flight(&self) -> usize {
        self.0.in_flight.load(Relaxed)
    }

    /// How many calls each service gets at a time, and how many were refused.
    pub(crate) fn limits(&self) -> Vec<(Name, Figures)> {
        let of = |(name, service): (&Name, &LocalService)| (name.clone(), service.calls().figures());
        let mut all: Vec<_> = self.0.services.iter().map(of).collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// Requests that were sent to services once more.
    pub(crate) fn repeats(&self) -> u64 {
        self.0.services.values().map(LocalService::repeated).sum()
    }

    /// Serves a connection of an authenticated peer.
    pub(crate) async fn serve(self, connection: quinn::Connection, peer: Peer, drain: Drain) {
        let ascii = |text: &str| HeaderValue::from_str(text).expect("names are ASCII");
        let services = peer.services.iter().map(Name::as_str).collect::<Vec<_>>().join(",");
        let services = (!services.is_empty()).then(|| ascii(&services));
        let page = self.0.observer.of_caller(&caller_name(&peer.services, &peer.name));
        let caller = Caller { id: peer.id, name: ascii(peer.name.as_str()), services };
        let origin = if peer.edge { Origin::Edge } else { Origin::Mesh };
        let connected = self.0.peers.connect(peer.id);
        let windows = self.0.windows.of_connection(connected.nth);
        endpoint::welcome_to_calls(&connection, windows);
        let limits =
            server::Limits { shelf: windows.shelf(), idle: None, order: windows.order(), peer: server::Peer::Node };
        let (here, quic, begun) = (connected.peer(), connection.clone(), drain.begun());
        let floor = self.0.windows.of_connection(usize::MAX);
        let mut serving = pin!(server::serve(connection, limits, drain, move |request| {
            let (inbound, caller, page, here) = (self.clone(), caller.clone(), page.clone(), here.clone());
            async move { inbound.answer(request, origin, caller, &page, here).await }
        }));
        tokio::select! {
            () = &mut serving => return,
            () = begun => {}
        }
        // Tunnels may go on for weeks on a connection that takes nothing new: those that came after it must not have less for that.
        drop(connected);
        endpoint::narrow(&quic, floor);
        serving.await;
    }

    async fn answer(
        &self,
        request: Request<Body>,
        origin: Origin,
        caller: Caller,
        page: &Arc<Page>,
        here: Arc<Here>,
    ) -> Response<Guarded<Answered<Served>>> {
        let mut counted = Counted::new(self.0.clone(), here);
        let (mut parts, body) = request.into_parts();
        let mut observed = self.0.observer.incoming(page, &parts.method, &mut parts.headers);
        observed.tell("starling.caller", || String::from_utf8_lossy(caller.name.as_bytes()).into_owned());
        let body = observed.counting(body);
        let outcome = match self.plan(parts, origin, caller, &counted.here) {
            Ok(plan) => {
                counted.is_for(plan.local);
                if plan.tunnel.is_some() {
                    counted.is_a_tunnel();
                }
                observed.is_for(plan.service.as_str());
                plan.carry_out(body).await
            }
            Err((service, problem)) => {
                if let Some(service) = service {
                    observed.is_for(service.as_str());
                }
                Err((Sent::No, problem))
            }
        };
        let mut response = match outcome {
            Ok(response) => response,
            Err((sent, problem)) => {
                // To a node, which decides by its status whether to try elsewhere: also where the caller behind it speaks gRPC.
                let mut response = problem.into_response(&self.0.pseudonym, false).map(Guarded::from);
                let sent = if sent == Sent::No { "no" } else { "maybe" };
                response.headers_mut().insert(names::SENT.clone(), HeaderValue::from_static(sent));
                response
            }
        };
        if response.extensions_mut().remove::<NotSwitched>().is_some() {
            response.headers_mut().insert(names::NOT_SWITCHED.clone(), HeaderValue::from_static("1"));
        }
        if let Some(others) = counted.others() {
            response.headers_mut().insert(names::LOAD.clone(), names::numeral(others as u64));
        }
        observed.answered(response.map(|body| body.map_guard(|place| Served { _counted: counted, place })))
    }

    /// Decides everything about a call before anything of it is sent. A refusal names the service, if it is one of ours.
    fn plan(
        &self,
        mut parts: request::Parts,
        origin: Origin,
        caller: Caller,
        here: &Here,
    ) -> Result<Plan<'_>, (Option<&Name>, Problem)> {
        let checked = normal::normalise_request(&mut parts, origin).map_err(|malformed| (None, malformed.into()))?;
        let host = checked.host();
        let Some((service, local)) = service_of_host(host).and_then(|s| self.0.services.get_key_value(&s)) else {
            let detail = format!("this node does not serve {host}");
            return Err((None, Problem::proxy(StatusCode::NOT_FOUND, ProxyError::DestinationNotFound, detail)));
        };
        let is_full = match checked.tunnel {
            None => self.in_flight() > MAX_IN_FLIGHT || here.in_flight.load(Relaxed) > peers::MAX_IN_FLIGHT,
            Some(_) => self.0.tunnels.load(Relaxed) >= MAX_TUNNELS || here.tunnels.load(Relaxed) >= peers::MAX_TUNNELS,
        };
        if is_full {
            let status = StatusCode::SERVICE_UNAVAILABLE;
            let what = if checked.tunnel.is_some() { "too many tunnels are open" } else { "too many calls in flight" };
            let problem = Problem::proxy(status, ProxyError::DestinationUnavailable, what);
            return Err((Some(service), problem.retry_after(Duration::from_secs(1))));
        }
        let (takes, kind) = (local.kind(), Kind::of_request(checked.tunnel));
        if takes != kind {
            let detail = format!("{service} takes {takes}, not {kind}: {}", takes.advice());
            let problem = Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, detail);
            return Err((Some(service), problem));
        }
        let told = number(&parts.headers, headers::DEADLINE).map(Duration::from_millis);
        let head = [told, local.limits().timeout].into_iter().flatten().min();
        if head.is_some_and(|head| head.is_zero()) {
            return Err((Some(service), too_late(Duration::ZERO)));
        }
        let (limiter, what) = match checked.tunnel {
            Some(_) => (local.tunnels(), "tunnels as it may have"),
            None => (local.calls(), "calls as it answers in time"),
        };
        let admitted = limiter.admit(caller.id, Instant::now()).ok_or_else(|| {
            let (status, detail) = (StatusCode::SERVICE_UNAVAILABLE, format!("{service} has as many {what}"));
            let problem = Problem::proxy(status, ProxyError::DestinationUnavailable, detail);
            (Some(service), problem.retry_after(Duration::from_secs(1)))
        })?;
        // What the local service reads: who called, and nothing else of ours.
        parts.headers.remove(&names::DEADLINE);
        parts.headers.remove(&names::ATTEMPT);
        parts.headers.insert(names::CALLER.clone(), caller.name);
        parts.headers.remove(&names::CALLER_SERVICES);
        if let Some(services) = caller.services {
            parts.headers.insert(names::CALLER_SERVICES.clone(), services);
        }
        // An edge says what its client asked for: redirects and absolute links of the service stay right with that.
        let told = parts.headers.remove(&names::HOST);
        let bad_target = |_| (Some(service), normal::Malformed::bad_target().into());
        let authority = match told {
            Some(host) => uri::Authority::try_from(host.as_bytes()).map_err(bad_target)?,
            None => checked.authority,
        };
        let mut target = uri::Parts::default();
        target.path_and_query =
            Some(parts.uri.path_and_query().cloned().unwrap_or(uri::PathAndQuery::from_static("/")));
        (target.scheme, target.authority) = (Some(uri::Scheme::HTTP), Some(authority));
        parts.uri = Uri::from_parts(target).map_err(|_| (Some(service), normal::Malformed::bad_target().into()))?;
        Ok(Plan { service, local, parts, length: checked.length, tunnel: checked.tunnel, head, admitted })
    }
}

/// Who calls, by its certificate, as the service is told.
#[derive(Clone)]
struct Caller {
    id: NodeId,
    name: HeaderValue,
    services: Option<HeaderValue>,
}

/// A call that may go to the service.
struct Plan<'a> {
    service: &'a Name,
    local: &'a LocalService,
    parts: request::Parts,
    /// Of the body, if the head promises one.
    length: Option<u64>,
    tunnel: Option<Tunnel>,
    /// Until the head of the answer.
    head: Option<Duration>,
    /// Until then, too; of a tunnel, as long as it is open.
    admitted: Admitted,
}

impl Plan<'_> {
    async fn carry_out(self, body: Body) -> Result<Response<Guarded<Place>>, (Sent, Problem)> {
        let Self { local, parts, length, tunnel, head, admitted, .. } = self;
        let method = parts.method.clone();
        let body = body.with_length(length);
        // Nothing is sent twice from here, but what has no body.
        let source = (!http_body::Body::is_end_stream(&body)).then(|| Source::once(body));
        let body = source.as_ref().map_or_else(Body::empty, Source::attempt);
        let until = local.limits().total_timeout.map(|total| Instant::now() + total);
        // What goes into a tunnel is no upload that must come first.
        let due =
            Due::new(head, until, source.as_ref().filter(|_| tunnel.is_none())).or_idle(local.limits().idle_timeout);
        let request = Request::from_parts(parts, body);
        let mut admitted = admitted;
        if source.is_some() {
            admitted.excuse();
        }
        // A call waits for its answer; a tunnel begins with it.
        let (waiting, opening) = if tunnel.is_none() { (Some(admitted), None) } else { (None, Some(admitted)) };
        let sent = async {
            match opening {
                Some(admitted) => local.open(request, admitted).await,
                None => local.send(request).await,
            }
        };
        let outcome = tokio::select! {
            biased;
            answered = sent => answered.map_err(|error| {
                if source.as_ref().is_some_and(Source::is_broken) {
                    let (status, detail) = (StatusCode::BAD_REQUEST, "the request body broke off");
                    return (error.sent, Problem::proxy(status, ProxyError::HttpRequestError, detail));
                }
                (error.sent, error.problem)
            }),
            late = due.passed() => Err((Sent::Maybe, match late {
                Late::Answer => too_late(due.limit()),
                Late::Upload => {
                    let detail = "the rest of the request does not come";
                    Problem::proxy(StatusCode::REQUEST_TIMEOUT, ProxyError::HttpRequestError, detail)
                }
            })),
        };
        let has_answered = match &outcome {
            Ok(_) => true,
            Err((_, problem)) => problem.status == StatusCode::GATEWAY_TIMEOUT,
        };
        if let Some(waiting) = waiting.filter(|_| has_answered) {
            match &source {
                None => waiting.answered(None, Instant::now()),
                Some(source) if source.has_ended() => waiting.answered(Some(source.moved()), Instant::now()),
                // How long it took is the caller's doing.
                Some(_) => {}
            }
        }
        let response = outcome?;
        let (mut head, body) = response.into_parts();
        let length =
            normal::normalise_response(&mut head, &method, Origin::Outside).map_err(|m| (Sent::Maybe, m.into()))?;
        // Packets do not move their stream; whoever opened it ends it.
        let idle = local.limits().idle_timeout.filter(|_| tunnel != Some(Tunnel::Udp));
        let body = body.with_length(length).with_pace(idle, until, source.as_ref());
        Ok(Response::from_parts(head, body))
    }
}

fn too_late(timeout: Duration) -> Problem {
    let detail = format!("no answer within {} ms", timeout.as_millis());
    Problem::proxy(StatusCode::GATEWAY_TIMEOUT, ProxyError::HttpResponseTimeout, detail)
}

/// What the body of an answer keeps: the count of its call, and its place at the service.
struct Served {
    _counted: Counted,
    place: Option<Place>,
}

impl Guard for Served {
    fn ended(&mut self) {
        self.place.ended();
    }
}

/// A call under way: at the node, of its peer, and at its service, once that is known.
struct Counted {
    all: Arc<Services>,
    here: Arc<Here>,
    service: Option<LocalService>,
    is_tunnel: bool,
}

impl Counted {
    fn new(all: Arc<Services>, here: Arc<Here>) -> Self {
        all.in_flight.fetch_add(1, Relaxed);
        here.in_flight.fetch_add(1, Relaxed);
        Self { all, here, service: None, is_tunnel: false }
    }

    fn is_for(&mut self, service: &LocalService) {
        service.in_flight().fetch_add(1, Relaxed);
        self.service = Some(service.clone());
    }

    /// It takes a place of another kind.
    fn is_a_tunnel(&mut self) {
        for (calls, tunnels) in self.counts() {
            calls.fetch_sub(1, Relaxed);
            tunnels.fetch_add(1, Relaxed);
        }
        self.is_tunnel = true;
        if let Some(service) = self.service.take_if(|service| service.kind() == Kind::Http) {
            // Where there are calls, a tunnel is none of them.
            service.in_flight().fetch_sub(1, Relaxed);
        }
    }

    fn counts(&self) -> [(&AtomicUsize, &AtomicUsize); 2] {
        [(&self.all.in_flight, &self.all.tunnels), (&self.here.in_flight, &self.here.tunnels)]
    }

    /// How many others there are, of the service, if it counts there: a busy neighbour is not its fault.
    fn others(&self) -> Option<usize> {
        self.service.as_ref().map(|service| service.in_flight().load(Relaxed).saturating_sub(1))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        for (calls, tunnels) in self.counts() {
            let count = if self.is_tunnel { tunnels } else { calls };
            count.fetch_sub(1, Relaxed);
        }
        if let Some(service) = &self.service {
            service.in_flight().fetch_sub(1, Relaxed);
        }
    }
}
