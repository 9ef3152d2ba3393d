//! What happens to a public request, in order: normalise, route, authenticate, limit, pick the version, call. One code for
//! HTTP/1.1, 2 and 3; each step takes the proof that the one before it made.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use starling_http::{
    Body, Guard, Guarded, Problem, ProxyError,
    accept::{self, Place, Sources},
    is_grpc,
    normal::{self, Origin, Tunnel, number},
};
use starling_node::{Answered, Call, Carried, Fault, MadeByNode, MeshClient, Observed, Observer, Worker, trace};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    access_log::{AccessLog, Entry},
    api_key,
    certificates::Certificates,
    config::{AuthMethod, Maintenance, Network, Preflight, Route},
    cors,
    dress::Dress,
    grpc_web::Page,
    hops::Hops,
    jwt::{self, JwtError},
    key_file::KeyFile,
    limits::{Limiter, Outcome, Tally},
    policy::{self, Aim, Policy},
    room::Seat,
    route::{self, Query, Sought},
    rules::Rules,
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
}

/// Proof that the caller may use the route.
struct Caller {
    /// Who; `None` on a public route.
    consumer: Option<String>,
    plan: Option<String>,
    /// What its token says, for the service.
    told: Vec<(HeaderName, HeaderValue)>,
}

impl Caller {
    /// Anybody.
    fn nobody() -> Self {
        Self { consumer: None, plan: None, told: Vec::new() }
    }
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
    /// Who has WebSockets, and other tunnels.
    pub(crate) tunnels: Sources,
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
}

/// Tunnels at a time, and of one address, over all workers: an HTTP/2 connection alone could have a hundred of them.
const MAX_TUNNELS: usize = 10_000;
const MAX_TUNNELS_OF_ONE: usize = MAX_TUNNELS / 4;
/// Tokens of one address that wait for an issuer.
const MAX_LOOKING_OF_ONE: usize = 64;

impl Gateway {
    pub(crate) fn on(worker: &Worker, standing: Arc<Standing>) -> Self {
        Self { standing, client: worker.client().clone(), observer: worker.observer().clone() }
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
        let is_refused = passed.is_err();
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
        let Aside { fields, place, room, edits } = aside;
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
        Aside { fields: extra, place, room, edits }: &mut Aside,
        observed: &mut Observed,
    ) -> Result<Response<Guarded<Carried>>, Problem> {
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
        let Aim { route, path, picker, named } = policy.aim(&sought, parts.uri.path())?;
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
        let caller = match is_preflight && route.preflight == Preflight::Pass {
            true => Caller::nobody(),
            false => self.authenticate(policy, route, &parts.headers, from).await?,
        };
        entry.consumer.clone_from(&caller.consumer);
        if let Some(Size(most)) = route.max_request_size
            && checked.length.is_some_and(|length| length > most)
        {
            return Err(too_large(most));
        }
        // Whoever finds no room is not charged for it.
        let seat = route.enter(|| caller_key(caller.consumer.as_deref(), from))?;
        let admitted = limit(policy, route, &caller, from, &self.standing.tally).await?;
        extra.extend(admitted.fields);
        *room = seat;
        if let Some((status, to)) = route.location(&path, parts.uri.query()) {
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
                    named: named.as_deref(),
                    path: &path,
                    service: &service,
                    query: parts.uri.query(),
                    headers: &parts.headers,
                    caller: &|| caller_key(caller.consumer.as_deref(), from),
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
        let body = without_trailers(body, route.claim_headers.iter().map(|(name, _)| name));
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

    async fn authenticate(
        &self,
        policy: &Policy,
        route: &Route,
        fields: &HeaderMap,
        client: IpAddr,
    ) -> Result<Caller, Problem> {
        if route.auth.is_empty() {
            return Ok(Caller::nobody());
        }
        let mut reason = "credentials are needed".to_string();
        let mut challenge = HeaderValue::from_static("Bearer");
        for method in &route.auth {
            match method {
                AuthMethod::ApiKey => match api_key::presented(fields) {
                    Ok(Some(key)) => match self.standing.keys.verify(key) {
                        Some(key) => {
                            let consumer = Some(key.consumer.to_string());
                            return Ok(Caller { consumer, plan: key.plan, told: Vec::new() });
                        }
                        None => reason = "the API key is not valid".into(),
                    },
                    Ok(None) => {}
                    Err(why) => reason = why.into(),
                },
                AuthMethod::Jwt => match (&policy.jwt, jwt::bearer(fields)) {
                    (_, Err(why)) => reason = why.into(),
                    (Some(verifier), Ok(Some(token))) if !api_key::is_api_key(token) => {
                        match self.verify(verifier, token, client).await? {
                            Ok(claims) => return permitted(route, claims),
                            Err(error) => {
                                reason = error.to_string();
                                challenge = error.challenge();
                            }
                        }
                    }
                    _ => {}
                },
            }
        }
        Err(Problem::policy(StatusCode::UNAUTHORIZED, "unauthorized", reason)
            .with_header(header::WWW_AUTHENTICATE, challenge))
    }
}

impl Gateway {
    /// Verifies a token, unless too many from that address were bad: each costs a signature's check. Those that were good
    /// before cost none, and stay good. Waits for the issuer if it may have a new key.
    async fn verify(
        &self,
        verifier: &jwt::Verifier,
        token: &str,
        client: IpAddr,
    ) -> Result<Result<jwt::Claims, JwtError>, Problem> {
        if let Some(claims) = verifier.remembered(token) {
            return Ok(Ok(claims));
        }
        let (address, now) = (address_key(client), Instant::now());
        if let Some(after) = self.standing.failures.spent(&address, now) {
            let detail = "too many tokens that are not valid came from this address";
            let problem = Problem::policy(StatusCode::TOO_MANY_REQUESTS, "too-many-failures", detail);
            return Err(problem.retry_after(after));
        }
        let mut verified = verifier.verify(token);
        if let Err(error) = verified
            && verifier.may_be_of_a_new_key(token, error)
        {
            let Some(_place) = self.standing.looking.enter(client, MAX_LOOKING_OF_ONE) else {
                let detail = "too many tokens from this address wait for the issuer's keys";
                let problem = Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "no-keys", detail);
                return Err(problem.retry_after(Duration::from_secs(1)));
            };
            if let Some(again) = verifier.verify_again(token).await {
                verified = again;
            }
        }
        if verified == Err(JwtError::UnknownKey) && verifier.keys().current().is_empty() {
            let detail = "the issuer has not told its keys yet";
            let problem = Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "no-keys", detail);
            return Err(problem.retry_after(Duration::from_secs(5)));
        }
        if verified.is_err() {
            self.standing.failures.take(&address, 1, Instant::now());
        }
        Ok(verified)
    }
}

