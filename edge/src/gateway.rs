//! What happens to a public request, in order: normalise, route, authenticate, limit, pick the version, call. One code for
//! HTTP/1.1, 2 and 3; each step takes the proof that the one before it made.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use starling_http::{
    Body, Guard, Guarded, Problem, ProxyError,
    accept::{Place, Sources},
    is_grpc,
    normal::{self, Origin, Tunnel, number},
};
use starling_node::{Answered, Call, Carried, Fault, MadeByNode, MeshClient, Observed, Observer, Worker, trace};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    access_log::{AccessLog, Entry},
    caller::Caller,
    certificates::Certificates,
    client_certificate::Presented,
    config::{Maintenance, Network, Preflight, Route},
    cors,
    dress::Dress,
    forward::{self, Decision},
    grpc_web::Page,
    handshakes::Handshakes,
    hops::Hops,
    key_file::KeyFile,
    limits::{Limit, Limiter, Outcome, Tally},
    policy::{self, Aim, Policy},
    room::Seat,
    route::{self, Query, Sought},
    rules::Rules,
    strain::{self, Lag, Memory},
    transform::{
        coding::Wish,
        fields::{Edits, without_trailers},
        size::{self, Size},
    },
    version,
};

/// The protocol that a request came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PublicProtocol {
    Http1,
    Http2,
    Http3,
}

impl PublicProtocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http/1.1",
            Self::Http2 => "h2",
            Self::Http3 => "h3",
        }
    }
}

/// The connection that a request came by.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) client: SocketAddr,
    pub(crate) protocol: PublicProtocol,
    pub(crate) sni: Option<String>,
    /// What the client has shown.
    pub(crate) certificate: Option<Presented>,
}

/// Proof that the caller is within its limit, and the fields that say so.
struct Admitted {
    fields: HeaderMap,
}

/// Answers public requests, on one worker. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Gateway {
    pub(crate) standing: Arc<Standing>,
    /// Of its worker.
    pub(crate) client: MeshClient,
    /// Of its worker.
    pub(crate) observer: Observer,
    /// Of its worker.
    lag: Arc<Lag>,
}

pub(crate) struct Standing {
    pub(crate) rules: Arc<Rules>,
    pub(crate) keys: Arc<KeyFile>,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) log: AccessLog,
    pub(crate) alt_svc: Option<HeaderValue>,
    /// What callers have used of their quotas.
    pub(crate) tally: Arc<Tally>,
    /// Of addresses that send tokens which do not verify.
    pub(crate) failures: Limiter,
    /// Whose tokens wait until their issuer is asked for its keys.
    pub(crate) looking: Sources,
    /// Whose requests wait until a service has decided about them.
    pub(crate) deciding: Sources,
    /// Who has WebSockets, and other tunnels.
    pub(crate) tunnels: Sources,
    pub(crate) memory: Arc<Memory>,
    pub(crate) handshakes: Handshakes,
}

/// What a request leaves beside its answer, whatever becomes of it.
#[derive(Default)]
struct Aside {
    /// Fields of the answer.
    fields: HeaderMap,
    /// What the route changes about the fields of answers.
    edits: Option<Arc<Edits>>,
    /// What a tunnel takes.
    place: Option<Place>,
    /// What the request takes of its route's.
    room: Option<Seat>,
    /// Whether the answer is a service's that decides, and not that of the one behind.
    is_refused: bool,
}

/// Tunnels at a time, and of one address, over all workers: an HTTP/2 connection alone could have a hundred of them.
const MAX_TUNNELS: usize = 10_000;
const MAX_TUNNELS_OF_ONE: usize = MAX_TUNNELS / 4;

impl Gateway {
    pub(crate) fn on(worker: &Worker, lag: Arc<Lag>, standing: Arc<Standing>) -> Self {
        Self { standing, client: worker.client().clone(), observer: worker.observer().clone(), lag }
    }

    /// Whether a client may begin one more handshake. What it does with an address that is not proven yet does not count against whoever
    /// has it.
    pub(crate) fn lets_in(&self, from: IpAddr, is_proven: bool) -> bool {
        !self.standing.memory.is_out() && self.standing.handshakes.takes(from, is_proven)
    }

