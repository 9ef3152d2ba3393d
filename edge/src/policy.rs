//! The rules of an edge: which route a request takes, who may, how often, and in which version.

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    ops::Deref,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use rustls::DistinguishedName;
use starling_http::{Problem, ProxyError};
use starling_node::{
    Announced, AnnouncedVersion, StateDir,
    config::{Date, Link},
};
use starling_protocol::{Name, admin};

use crate::{
    client_certificate::Authorities,
    config::{self, AuthMethod, EdgeSections, HopsField, Jwks, Network, Preflight, Route, VersionInfo},
    cors,
    jwks::{Keys, Looks},
    jwt,
    limits::Limit,
    room::{Room, Seat},
    route::{self, Query, Routes, Sought},
    transform::size::Size,
    version::{self, Found, KnownVersions, Picker, Versions},
};

/// The rules that a reload replaces as one.
#[derive(Clone)]
pub(crate) struct Policy {
    routes: Arc<Routes<Ruled>>,
    /// Nothing has been published that the edge could go by.
    awaits: bool,
    /// Whose word counts for who a client is.
    pub(crate) trusted_hops: Arc<[Network]>,
    pub(crate) trusted_field: HopsField,
    /// Strict-Transport-Security.
    pub(crate) hsts: Option<HeaderValue>,
    /// What the process may have, in bytes, if its file says.
    pub(crate) memory: Option<u64>,
    versions: Versions,
    /// What the versions were made of: sections, and which there are.
    of_versions: Arc<[config::Version]>,
    known_versions: Vec<KnownVersions>,
    pub(crate) plans: BTreeMap<String, Arc<Limit>>,
    pub(crate) jwt: Option<Arc<jwt::Verifier>>,
    /// What `jwt` was made of.
    of_jwt: Option<config::Jwt>,
    /// Who issues certificates to callers.
    pub(crate) client_authorities: Option<Arc<Authorities>>,
}

impl Policy {
    /// Compiles the configuration. Plans that did not change keep their counters from `former`.
    ///
    /// Needs a runtime, where keys are fetched.
    pub(crate) fn new(
        sections: &EdgeSections,
        former: Option<&Self>,
        state: &StateDir,
        announced: &Announced,
        client_authorities: Option<Arc<Authorities>>,
    ) -> Result<Self, String> {
        let plans = sections.plan.iter().map(|plan| {
            let kept = former.and_then(|f| f.plans.get(&plan.name)).filter(|limit| limit.plan == *plan).cloned();
            (plan.name.clone(), kept.unwrap_or_else(|| Arc::new(Limit::new(plan))))
        });
        let shows = |route: &Route| route.auth.contains(&AuthMethod::ClientCertificate);
        if sections.client_certificate.is_none() && sections.route.iter().any(shows) {
            return Err(
                "routes ask for client certificates: add [client_certificate] with ca to this edge's file".into()
            );
        }
        let routes = Routes::new(sections.route.iter().map(|route| Ruled::new(route, former)));
        let known = known_versions(&sections.version, &routes, announced);
        Ok(Self {
            plans: plans.collect(),
            awaits: sections.edge.config.is_some() && sections.route.is_empty(),
            routes: Arc::new(routes),
            trusted_hops: sections.edge.trusted_hops.clone().into(),
            trusted_field: sections.edge.trusted_field,
            hsts: sections.edge.hsts.as_ref().map(|hsts| hsts.0.clone()),
            memory: sections.edge.memory.map(|Size(bytes)| bytes),
            versions: Versions::new(sections.version.iter().zip(&known)),
            of_versions: sections.version.clone().into(),
            known_versions: known,
            jwt: match &sections.jwt {
                Some(config) => {
                    // Keys that are fetched stay: only those of a file may be others now.
                    let same =
                        former.filter(|f| matches!(config.jwks, Jwks::Url(_)) && f.of_jwt.as_ref() == Some(config));
                    let keys = match same.and_then(|former| former.jwt.as_ref()) {
                        Some(former) => {
                            former.keys().trust_anew()?;
                            former.keys().clone()
                        }
                        None => Keys::load(config, state)?,
                    };
                    let of_route = |route: &Route| {
                        let told = route.claim_headers.iter().map(|(_, claim)| claim.clone());
                        route.claims.keys().cloned().chain(told).collect::<Vec<_>>()
                    };
                    let claims = sections.route.iter().flat_map(of_route).collect();
                    Some(Arc::new(jwt::Verifier::new(keys, claims)))
                }
                None => None,
            },
            of_jwt: sections.jwt.clone(),
            client_authorities,
        })
    }