/// Whether a token lets its bearer use the route (RFC 6750 §3.1).
fn permitted(route: &Route, claims: jwt::Claims) -> Result<Caller, Problem> {
    let forbidden = |detail: String, challenge: String| {
        let problem = Problem::policy(StatusCode::FORBIDDEN, "forbidden", detail);
        match HeaderValue::try_from(challenge) {
            Ok(challenge) => problem.with_header(header::WWW_AUTHENTICATE, challenge),
            Err(_) => problem,
        }
    };
    if let Some(scope) = claims.lacks(&route.scopes) {
        let challenge = format!("Bearer error=\"insufficient_scope\", scope=\"{}\"", route.scopes.join(" "));
        return Err(forbidden(format!("the token lacks the scope {scope}"), challenge));
    }
    if let Some((claim, _)) = route.claims.iter().find(|(claim, values)| !claims.has(claim, &values.0)) {
        let challenge = "Bearer error=\"insufficient_scope\"".to_owned();
        return Err(forbidden(format!("the token's claim {claim} is not one that may do this"), challenge));
    }
    let told = route.claim_headers.iter().filter_map(|(name, claim)| Some((name.clone(), claims.field(claim)?)));
    Ok(Caller { told: told.collect(), consumer: Some(claims.consumer), plan: None })
}

async fn limit(
    policy: &Policy,
    route: &Route,
    caller: &Caller,
    client: IpAddr,
    tally: &Arc<Tally>,
) -> Result<Admitted, Problem> {
    let name = caller.plan.as_ref().filter(|name| policy.plans.contains_key(*name)).or(route.plan.as_ref());
    let Some(limit) = name.and_then(|name| policy.plans.get(name)) else {
        return Ok(Admitted { fields: HeaderMap::new() });
    };
    let Outcome { violated, retry_after, fields } =
        limit.take(&caller_key(caller.consumer.as_deref(), client), route.cost.get(), tally).await;
    if violated.is_empty() || limit.plan.shadow {
        return Ok(Admitted { fields });
    }
    let detail = format!("over what plan {} lets a caller do", limit.plan.name);
    let mut problem = Problem::policy(StatusCode::TOO_MANY_REQUESTS, "quota-exceeded", detail);
    problem.headers.extend(fields);
    Err(problem.with_member("violated-policies", violated).retry_after(retry_after))
}

/// Who a caller is to a limit: told apart, so that nobody can be named like an address.
pub(crate) fn caller_key(consumer: Option<&str>, client: IpAddr) -> String {
    match consumer {
        Some(consumer) => format!("consumer {consumer}"),
        None => format!("address {}", address_key(client)),
    }
}

/// An address as the key of a limit.
fn address_key(client: IpAddr) -> String {
    accept::source_of(client).to_string()
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

    #[test]
    fn one_subscriber_is_one_key() {
        assert_eq!(address_key("192.0.2.1".parse().unwrap()), "192.0.2.1");
        assert_eq!(address_key("::ffff:192.0.2.1".parse().unwrap()), "192.0.2.1");
        let (a, b) = ("2001:db8::1".parse().unwrap(), "2001:db8::ffff:2".parse().unwrap());
        assert_eq!(address_key(a), address_key(b));
    }
}
