//! Checks across the sections of an edge's file, and of the files that they name.

use std::collections::BTreeSet;

use http::{HeaderName, header};
use starling_node::{unix_now, web::Web};

use super::{
    AuthMethod, ChallengeKind, Eab, EdgeSections, Jwks, Jwt, Network, Plan, Route, Source, Version, VersionSource,
};
use crate::{
    client_certificate::Authorities,
    cors::Cors,
    jwks::{self, Keys},
    key_pair,
    limits::Redis,
    route,
    transform::fields::Edits,
};

/// Checks what no section can know alone, and reads the files that they name.
///
/// Each problem comes with the key it is about, such as `route[1].plan`, counted from 0, and says what to do next.
/// Empty when an edge can run with this.
pub(super) fn check(edge: &EdgeSections) -> Vec<(String, String)> {
    let mut problems = Problems(Vec::new());
    check_certificates(edge, &mut problems);
    for (key, networks) in [("trusted_hops", &edge.edge.trusted_hops), ("proxy_protocol", &edge.edge.proxy_protocol)] {
        if networks.iter().any(Network::is_all) {
            let why = "anybody could say that he is somebody else: name the addresses of the proxies";
            problems.add(format!("edge.{key}"), why);
        }
    }
    if let Some(client) = &edge.client_certificate
        && let Err((key, why)) = Authorities::load(client)
    {
        problems.add(format!("client_certificate.{key}"), why);
    }
    if let Some(store) = &edge.quota_store {
        if let Err(why) = Redis::new(store, None) {
            problems.add("quota_store.ca", why);
        }
        if let Some(file) = &store.password_file
            && let Err(why) = std::fs::read_to_string(file)
        {
            problems.add("quota_store.password_file", format!("{}: it cannot be read ({why})", file.display()));
        }
        if store.password_file.is_some() && store.url.password.is_some() {
            problems.add("quota_store.password_file", "there is a password in url, too; remove one of them");
        }
    }
    let EdgeSections { route, version, plan, jwt, .. } = edge;
    if edge.edge.config.is_none() {
        problems.0.extend(common(route, version, plan, jwt.as_ref()));
        let shows = |route: &Route| route.auth.contains(&AuthMethod::ClientCertificate);
        if let Some(i) = route.iter().position(shows).filter(|_| edge.client_certificate.is_none()) {
            problems.add(format!("route[{i}].auth"), "\"client-certificate\" needs [client_certificate] with ca");
        }
        return problems.0;
    }
    let own = [
        ("route", !route.is_empty()),
        ("version", !version.is_empty()),
        ("plan", !plan.is_empty()),
        ("jwt", jwt.is_some()),
    ];
    for (table, _) in own.into_iter().filter(|(_, is_there)| *is_there) {
        let why =
            "this comes from the mesh, as edge.config says: put it into what you publish, or leave edge.config out";
        problems.add(table, why);
    }
    problems.0
}

/// The same of what edges can have in common.
pub(super) fn common(
    routes: &[Route],
    versions: &[Version],
    plans: &[Plan],
    jwt: Option<&Jwt>,
) -> Vec<(String, String)> {
    let mut problems = Problems(Vec::new());
    check_plans(plans, &mut problems);
    check_routes(routes, plans, jwt, &mut problems);
    check_versions(versions, routes, &mut problems);
    if let Some(jwt) = jwt {
        match &jwt.jwks {
            Jwks::File(_) => drop(Keys::of_file(jwt).map_err(|why| problems.add("jwt.jwks", why))),
            Jwks::Url(_) => drop(jwks::web(jwt).map_err(|why| problems.add("jwt.ca", why))),
        }
    }
    problems.0
}

struct Problems(Vec<(String, String)>);

impl Problems {
    fn add(&mut self, key: impl Into<String>, problem: impl Into<String>) {
        self.0.push((key.into(), problem.into()));
    }
}