    /// The same with what nodes announce now; `None` if that changes nothing.
    pub(crate) fn with(&self, announced: &Announced) -> Option<Self> {
        let known = known_versions(&self.of_versions, &self.routes, announced);
        (known != self.known_versions).then(|| Self {
            versions: Versions::new(self.of_versions.iter().zip(&known)),
            known_versions: known,
            ..self.clone()
        })
    }

    /// The same with other authorities of callers' certificates.
    pub(crate) fn trusting(&self, client_authorities: Option<Arc<Authorities>>) -> Self {
        Self { client_authorities, ..self.clone() }
    }

    /// Where a request goes, by the path as the client wrote it, without its query.
    pub(crate) fn aim(&self, sought: &Sought<'_>, written: &str) -> Result<Aim<'_>, Problem> {
        if self.routes.is_too_long(sought.query) {
            return Err(unreadable("the query has more parameters than routes are looked for by"));
        }
        let canonical = route::canonical_path(written);
        if let Ok(path) = &canonical {
            let Some(found) = self.versions.find(&self.routes, sought, path) else {
                return Err(self.nowhere(sought, path));
            };
            if !found.route.raw_path || path == written {
                let Found { route, path, picker, named } = found;
                return Ok(Aim {
                    route,
                    path: path.into_owned(),
                    picker,
                    named: named.map(|(name, at)| (name.to_owned(), at)),
                });
            }
        }
        let [kept, split] = route::readings(written).map_err(unreadable)?;
        let find = |path| self.versions.find(&self.routes, sought, path);
        match find(&kept).zip(find(&split)) {
            Some((Found { route, picker, .. }, other)) if route.raw_path && std::ptr::eq(route, other.route) => {
                Ok(Aim { route, path: written.to_owned(), picker, named: None })
            }
            _ => Err(unreadable(canonical.err().unwrap_or("the path can be read as that of another route"))),
        }
    }

    /// The fields by which routes differ that a path may take.
    pub(crate) fn varies_by(&self, sought: &Sought<'_>, written: &str) -> Vec<HeaderName> {
        match self.routes.differ_by_fields() {
            true => self.routes.fields(sought, &route::canonical_path(written).unwrap_or(written.into())),
            false => Vec::new(),
        }
    }

    fn nowhere(&self, sought: &Sought<'_>, path: &str) -> Problem {
        if self.awaits {
            let detail = "nothing has been published for this edge yet";
            return Problem::proxy(StatusCode::SERVICE_UNAVAILABLE, ProxyError::DestinationUnavailable, detail);
        }
        let methods = self.routes.methods(sought, path);
        let allowed = methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
        match HeaderValue::try_from(&allowed) {
            Ok(allow) if !methods.is_empty() => {
                let detail = format!("there it takes one of these methods: {allowed}");
                let problem = Problem::policy(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail);
                problem.with_header(header::ALLOW, allow)
            }
            _ => {
                let detail = "no route leads there";
                Problem::proxy(StatusCode::NOT_FOUND, ProxyError::DestinationNotFound, detail)
            }
        }
    }

    /// The plans, by name.
    pub(crate) fn plans(&self) -> impl Iterator<Item = &Limit> {
        self.plans.values().map(|limit| &**limit)
    }

    /// Whether anything is counted for longer than a process lives.
    pub(crate) fn has_quotas(&self) -> bool {
        self.plans().any(|limit| !limit.plan.quotas.is_empty())
    }

    /// How the issuer's keys are fetched, if they are.
    pub(crate) fn looks(&self) -> Option<Looks> {
        self.jwt.as_ref()?.keys().looks()
    }

    /// Of which authorities' certificates clients are asked for.
    pub(crate) fn client_subjects(&self) -> &[DistinguishedName] {
        self.client_authorities.as_ref().map_or(&[], |authorities| authorities.subjects())
    }

    /// Routes with the names of their versions, most specific first.
    pub(crate) fn shown(&self) -> impl Iterator<Item = (&Route, Vec<String>)> {
        self.routes.iter().map(|ruled| (&ruled.route, self.versions_of(ruled)))
    }
}

/// A route, and what is under way on it.
#[derive(Debug, Clone)]
pub(crate) struct Ruled {
    route: Route,
    /// Room for requests, if it has an end.
    room: Option<Arc<Room>>,
}

impl Ruled {
    /// What is under way stays so over a reload.
    fn new(route: &Route, former: Option<&Policy>) -> Self {
        let is_same = |known: &&Ruled| {
            (&known.host, &known.path, &known.conditions) == (&route.host, &route.path, &route.conditions)
        };
        let former = former.and_then(|former| former.routes.iter().find(is_same)).and_then(|known| known.room.clone());
        let room = route.max_concurrency.map(|most| match former {
            Some(room) => {
                room.resize(most);
                room
            }
            None => Room::new(most),
        });
        Self { route: route.clone(), room }
    }