    /// Answers a request, whatever is wrong with it.
    pub(crate) async fn answer(
        &self,
        request: Request<Body>,
        arrival: &Arrival,
    ) -> Response<Guarded<Answered<Logged>>> {
        let page = Page::of(request.headers());
        // To whoever asks for a tunnel, 200 is consent.
        let grpc = (page.is_some() || is_grpc(request.headers())) && *request.method() != Method::CONNECT;
        let method = request.method().clone();
        let (mut parts, body) = request.into_parts();
        let mut observed = self.observer.outgoing(&method, &mut parts.headers, trace::Origin::Public);
        let request = Request::from_parts(parts, observed.counting(body));
        let begun = observed.begun();
        let policy = Arc::clone(&self.standing.rules.policy());
        let Hops { client, request_id: told_id } =
            Hops::of(arrival.client.ip(), request.headers(), &policy.trusted_hops, policy.trusted_field);
        let mut entry = Entry {
            time: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            request_id: told_id.unwrap_or_else(request_id),
            trace_id: observed.context().trace_id(),
            client: client.to_string(),
            protocol: arrival.protocol.as_str(),
            method: method.to_string(),
            path: request.uri().path().to_string(),
            ..Entry::default()
        };
        let mut aside = Aside::default();
        let passed = self.pass(request, (arrival, client), &policy, &mut entry, &mut aside, &mut observed).await;
        let is_refused = passed.is_err() || aside.is_refused;
        let mut response = match passed {
            Ok(response) => response,
            Err(problem) => {
                entry.error = Some(problem.detail.clone());
                let (mut head, body) = problem.into_response("starling-edge", grpc).into_parts();
                let body = match page {
                    Some(page) => page.leave(&mut head.headers, body),
                    None => body,
                };
                Response::from_parts(head, Guarded::from(body))
            }
        };
        let Aside { fields, place, room, edits, .. } = aside;
        for (name, value) in &fields {
            // The service may vary and link by itself; the rest is ours to say.
            if matches!(*name, header::VARY | header::LINK) {
                response.headers_mut().append(name, value.clone());
            } else {
                response.headers_mut().insert(name, value.clone());
            }
        }
        if let Some(edits) = edits {
            edits.apply(response.headers_mut());
            if is_refused {
                // What is said of the service's answers to caches is not meant for this one.
                response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
                response.headers_mut().remove(header::EXPIRES);
            }
        }
        if let Some(hsts) = &policy.hsts {
            response.headers_mut().insert(header::STRICT_TRANSPORT_SECURITY, hsts.clone());
        }
        // The service's own would lead past us.
        response.headers_mut().remove(header::ALT_SVC);
        if let Some(alt_svc) = self.standing.alt_svc.clone().filter(|_| arrival.protocol != PublicProtocol::Http3) {
            response.headers_mut().insert(header::ALT_SVC, alt_svc);
        }
        if let Ok(id) = HeaderValue::from_str(&entry.request_id) {
            response.headers_mut().insert("x-request-id", id);
        }
        entry.status = response.status().as_u16();
        entry.cut = !http_body::Body::is_end_stream(response.body()) && method != Method::HEAD;
        observed.tell("starling.request_id", || entry.request_id.clone());
        let log = self.standing.log.clone();
        let log = |carried| Logged { entry: Some(entry), begun, log, carried, _place: place, _room: room };
        observed.answered(response.map(|body| body.map_guard(log)))
    }

    /// The steps.
    async fn pass(
        &self,
        request: Request<Body>,
        (arrival, from): (&Arrival, IpAddr),
        policy: &Policy,
        entry: &mut Entry,
        Aside { fields: extra, place, room, edits, is_refused }: &mut Aside,
        observed: &mut Observed,
    ) -> Result<Response<Guarded<Carried>>, Problem> {
        strain::admit(&self.standing.memory, &self.lag)?;
        let (mut parts, body) = request.into_parts();
        if parts.headers.keys().any(|name| name.as_str().contains('_')) {
            // Servers that read `_` as `-` would take such a field for one that we set.
            return Err(bad_request("underscores in field names are not accepted"));
        }
        let checked = normal::normalise_request(&mut parts, Origin::Outside)?;
        if matches!(checked.tunnel, Some(Tunnel::Bytes | Tunnel::Udp)) {
            let (status, detail) = (StatusCode::NOT_IMPLEMENTED, "tunnels lead nowhere from here");
            return Err(Problem::proxy(status, ProxyError::HttpRequestError, detail));
        }
        let host = &route::bare_host(checked.authority.as_str());
        entry.host.clone_from(host);
        if arrival.sni.as_deref().is_some_and(|sni| !self.standing.certificates.covers(sni, host)) {
            let detail = "this connection is not for that host; open another one";
            return Err(Problem::policy(StatusCode::MISDIRECTED_REQUEST, "misdirected", detail));
        }
        if let Some(meant) = not_quite_a_method(&parts.method) {
            let detail = format!("{} is no method: {meant} is", parts.method);
            return Err(Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, detail));
        }
        let (method, query) = (policy::matched(&parts.method, &parts.headers), Query::new(parts.uri.query()));
        let sought = Sought { host, method: &method, headers: &parts.headers, query: &query };
        for name in policy.varies_by(&sought, parts.uri.path()) {
            extra.append(header::VARY, name.into());
        }
        let aim = policy.aim(&sought, parts.uri.path())?;
        let location = aim.location(parts.uri.query());
        let Aim { route, path, picker, named } = aim;
        if let Some(service) = &route.service {
            entry.service = Some(service.to_string());
            observed.is_for(service.as_str());
        }
        observed.tell("http.route", || route.path.clone());