fn check_certificates(edge: &EdgeSections, problems: &mut Problems) {
    if edge.certificate.is_empty() {
        problems.add(
            "certificate",
            "there is no certificate; add [[certificate]] with hosts, and cert and key or acme = {}",
        );
    }
    for (i, certificate) in edge.certificate.iter().enumerate() {
        match &certificate.source {
            Source::Files(files) => {
                let found = key_pair::read(files, &starling_node::crypto_provider());
                for (part, why) in found.err().unwrap_or_default() {
                    problems.add(format!("certificate[{i}].{part}"), why);
                }
            }
            Source::Acme(acme) => {
                if let Err(why) = Web::trusting(acme.ca.as_deref()) {
                    problems.add(format!("certificate[{i}].acme"), why.to_string());
                }
                if let Some(Err(why)) = acme.eab.as_ref().map(Eab::key) {
                    problems.add(format!("certificate[{i}].acme.eab.key_file"), why);
                }
                if acme.challenge == Some(ChallengeKind::Http) && edge.edge.redirect.is_none() {
                    let why = "http-01 is asked at the redirect port; set edge.redirect = \"0.0.0.0:80\"";
                    problems.add(format!("certificate[{i}].acme.challenge"), why);
                }
            }
        }
    }
}

/// What clients will not like about the certificates, by key as in [`check`]. No reason for an edge not to run.
pub(super) fn doubts(edge: &EdgeSections) -> Vec<(String, String)> {
    let mut doubts = Vec::new();
    for (i, certificate) in edge.certificate.iter().enumerate() {
        let Source::Files(files) = &certificate.source else { continue };
        let Ok(pair) = key_pair::read(files, &starling_node::crypto_provider()) else { continue };
        let found = key_pair::doubts(&pair.cert, &certificate.hosts, unix_now());
        let file = files.cert.display();
        doubts.extend(found.into_iter().map(|why| (format!("certificate[{i}].cert"), format!("{file}: {why}"))));
    }
    if let Some(why) = edge.client_certificate.as_ref().and_then(|c| Authorities::load(c).ok()).and_then(|a| a.doubt())
    {
        doubts.push(("client_certificate.crl".into(), why));
    }
    doubts
}

fn check_plans(plans: &[Plan], problems: &mut Problems) {
    let mut names = BTreeSet::new();
    for (i, plan) in plans.iter().enumerate() {
        if !names.insert(&plan.name) {
            problems.add(format!("plan[{i}].name"), format!("there is another plan {:?}; rename one", plan.name));
        }
    }
}