    /// A place for one more request; `None` beside it if none is needed.
    pub(crate) fn enter(&self, caller: impl FnOnce() -> String) -> Result<Option<Seat>, Problem> {
        let Some(room) = &self.room else { return Ok(None) };
        room.enter(&caller()).map(Some).ok_or_else(|| {
            let detail = "as many requests as the route takes, of one caller or of all, are under way";
            let problem = Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "too-many-requests-at-once", detail);
            problem.retry_after(Duration::from_secs(1))
        })
    }
}

impl Deref for Ruled {
    type Target = Route;

    fn deref(&self) -> &Route {
        &self.route
    }
}

impl Borrow<Route> for Ruled {
    fn borrow(&self) -> &Route {
        &self.route
    }
}

/// Where a request goes.
pub(crate) struct Aim<'a> {
    pub(crate) route: &'a Ruled,
    /// What the service gets, but for a prefix that is to be taken off.
    pub(crate) path: String,
    pub(crate) picker: Option<&'a Picker>,
    /// The version that the path named, and as which of its segments.
    pub(crate) named: Option<(String, usize)>,
}

impl Aim<'_> {
    /// Where a redirect leads; `None` if it is none. Within the host a version that the path named is in the new one as well.
    pub(crate) fn location(&self, query: Option<&str>) -> Option<(StatusCode, String)> {
        let (status, mut to) = self.route.location(&self.path, query)?;
        if let Some((version, segment)) = self.named.as_ref().filter(|_| to.starts_with('/')) {
            let path = to.split(['?', '#']).next().unwrap_or_default();
            let at = path.match_indices('/').nth(*segment).map_or(path.trim_end_matches('/').len(), |(at, _)| at);
            to.insert_str(at, &format!("/{version}"));
        }
        Some((status, to))
    }
}

impl Policy {
    /// Where a request like that would go, and why; or why nowhere. Nothing is sent, and nobody is authenticated.
    pub(crate) fn explain(&self, asked: &admin::Explain) -> Result<admin::Explanation, String> {
        let uri: Uri = asked.url.parse().map_err(|e| format!("{:?} is no URL: {e}", asked.url))?;
        let authority = uri.authority().ok_or("give the whole URL, such as https://api.example.com/orders/1")?;
        let method: Method = asked.method.parse().map_err(|_| format!("{:?} is no method", asked.method))?;
        let mut fields = HeaderMap::new();
        for (name, value) in &asked.headers {
            let name: HeaderName = name.parse().map_err(|_| format!("{name:?} is not the name of a field"))?;
            fields.append(name, HeaderValue::from_str(value).map_err(|e| format!("{value:?}: {e}"))?);
        }
        let mut told = admin::Explanation { method: method.to_string(), url: asked.url.clone(), ..Default::default() };
        let refused =
            |problem: Problem| Some(admin::RefusedRequest { status: problem.status.as_u16(), why: problem.detail });
        let host = route::bare_host(authority.as_str());
        let (matched, query) = (matched(&method, &fields), Query::new(uri.query()));
        let sought = Sought { host: &host, method: &matched, headers: &fields, query: &query };
        let aim = match self.aim(&sought, uri.path()) {
            Ok(aim) => aim,
            Err(problem) => {
                told.refused = refused(problem);
                return Ok(told);
            }
        };
        told.redirected = aim.location(uri.query()).map(|(status, to)| format!("{} {to}", status.as_u16()));
        let Aim { route, path, picker, named } = aim;
        let seen = route.target(&path);
        let seen = uri.query().map_or(seen.to_string(), |query| format!("{seen}?{query}"));
        told.route = Some(shown(route, &self.versions_of(route)));
        told.because = format!(
            "the most specific route whose host is {} and whose path, in whole segments, is {} or above",
            route.host, path
        );
        let conditions = route.conditions.words();
        if !conditions.is_empty() {
            told.because += &format!(", and which asks for {}", conditions.join(" and "));
        }
        told.path = Some(seen).filter(|_| route.service.is_some());
        if let Some(maintenance) = &route.maintenance {
            let (status, why) = (StatusCode::SERVICE_UNAVAILABLE.as_u16(), maintenance.detail.clone());
            told.refused = Some(admin::RefusedRequest { status, why });
            return Ok(told);
        }
        if cors::is_preflight(&method, &fields) && (route.cors.is_some() || route.preflight == Preflight::Pass) {
            told.because += "; a preflight needs no credentials here";
        }
        told.cost = route.cost.get();
        if let Some(limit) = route.plan.as_ref().and_then(|name| self.plans.get(name)) {
            told.limits = limit.words();
        }
        if let (Some(picker), Some(service)) = (picker, &route.service) {
            let asked = version::Asked {
                named: named.as_ref().map(|(name, _)| name.as_str()),
                path: &path,
                service,
                query: uri.query(),
                headers: &fields,
                caller: &String::new,
                now: SystemTime::now(),
            };
            match picker.pick(&asked) {
                Ok(picked) => {
                    let weights = picker.weights().filter(|_| picked.by.is_none());
                    told.version_by = Some(match (picked.by, &weights) {
                        (Some(by), _) => by.to_string(),
                        (None, Some(weights)) => format!("weight: {weights}"),
                        (None, None) => "the default".into(),
                    });
                    told.version = Some(picked.version);
                    let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
                    told.fields = picked.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
                }
                Err(problem) => told.refused = refused(problem),
            }
        }
        Ok(told)
    }

