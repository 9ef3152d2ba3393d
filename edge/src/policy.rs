//! The rules of an edge: which route a request takes, who may, how often, and in which version.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::SystemTime,
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use starling_http::{Problem, ProxyError};
use starling_node::StateDir;
use starling_protocol::admin;

use crate::{
    config::{self, AuthMethod, EdgeSections, Jwks, Preflight, Route},
    cors,
    jwks::{Keys, Looks},
    jwt,
    limits::Limit,
    route::{self, Routes},
    version::{Found, Picker, Versions},
};

/// The rules that a reload replaces as one.
pub(crate) struct Policy {
    routes: Routes<Route>,
    versions: Versions,
    /// By the route's path, to be shown.
    version_names: HashMap<String, Vec<String>>,
    pub(crate) plans: BTreeMap<String, Arc<Limit>>,
    pub(crate) jwt: Option<jwt::Verifier>,
    /// What `jwt` was made of.
    of_jwt: Option<config::Jwt>,
}

impl Policy {
    /// Compiles the configuration. Plans that did not change keep their counters from `former`.
    ///
    /// Needs a runtime, where keys are fetched.
    pub(crate) fn new(sections: &EdgeSections, former: Option<&Self>, state: &StateDir) -> Result<Self, String> {
        let plans = sections.plan.iter().map(|plan| {
            let kept = former.and_then(|f| f.plans.get(&plan.name)).filter(|limit| limit.plan == *plan).cloned();
            (plan.name.clone(), kept.unwrap_or_else(|| Arc::new(Limit::new(plan))))
        });
        Ok(Self {
            plans: plans.collect(),
            routes: Routes::new(sections.route.iter().cloned()),
            versions: Versions::new(&sections.version),
            version_names: sections
                .version
                .iter()
                .map(|v| (v.route.clone(), v.versions.keys().cloned().collect()))
                .collect(),
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
                    Some(jwt::Verifier::new(keys, sections.route.iter().flat_map(of_route).collect()))
                }
                None => None,
            },
            of_jwt: sections.jwt.clone(),
        })
    }

    /// Where a request goes, by the path as the client wrote it, without its query.
    pub(crate) fn aim(&self, host: &str, written: &str) -> Result<Aim<'_>, Problem> {
        let canonical = route::canonical_path(written);
        if let Ok(path) = &canonical {
            let Some(found) = self.versions.find(&self.routes, host, path) else {
                let detail = "no route leads there";
                return Err(Problem::proxy(StatusCode::NOT_FOUND, ProxyError::DestinationNotFound, detail));
            };
            if !found.route.raw_path || path == written {
                let Found { route, path, picker, named } = found;
                return Ok(Aim { route, path: path.into_owned(), picker, named: named.map(str::to_owned) });
            }
        }
        let [kept, split] = route::readings(written).map_err(unreadable)?;
        let find = |path| self.versions.find(&self.routes, host, path);
        match find(&kept).zip(find(&split)) {
            Some((Found { route, picker, .. }, other)) if route.raw_path && std::ptr::eq(route, other.route) => {
                Ok(Aim { route, path: written.to_owned(), picker, named: None })
            }
            _ => Err(unreadable(canonical.err().unwrap_or("the path can be read as that of another route"))),
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

    /// Routes with the names of their versions, most specific first.
    pub(crate) fn shown(&self) -> impl Iterator<Item = (&Route, &[String])> {
        self.routes.iter().map(|route| (route, self.versions_of(route)))
    }
}

/// Where a request goes.
pub(crate) struct Aim<'a> {
    pub(crate) route: &'a Route,
    /// What the service gets, but for a prefix that is to be taken off.
    pub(crate) path: String,
    pub(crate) picker: Option<&'a Picker>,
    /// The version that the path named.
    pub(crate) named: Option<String>,
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
        let Aim { route, path, picker, named } = match self.aim(&route::bare_host(authority.as_str()), uri.path()) {
            Ok(aim) => aim,
            Err(problem) => {
                told.refused = refused(problem);
                return Ok(told);
            }
        };
        let seen = if route.strip_prefix { route::below(&route.path, &path) } else { &path };
        let seen = uri.query().map_or(seen.to_owned(), |query| format!("{seen}?{query}"));
        told.route = Some(shown(route, self.versions_of(route)));
        told.because = format!(
            "the most specific route whose host is {} and whose path, in whole segments, is {} or above",
            route.host, path
        );
        told.path = Some(seen);
        if cors::is_preflight(&method, &fields) && (route.cors.is_some() || route.preflight == Preflight::Pass) {
            told.because += "; a preflight needs no credentials here";
        }
        told.cost = route.cost.get();
        if let Some(limit) = route.plan.as_ref().and_then(|name| self.plans.get(name)) {
            told.limits = limit.words();
        }
        if let Some(picker) = picker {
            match picker.pick(named.as_deref(), uri.query(), &fields, SystemTime::now()) {
                Ok(picked) => {
                    told.version_by = Some(picked.by.map_or("the default".to_owned(), ToString::to_string));
                    told.version = Some(picked.version);
                    let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
                    told.fields = picked.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
                }
                Err(problem) => told.refused = refused(problem),
            }
        }
        Ok(told)
    }

    fn versions_of(&self, route: &Route) -> &[String] {
        self.version_names.get(&route.path).map_or(&[], Vec::as_slice)
    }
}

/// A route as operators see it.
pub(crate) fn shown(route: &Route, versions: &[String]) -> admin::Route {
    let name = |method: &AuthMethod| match method {
        AuthMethod::ApiKey => "api-key".to_string(),
        AuthMethod::Jwt => "jwt".to_string(),
    };
    admin::Route {
        host: route.host.to_string(),
        path: route.path.clone(),
        service: route.service.clone(),
        auth: route.auth.iter().map(name).collect(),
        plan: route.plan.clone(),
        versions: versions.to_vec(),
    }
}

fn unreadable(detail: &'static str) -> Problem {
    Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, detail)
}