fn check_routes(routes: &[Route], plans: &[Plan], jwt: Option<&Jwt>, problems: &mut Problems) {
    if routes.is_empty() {
        problems.add("route", "there is no route; add [[route]] with path, service and auth");
    }
    for (i, route) in routes.iter().enumerate() {
        if let Some(why) = route.cors.as_ref().and_then(Cors::problem) {
            problems.add(format!("route[{i}].cors"), why);
        }
        if let Err(why) = route_path(&route.path) {
            problems.add(format!("route[{i}].path"), why);
        }
        let same = |other: &Route| {
            other.host == route.host
                && route::segments(&other.path).eq(route::segments(&route.path))
                && other.conditions.is_like(&route.conditions)
        };
        if let Some(j) = routes[..i].iter().position(same) {
            let (host, path) = (&route.host, &route.path);
            let (key, why) = match route.conditions.count() {
                0 => ("path", format!("route[{j}] has the same host {host} and path {path}; change or remove one")),
                _ => (
                    "match",
                    format!(
                        "a request for host {host} and path {path} may take this and route[{j}]; ask one of them for more"
                    ),
                ),
            };
            problems.add(format!("route[{i}].{key}"), why);
        }
        match (&route.service, &route.redirect) {
            (None, None) => problems.add(format!("route[{i}].service"), "name the service, or a redirect"),
            (Some(_), Some(_)) => {
                problems.add(format!("route[{i}].redirect"), "a route has a service or a redirect; remove one")
            }
            _ => {}
        }
        let of_path = [("strip_prefix", route.strip_prefix), ("raw_path", route.raw_path)];
        let others = of_path.into_iter().filter(|(_, is_set)| *is_set && route.rewrite.is_some());
        for (key, _) in others {
            problems.add(format!("route[{i}].{key}"), "this does not go with rewrite; remove one of them");
        }
        if let Some(to) =
            route.redirect.as_ref().map(|redirect| redirect.to.to_string()).filter(|to| to.starts_with('/'))
        {
            let to = to.split(['?', '*']).next().unwrap_or_default();
            let catches =
                |other: &Route| route::depth(&other.path) > route::depth(&route.path) && route::covers(&other.path, to);
            if route::covers(&route.path, to) && !routes.iter().any(catches) {
                problems.add(format!("route[{i}].redirect"), format!("it leads to {to}, which is this route's own"));
            }
        }
        if route.redirect.is_some() && (route.raw_path || route.rewrite.is_some()) {
            problems.add(format!("route[{i}].redirect"), "a redirect does not go with raw_path or rewrite; remove it");
        }
        if let Some(plan) = &route.plan
            && !plans.iter().any(|known| known.name == *plan)
        {
            problems.add(format!("route[{i}].plan"), format!("there is no plan {plan:?}; {}", known_plans(plans)));
        }
        let plan = plans.iter().find(|plan| route.plan.as_ref() == Some(&plan.name));
        if let Some(plan) = plan {
            let burst = plan.rate.map(|rate| plan.burst(rate).get().into());
            let quotas = plan.quotas.iter().map(|quota| quota.count.get());
            if let Some(most) = burst.into_iter().chain(quotas).min().filter(|most| *most < u64::from(route.cost.get()))
            {
                let why =
                    format!("one call costs more than plan {:?} ever has ({most}), so that none could pass", plan.name);
                problems.add(format!("route[{i}].cost"), why);
            }
        }
        for name in [header::ALT_SVC, HeaderName::from_static("x-request-id")] {
            if route.response_headers.has(&name) {
                let why = format!("{name} is the edge's to say; leave it out");
                problems.add(format!("route[{i}].response_headers"), why);
            }
        }
        let Edits { set, remove, .. } = &*route.response_headers;
        let mut changed = set.iter().map(|(name, _)| name).chain(remove);
        let is_of_cors = |name: &HeaderName| *name == header::VARY || name.as_str().starts_with("access-control-");
        if route.cors.is_some()
            && let Some(name) = changed.find(|name| is_of_cors(name))
        {
            let why = format!("{name} is what cors makes of it; leave it out, or cors");
            problems.add(format!("route[{i}].response_headers"), why);
        }
        let of_tokens = [
            ("scopes", !route.scopes.is_empty()),
            ("claims", !route.claims.is_empty()),
            ("claim_headers", !route.claim_headers.is_empty()),
        ];
        for (key, _) in of_tokens.into_iter().filter(|(_, is_set)| *is_set && route.auth != [AuthMethod::Jwt]) {
            let why = "only tokens have these: set auth = [\"jwt\"], and give other callers a route of their own";
            problems.add(format!("route[{i}].{key}"), why);
        }
        if !route.client_names.is_empty() && route.auth != [AuthMethod::ClientCertificate] {
            let why = "only certificates have these: set auth = [\"client-certificate\"], and give other callers a route of their own";
            problems.add(format!("route[{i}].client_names"), why);
        }
        if route.forward_client_certificate && !route.auth.contains(&AuthMethod::ClientCertificate) {
            let why = "no caller shows one here: add \"client-certificate\" to auth, or leave it out";
            problems.add(format!("route[{i}].forward_client_certificate"), why);
        }
        if route.cost_from.is_some() && route.plan.is_none() && !route.auth.contains(&AuthMethod::ApiKey) {
            let why = "nothing is counted here: name a plan, or leave it out";
            problems.add(format!("route[{i}].cost_from"), why);
        }
        let told: Vec<_> = route.told_headers().collect();
        if let Some(name) = told.iter().enumerate().find(|(at, name)| told[..*at].contains(name)).map(|(_, name)| name)
        {
            problems.add(format!("route[{i}].forward"), format!("{name} is told twice; leave one of them out"));
        }
        if route.auth.contains(&AuthMethod::Jwt) && jwt.is_none() {
            problems.add(format!("route[{i}].auth"), "\"jwt\" needs [jwt] with issuer, audience, jwks and algorithms");
        }
    }
}