    fn versions_of(&self, route: &Route) -> Vec<String> {
        let same = |section: &config::Version| route::segments(&section.route).eq(route::segments(&route.path));
        let at = self.of_versions.iter().position(same);
        match (at, &route.service) {
            (Some(at), Some(service)) => self.known_versions[at].names(service),
            _ => Vec::new(),
        }
    }
}

/// The versions that there are, for each section.
fn known_versions(sections: &[config::Version], routes: &Routes<Ruled>, announced: &Announced) -> Vec<KnownVersions> {
    let info = |told: &AnnouncedVersion| VersionInfo {
        // A node's word: only what a file could say goes into a field.
        deprecated: told.deprecated.and_then(Date::at),
        sunset: told.sunset.and_then(Date::at),
        link: told.link.clone().and_then(|link| Link::try_from(link).ok()),
        successor: None,
    };
    let of_service = |service: &Name| {
        let told = announced.versions.get(service).into_iter().flatten();
        told.filter(|(name, _)| config::is_version(name)).map(|(name, told)| (name.clone(), info(told))).collect()
    };
    let known = |section: &config::Version| match section.versions.here() {
        Some(versions) => KnownVersions::Listed(versions.clone()),
        None => {
            let below = routes.iter().filter(|route| route::covers(&section.route, &route.path));
            let services = below.filter_map(|route| route.service.clone());
            let by_service = services.map(|service| (service.clone(), of_service(&service))).collect();
            KnownVersions::Announced { by_service, settled: announced.settled }
        }
    };
    sections.iter().map(known).collect()
}

/// The method by which a request's route is found: of a preflight, that of the request to come; and tunnels begin as GET did.
pub(crate) fn matched(method: &Method, fields: &HeaderMap) -> Method {
    let asked = fields.get(header::ACCESS_CONTROL_REQUEST_METHOD).filter(|_| cors::is_preflight(method, fields));
    match asked.and_then(|asked| asked.to_str().ok()?.parse().ok()) {
        Some(asked) => asked,
        None if *method == Method::CONNECT => Method::GET,
        None => method.clone(),
    }
}

/// A route as operators see it.
pub(crate) fn shown(route: &Route, versions: &[String]) -> admin::Route {
    let name = |method: &AuthMethod| match method {
        AuthMethod::ApiKey => "api-key".to_string(),
        AuthMethod::Jwt => "jwt".to_string(),
        AuthMethod::ClientCertificate => "client-certificate".to_string(),
    };
    admin::Route {
        host: route.host.to_string(),
        path: route.path.clone(),
        conditions: route.conditions.words(),
        service: route.service.clone(),
        redirect: route.redirect.as_ref().map(|redirect| redirect.to.to_string()),
        maintenance: route.maintenance.is_some(),
        auth: route.auth.iter().map(name).collect(),
        forward: route.forward.as_ref().map(|forward| forward.service.clone()),
        plan: route.plan.clone(),
        versions: versions.to_vec(),
    }
}

fn unreadable(detail: &'static str) -> Problem {
    Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, detail)
}