        *edits = Some(route.response_headers.clone()).filter(|edits| !edits.is_empty());
        // Also of a refusal, which a page cannot see otherwise.
        if let Some(cors) = &route.cors {
            for (name, value) in &cors.fields(&parts.headers) {
                // Beside what else answers vary by.
                match *name == header::VARY {
                    true => extra.append(name, value.clone()),
                    false => extra.insert(name, value.clone()).is_some(),
                };
            }
        }
        let is_listed = |networks: &[Network]| networks.iter().any(|network| network.contains(from));
        if is_listed(&route.deny) || !route.allow.is_empty() && !is_listed(&route.allow) {
            let detail = "callers from this address may not use this route";
            return Err(Problem::policy(StatusCode::FORBIDDEN, "address-denied", detail));
        }

        let is_preflight = cors::is_preflight(&parts.method, &parts.headers);
        if let Some(cors) = route.cors.as_ref().filter(|_| is_preflight) {
            let mut answer = Response::new(Guarded::from(Body::empty()));
            *answer.status_mut() = StatusCode::NO_CONTENT;
            if extra.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN) {
                answer.headers_mut().extend(cors.preflight(&parts.headers));
            }
            return Ok(answer);
        }
        if let Some(Maintenance { retry_after, detail }) = &route.maintenance {
            let problem = Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "maintenance", detail.clone());
            return Err(match retry_after {
                Some(after) => problem.retry_after(*after),
                None => problem,
            });
        }
        let mut caller = match is_preflight && route.preflight == Preflight::Pass {
            true => Caller::nobody(),
            false => self.standing.authenticate(policy, route, &parts.headers, arrival, from).await?,
        };
        if let Some(forward) = route.forward.as_ref().filter(|_| !is_preflight || route.preflight != Preflight::Pass) {
            entry.consumer.clone_from(&caller.consumer);
            let written = parts.uri.path();
            // What the service gets, but for a version and a prefix: nobody else's reading of the path counts.
            let seen = match route.raw_path {
                true => written.into(),
                false => route::canonical_path(written).unwrap_or(written.into()),
            };
            let target = parts.uri.query().map_or(seen.to_string(), |query| format!("{seen}?{query}"));
            let authority = checked.authority.as_str();
            let asked = forward::Asked { parts: &parts, route, target: &target, authority, from };
            match self.decide(forward, &asked, &caller, &entry.request_id).await? {
                Decision::Passes { consumer, told } => {
                    caller.consumer = consumer.or(caller.consumer);
                    caller.told.extend(told);
                }
                Decision::Refused(answer) => {
                    entry.error = Some(format!("{} does not let it pass", forward.service));
                    *is_refused = true;
                    let (mut head, body) = answer.into_parts();
                    if route.cors.is_some() {
                        cors::remove(&mut head.headers);
                    }
                    let body = match Page::of(&parts.headers).filter(|_| route.grpc_web) {
                        Some(page) => body.map_body(|body| page.leave(&mut head.headers, body)),
                        None => body,
                    };
                    return Ok(Response::from_parts(head, body));
                }
            }
        }
        entry.consumer.clone_from(&caller.consumer);
        if let Some(Size(most)) = route.max_request_size
            && checked.length.is_some_and(|length| length > most)
        {
            return Err(too_large(most));
        }
        // Whoever finds no room is not charged for it.
        let seat = route.enter(|| caller.key(from))?;
        let admitted = limit(policy, route, &caller, from, &self.standing.tally).await?;
        extra.extend(admitted.fields);
        *room = seat;
        if let Some((status, to)) = location {
            let mut answer = Response::new(Guarded::from(Body::empty()));
            *answer.status_mut() = status;
            let to = HeaderValue::try_from(to).map_err(|_| bad_request("the request target is not a path"))?;
            answer.headers_mut().insert(header::LOCATION, to);
            return Ok(answer);
        }
        let Some(service) = route.service.clone() else {
            let detail = "no route leads there";
            return Err(Problem::proxy(StatusCode::NOT_FOUND, ProxyError::DestinationNotFound, detail));
        };
        if checked.tunnel.is_some() {
            let free = self.standing.tunnels.enter(from, MAX_TUNNELS_OF_ONE);
            *place = free.filter(|_| self.standing.tunnels.total() <= MAX_TUNNELS);
            if place.is_none() {
                let detail = "this address has as many connections open as it may";
                let problem = Problem::policy(StatusCode::TOO_MANY_REQUESTS, "too-many-tunnels", detail);
                return Err(problem.retry_after(Duration::from_secs(10)));
            }
        }
        let version = match picker {
            None => None,
            Some(picker) => {
                let asked = version::Asked {
                    named: named.as_ref().map(|(name, _)| name.as_str()),
                    path: &path,
                    service: &service,
                    query: parts.uri.query(),
                    headers: &parts.headers,
                    caller: &|| caller.key(from),
                    now: SystemTime::now(),
                };
                let picked = picker.pick(&asked)?;
                for (name, value) in picked.headers {
                    extra.append(name, value);
                }
                Some(picked.version)
            }
        };
        entry.version.clone_from(&version);

        let page = Page::of(&parts.headers).filter(|_| route.grpc_web);
        let body = body.with_length(checked.length);
        let body = without_trailers(body, route.told_headers());
        let (body, over) = match route.max_request_size {
            // What goes into a tunnel is no request.
            Some(Size(most)) if checked.tunnel.is_none() => {
                let (body, over) = size::limited(body, most);
                (body, Some((over, most)))
            }
            _ => (body, None),
        };
        let body = match page {
            Some(page) => {
                // Its answer has no trailers, whatever it comes by.
                parts.version = Version::HTTP_2;
                page.enter(&mut parts.headers, body)
            }
            None => body,
        };
        let wish = (route.compress && checked.tunnel.is_none()).then(|| Wish::of(&parts.method, &parts.headers));
        let (consumer, authority) = (caller.consumer.as_deref(), checked.authority.as_str());
        let dress = Dress { path: &path, route, consumer, told: &caller.told, client: from, authority };
        dress.put_on(&mut parts, &entry.request_id)?;
        route.request_headers.apply(&mut parts.headers);
        let limits = route.limits().of(&parts.headers);
        let request = Request::from_parts(parts, body);
        let call = Call { service, version, request, limits, repeats: route.repeats() };
        let mut response = self.client.call(call, observed).await.map_err(|error| {
            entry.error = Some(error.to_string());
            if let Some((_, most)) = over.filter(|(over, _)| over.load(Relaxed)) {
                return too_large(most);
            }
            let detail = public_detail(error.status, error.fault);
            Problem { detail: detail.into(), ..Problem::from(error) }
        })?;
        if response.extensions().get::<MadeByNode>().is_none() {
            if let Some(cost) = cost_of(route, response.headers_mut())
                && let Some(limit) = plan_of(policy, route, &caller)
            {
                extra.extend(limit.charge(&caller.key(from), cost, &self.standing.tally));
            }
            if route.cors.is_some() {
                // Which pages may call is the route's to say, where it says so.
                cors::remove(response.headers_mut());
            }
            let (mut head, body) = response.into_parts();
            let body = match route.max_response_size.filter(|_| checked.tunnel.is_none()) {
                Some(Size(most))
                    if number::<u64>(&head.headers, "content-length").is_some_and(|length| length > most) =>
                {
                    entry.error = Some(format!("the service's answer has more than {most} bytes"));
                    let detail = "the service's answer is larger than it may be";
                    return Err(Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::HttpResponseBodySize, detail));
                }
                Some(Size(most)) => body.map_body(|body| size::limited(body, most).0),
                None => body,
            };
            let body = match page {
                Some(page) => body.map_body(|body| page.leave(&mut head.headers, body)),
                None => body,
            };
            let body = match wish {
                Some(wish) => body.map_body(|body| wish.grant(&mut head, body)),
                None => body,
            };
            return Ok(Response::from_parts(head, body));
        }
        // What a node says in place of its service is for the mesh.
        entry.error = response.headers().get("proxy-status").and_then(|v| v.to_str().ok()).map(str::to_owned);
        let status = response.status();
        let kind = match status {
            StatusCode::GATEWAY_TIMEOUT => ProxyError::HttpResponseTimeout,
            StatusCode::SERVICE_UNAVAILABLE => ProxyError::DestinationUnavailable,
            StatusCode::NOT_FOUND => ProxyError::DestinationNotFound,
            status if status.is_client_error() => ProxyError::HttpRequestError,
            _ => ProxyError::ConnectionTerminated,
        };
        let mut problem = Problem::proxy(status, kind, public_detail(status, Fault::Service));
        if let Some(after) = response.headers().get(header::RETRY_AFTER) {
            problem = problem.with_header(header::RETRY_AFTER, after.clone());
        }
        Err(problem)
    }
}