fn known_plans(plans: &[Plan]) -> String {
    match plans.iter().map(|plan| plan.name.as_str()).collect::<Vec<_>>().join(", ") {
        names if names.is_empty() => "add [[plan]] with that name and a rate".into(),
        names => format!("add it as [[plan]], or use one of: {names}"),
    }
}

/// Only unreserved characters (RFC 3986 §2.3): these have one spelling after [`route::canonical_path`], so that no
/// other spelling of a path slips past the route that guards it.
fn route_path(path: &str) -> Result<(), String> {
    let plain = |segment: &str| segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
    if !path.starts_with('/') {
        Err(format!("{path:?} does not start with '/'; write \"/{path}\""))
    } else if !path.split('/').all(plain) {
        Err(format!("{path:?} is not a plain path; use A-Z, a-z, 0-9, '-', '.', '_', '~' and '/' only"))
    } else if !route::canonical_path(path).is_ok_and(|normal| normal == path) {
        Err(format!("{path:?} has an empty, '.' or '..' segment; write the path without it"))
    } else {
        Ok(())
    }
}

fn check_versions(versions: &[Version], routes: &[Route], problems: &mut Problems) {
    for (i, version) in versions.iter().enumerate() {
        let same = |path: &str| route::segments(path).eq(route::segments(&version.route));
        if !routes.iter().any(|route| same(&route.path)) {
            let why = format!("no route has the path {:?}; give the path of a [[route]]", version.route);
            problems.add(format!("version[{i}].route"), why);
        }
        if let Some(j) = versions[..i].iter().position(|other| same(&other.route)) {
            problems
                .add(format!("version[{i}].route"), format!("version[{j}] is for the same route; put them together"));
        }
        if version.default.is_some() && !version.weights.is_empty() {
            problems
                .add(format!("version[{i}].weights"), "weights stand in the place of a default; remove one of them");
        }
        if version.sticky && version.weights.is_empty() {
            let why = "sticky is about weights; add them, such as weights = { v1 = 90, v2 = 10 }, or leave it out";
            problems.add(format!("version[{i}].sticky"), why);
        }
        let listed = version.versions.here();
        let known = listed.iter().flat_map(|v| v.keys()).map(String::as_str).collect::<Vec<_>>().join(", ");
        let is_unknown = |name: &&String| listed.is_some_and(|versions| !versions.contains_key(*name));
        let unknown = |name: &String| format!("{name:?} is not in versions; use one of: {known}");
        if let Some(default) = version.default.as_ref().filter(is_unknown) {
            problems.add(format!("version[{i}].default"), unknown(default));
        }
        for name in version.weights.keys().filter(is_unknown) {
            problems.add(format!("version[{i}].weights.{name}"), unknown(name));
        }
        if version.from.contains(&VersionSource::Path)
            && let Some(raw) = routes.iter().find(|route| route.raw_path && route::covers(&version.route, &route.path))
        {
            let why = format!("\"path\" does not go with raw_path on the route {:?}; remove one of them", raw.path);
            problems.add(format!("version[{i}].from"), why);
        }
        for (name, info) in listed.into_iter().flatten() {
            if let Some(successor) = info.successor.as_ref().filter(|other| is_unknown(other) || *other == name) {
                let why =
                    if successor == name { "a version does not follow itself".into() } else { unknown(successor) };
                problems.add(format!("version[{i}].versions.{name}.successor"), why);
            }
            if let (Some(deprecated), Some(sunset)) = (info.deprecated, info.sunset)
                && sunset < deprecated
            {
                let why = "sunset is before deprecated (RFC 9745 §4); swap the dates";
                problems.add(format!("version[{i}].versions.{name}.sunset"), why);
            }
        }
    }
}