/// What limits a caller on a route.
fn plan_of<'a>(policy: &'a Policy, route: &Route, caller: &Caller) -> Option<&'a Arc<Limit>> {
    let name = caller.plan.as_ref().filter(|name| policy.plans.contains_key(*name)).or(route.plan.as_ref());
    policy.plans.get(name?)
}

/// What a call has cost besides what was taken for it, by its service's word, which is for us alone.
fn cost_of(route: &Route, fields: &mut HeaderMap) -> Option<u32> {
    let said = fields.remove(route.cost_from.as_ref()?)?;
    let cost = said.to_str().ok()?.trim().parse::<u32>().ok()?.saturating_sub(route.cost.get());
    Some(cost).filter(|cost| *cost > 0)
}

async fn limit(
    policy: &Policy,
    route: &Route,
    caller: &Caller,
    client: IpAddr,
    tally: &Arc<Tally>,
) -> Result<Admitted, Problem> {
    let Some(limit) = plan_of(policy, route, caller) else {
        return Ok(Admitted { fields: HeaderMap::new() });
    };
    let Outcome { unknown, violated, retry_after, fields } =
        limit.take(&caller.key(client), route.cost.get(), tally).await;
    if unknown && !limit.plan.shadow {
        let detail = "what is left of the quota cannot be told now";
        let problem = Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "quota-unknown", detail);
        return Err(problem.retry_after(Duration::from_secs(1)));
    }
    if violated.is_empty() || limit.plan.shadow {
        return Ok(Admitted { fields });
    }
    let detail = format!("over what plan {} lets a caller do", limit.plan.name);
    let mut problem = Problem::policy(StatusCode::TOO_MANY_REQUESTS, "quota-exceeded", detail);
    problem.headers.extend(fields);
    Err(problem.with_member("violated-policies", violated).retry_after(retry_after))
}

/// The standard method that a service would take another spelling for; routes would not.
fn not_quite_a_method(method: &Method) -> Option<Method> {
    let upper = method.as_str().to_ascii_uppercase();
    let meant = if upper == method.as_str() { None } else { upper.parse::<Method>().ok() };
    let standard = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::OPTIONS,
        Method::PATCH,
        Method::TRACE,
        Method::CONNECT,
    ];
    meant.filter(|meant| standard.contains(meant))
}

fn too_large(most: u64) -> Problem {
    let detail = format!("the route takes requests of {most} bytes at most");
    Problem::policy(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
}

fn bad_request(detail: &'static str) -> Problem {
    Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, detail)
}

/// What the internet may know of a fault inside: neither names nor addresses of nodes.
fn public_detail(status: StatusCode, fault: Fault) -> &'static str {
    match (status.as_u16(), fault) {
        (404, _) => "the service is not known",
        (503, _) => "the service is not available now",
        (504, _) => "the service did not answer in time",
        (508, _) => "the request goes round in circles",
        (431, _) => "the header fields are too large",
        (408, _) => "the rest of the request does not come",
        (_, Fault::Caller) => "the request broke off",
        _ => "the service broke off",
    }
}

/// Sortable by time, unguessable: UUIDv7 (RFC 9562 §5.7).
fn request_id() -> String {
    let ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    let random: u128 = rand::random();
    let id =
        (u128::from(ms) << 80) | (0x7 << 76) | (random & (0xfff << 64)) | (0b10 << 62) | (random & ((1 << 62) - 1));
    let hex = format!("{id:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Writes the entry when the whole answer is out, or given up.
pub(crate) struct Logged {
    entry: Option<Entry>,
    begun: Instant,
    log: AccessLog,
    carried: Option<Carried>,
    _place: Option<Place>,
    _room: Option<Seat>,
}

impl Guard for Logged {
    fn ended(&mut self) {
        self.carried.ended();
        if let Some(entry) = &mut self.entry {
            entry.cut = false;
        }
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        if let Some(mut entry) = self.entry.take() {
            entry.duration_ms = (self.begun.elapsed().as_secs_f64() * 1e6).round() / 1e3;
            self.log.write(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_uuids_of_version_7() {
        let (a, b) = (request_id(), request_id());
        assert_ne!(a, b);
        assert_eq!((a.len(), &a[14..15]), (36, "7"));
        assert!(matches!(&a[19..20], "8" | "9" | "a" | "b"), "{a}");
    }
}
