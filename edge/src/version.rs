//! Versions of an API: which one a request means, and what to tell its caller about it.

#![allow(clippy::result_large_err, reason = "a problem is made once for a refused request, and rendered at once")]

use std::{
    borrow::{Borrow, Cow},
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use rand::RngExt;
use sfv::ItemSerializer;
use sha2::{Digest, Sha256};
use starling_http::{Problem, ProxyError};
use starling_protocol::Name;

use crate::{
    config::{self, Route, VersionInfo, VersionSource},
    route::{Routes, Sought, covers, depth},
};

/// The versions of all APIs, most specific route first.
#[derive(Debug, Clone)]
pub(crate) struct Versions(Vec<Picker>);

/// Where a request goes, once a version in its path is out of the way.
#[derive(Debug)]
pub(crate) struct Found<'r, 'p, T> {
    /// The route of `path`.
    pub(crate) route: &'r T,
    /// The path without a version: what policy looks at and the service gets.
    pub(crate) path: Cow<'p, str>,
    /// Who picks the version; `None` if the route's API has none.
    pub(crate) picker: Option<&'r Picker>,
    /// The version that the path named, known or not, and as which of its segments; for [`Picker::pick`].
    pub(crate) named: Option<(&'p str, usize)>,
}

impl Versions {
    /// Takes the sections in any order, each with the versions that there are.
    pub(crate) fn new<'a>(sections: impl IntoIterator<Item = (&'a config::Version, &'a KnownVersions)>) -> Self {
        let mut pickers: Vec<_> = sections.into_iter().map(|(section, known)| Picker::new(section, known)).collect();
        pickers.sort_by_key(|picker| std::cmp::Reverse(depth(&picker.route)));
        Self(pickers)
    }

    /// The route of a request and who picks its version. `path` must have come through `route::canonical_path`.
    ///
    /// The route is looked up by the path *without* its version. Were it the other way round, `/orders/v1/admin` would
    /// pass by the policy of `/orders` and arrive as `/orders/admin`. A version section holds for the routes at its
    /// path and below. A route that names the segment itself, such as `/v1/orders`, is more specific than any version.
    pub(crate) fn find<'r, 'p, T: Borrow<Route>>(
        &'r self,
        routes: &'r Routes<T>,
        sought: &Sought<'_>,
        path: &'p str,
    ) -> Option<Found<'r, 'p, T>> {
        let plain = routes.find(sought, path);
        let plain_depth = plain.map_or(0, |route| depth(&route.borrow().path));
        for picker in &self.0 {
            for Reading { path, named } in picker.readings(path) {
                if named.is_some_and(|(_, at)| at < plain_depth) {
                    continue;
                }
                if let Some(route) = routes.find(sought, &path)
                    && covers(&picker.route, &route.borrow().path)
                {
                    return Some(Found { route, path, picker: Some(picker), named });
                }
            }
        }
        plain.map(|route| Found { route, path: Cow::Borrowed(path), picker: None, named: None })
    }
}

/// One way to read a path.
struct Reading<'a> {
    /// Without the version.
    path: Cow<'a, str>,
    /// The version and the number of its segment.
    named: Option<(&'a str, usize)>,
}

/// The versions that there are of an API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KnownVersions {
    /// By the file, for whichever service.
    Listed(BTreeMap<String, VersionInfo>),
    /// What nodes announce, of each service.
    Announced {
        by_service: BTreeMap<Name, BTreeMap<String, VersionInfo>>,
        /// Whether there may be more, because the mesh has not been heard yet.
        settled: bool,
    },
}

impl KnownVersions {
    /// Names of those of a service.
    pub(crate) fn names(&self, service: &Name) -> Vec<String> {
        match self {
            Self::Listed(versions) => versions.keys().cloned().collect(),
            Self::Announced { by_service, .. } => {
                by_service.get(service).into_iter().flat_map(|versions| versions.keys().cloned()).collect()
            }
        }
    }
}

/// Picks the version of a request to one API.
#[derive(Debug, Clone)]
pub(crate) struct Picker {
    route: String,
    from: Vec<VersionSource>,
    default: Option<String>,
    /// Of the requests that name none.
    weights: BTreeMap<String, u32>,
    sticky: bool,
    /// Segments that name a version without looking like one. No node can make others such.
    segments: BTreeSet<String>,
    versions: Table,
    /// The fields that decide, for caches (RFC 9110 §12.5.5).
    vary: Option<HeaderValue>,
}

#[derive(Debug, Clone)]
enum Table {
    Listed(Vec<Version>),
    Announced { by_service: BTreeMap<Name, Vec<Version>>, settled: bool },
}

#[derive(Debug, Clone)]
struct Version {
    name: String,
    sunset: Option<SystemTime>,
    /// What to use instead of one that is deprecated.
    successor: Option<String>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Version {
    fn is_gone(&self, now: SystemTime) -> bool {
        self.sunset.is_some_and(|sunset| now >= sunset)
    }
}

/// The version of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Picked<'a> {
    /// Its name.
    pub(crate) version: String,
    /// Where the request named it; `None` if it is the default, or by weight.
    pub(crate) by: Option<&'a VersionSource>,
    /// Fields to append to the answer, whoever makes it: Deprecation (RFC 9745), Sunset (RFC 8594), Link (RFC 8288),
    /// Vary.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
}

/// What of a request says which version it means.
pub(crate) struct Asked<'a> {
    /// What [`Versions::find`] took out of the path.
    pub(crate) named: Option<&'a str>,
    /// The path without a version.
    pub(crate) path: &'a str,
    /// Of the route.
    pub(crate) service: &'a Name,
    pub(crate) query: Option<&'a str>,
    pub(crate) headers: &'a HeaderMap,
    /// Who asks, for those who stay with a version.
    pub(crate) caller: &'a dyn Fn() -> String,
    pub(crate) now: SystemTime,
}

/// What a request says at one place.
enum Said<'a> {
    Nothing,
    This(&'a Version),
    Unknown,
    Contradiction,
}

impl Picker {
    /// Takes one section, and the versions that there are.
    pub(crate) fn new(config: &config::Version, known: &KnownVersions) -> Self {
        let fields: BTreeSet<&str> = config
            .from
            .iter()
            .filter_map(|source| match source {
                VersionSource::Header(name) => Some(name.as_str()),
                VersionSource::Accept { .. } => Some(header::ACCEPT.as_str()),
                VersionSource::Path | VersionSource::Query(_) => None,
            })
            .collect();
        let vary = fields.into_iter().collect::<Vec<_>>().join(", ");
        let vary = if vary.is_empty() { None } else { HeaderValue::try_from(vary).ok() };
        let versions = |known: &BTreeMap<String, VersionInfo>| -> Vec<Version> {
            let is_good = |name: &&String| known.get(*name).is_some_and(|info| info.deprecated.is_none());
            let usual = config.default.as_ref().filter(is_good);
            let version = |(name, info): (&String, &VersionInfo)| {
                let successor = info.successor.as_ref().or(usual).filter(|other| *other != name);
                Version {
                    name: name.clone(),
                    sunset: info.sunset.map(SystemTime::from),
                    successor: successor.filter(|_| info.deprecated.is_some()).cloned(),
                    headers: headers(info),
                }
            };
            known.iter().map(version).collect()
        };
        let named = config.default.iter().chain(config.weights.keys()).cloned();
        Self {
            route: config.route.clone(),
            from: config.from.clone(),
            default: config.default.clone(),
            weights: config.weights.clone(),
            sticky: config.sticky,
            segments: match known {
                KnownVersions::Listed(listed) => listed.keys().cloned().collect(),
                KnownVersions::Announced { .. } => named.collect(),
            },
            versions: match known {
                KnownVersions::Listed(listed) => Table::Listed(versions(listed)),
                KnownVersions::Announced { by_service, settled } => {
                    let of_service = |(service, known): (&Name, &BTreeMap<_, _>)| (service.clone(), versions(known));
                    Table::Announced { by_service: by_service.iter().map(of_service).collect(), settled: *settled }
                }
            },
            vary,
        }
    }

    /// Picks the version: the first place in the written order that names one, else by weight or the default.
    ///
    /// Problems: 404 for a version in the path that there is not, 400 for one anywhere else, for none where there is no default, and
    /// for two at one place; 410 after its sunset; 503 while nobody serves any, or that of those who name none.
    pub(crate) fn pick(&self, asked: &Asked<'_>) -> Result<Picked<'_>, Problem> {
        let versions = self.versions_of(asked.service);
        if versions.is_empty() {
            return Err(self.absent("nobody serves a version of it at the moment"));
        }
        let in_path = asked.named.map_or(Said::Nothing, |name| one(versions, [name]));
        if matches!(in_path, Said::Unknown) {
            return Err(self.unknown(StatusCode::NOT_FOUND, versions));
        }
        for source in &self.from {
            let said = match source {
                VersionSource::Path => asked.named.map_or(Said::Nothing, |name| one(versions, [name])),
                VersionSource::Header(name) => one(versions, asked.headers.get_all(name).iter().map(text)),
                VersionSource::Query(name) => one(versions, values(asked.query, name)),
                VersionSource::Accept { prefix, suffix } => accepted(versions, asked.headers, prefix, suffix),
            };
            match said {
                Said::Nothing => {}
                Said::This(version) => return self.picked(versions, version, Some(source), asked),
                Said::Unknown => return Err(self.unknown(StatusCode::BAD_REQUEST, versions)),
                Said::Contradiction => {
                    let what = "more than one version is named";
                    return Err(self.refusal(StatusCode::BAD_REQUEST, "unknown-version", what, versions));
                }
            }
        }
        if !self.weights.is_empty() {
            let version = self.share(versions, asked);
            return match version {
                Some(version) => self.picked(versions, version, None, asked),
                None => Err(self.absent("nobody serves a version for those who name none at the moment")),
            };
        }
        match self.default.as_deref().map(|name| known(versions, name)) {
            Some(Some(version)) => self.picked(versions, version, None, asked),
            Some(None) => Err(self.absent("nobody serves the version of those who name none at the moment")),
            None => {
                let what = "no version is named";
                Err(self.refusal(StatusCode::BAD_REQUEST, "version-required", what, versions))
            }
        }
    }

    fn versions_of(&self, service: &Name) -> &[Version] {
        match &self.versions {
            Table::Listed(versions) => versions,
            Table::Announced { by_service, .. } => by_service.get(service).map_or(&[], Vec::as_slice),
        }
    }

    /// The version of whoever names none, by weight, of those that there are.
    fn share<'v>(&self, versions: &'v [Version], asked: &Asked<'_>) -> Option<&'v Version> {
        let there = self.weights.iter().filter_map(|(name, weight)| {
            let version = known(versions, name).filter(|version| !version.is_gone(asked.now))?;
            Some((version, u64::from(*weight)))
        });
        let there: Vec<(&Version, u64)> = there.collect();
        let all: u64 = there.iter().map(|(_, weight)| weight).sum();
        if all == 0 {
            return None;
        }
        let mut at = match self.sticky {
            // In proportion, so that a version whose share grows keeps those that it has.
            true => {
                let digest = Sha256::new().chain_update(&self.route).chain_update([0]).chain_update((asked.caller)());
                let first = digest.finalize().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte));
                ((u128::from(first) * u128::from(all)) >> 64) as u64
            }
            false => rand::rng().random_range(0..all),
        };
        there
            .into_iter()
            .find(|(_, weight)| match at.checked_sub(*weight) {
                Some(rest) => {
                    at = rest;
                    false
                }
                None => true,
            })
            .map(|(version, _)| version)
    }

    /// The shares of whoever names no version, in words; `None` if all get the same.
    pub(crate) fn weights(&self) -> Option<String> {
        let words = self.weights.iter().map(|(name, weight)| format!("{name} {weight}")).collect::<Vec<_>>().join(", ");
        (!words.is_empty()).then_some(words)
    }

    fn picked<'a>(
        &'a self,
        versions: &[Version],
        version: &Version,
        by: Option<&'a VersionSource>,
        asked: &Asked<'_>,
    ) -> Result<Picked<'a>, Problem> {
        let vary = self.vary.iter().map(|fields| (header::VARY, fields.clone()));
        let successor = version.successor.as_ref().and_then(|name| self.successor(name, asked));
        let headers = version.headers.iter().cloned().chain(successor);
        if version.is_gone(asked.now) {
            let what = format!("version {} is gone", version.name);
            let mut problem = self.refusal(StatusCode::GONE, "version-gone", &what, versions);
            problem.headers.extend(headers);
            return Err(problem);
        }
        Ok(Picked { version: version.name.clone(), by, headers: headers.chain(vary).collect() })
    }

    /// Where the same is in another version (RFC 5829 §3.2); `None` if its URL does not say the version.
    fn successor(&self, name: &str, asked: &Asked<'_>) -> Option<(HeaderName, HeaderValue)> {
        let place = self.from.iter().find(|place| matches!(place, VersionSource::Path | VersionSource::Query(_)))?;
        // Two slashes would lead to another host.
        let path = asked.path.trim_start_matches('/');
        let is_plain = |query: &&str| query.bytes().all(|b| b.is_ascii_graphic() && !b"<>\"".contains(&b));
        let query = asked.query.filter(|query| !query.is_empty()).filter(is_plain);
        let target = match place {
            VersionSource::Path => match query {
                Some(query) => format!("/{name}/{path}?{query}"),
                None => format!("/{name}/{path}"),
            },
            VersionSource::Query(key) => {
                let others = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
                let others = others.filter(|pair| pair.split('=').next() != Some(key));
                let query = others.map(str::to_owned).chain([format!("{key}={name}")]).collect::<Vec<_>>().join("&");
                format!("/{path}?{query}")
            }
            _ => return None,
        };
        Some((header::LINK, HeaderValue::try_from(format!("<{target}>; rel=\"successor-version\"")).ok()?))
    }

    /// A version that there is not; as far as is known, if the mesh has not been heard yet.
    fn unknown(&self, status: StatusCode, versions: &[Version]) -> Problem {
        match self.versions {
            Table::Announced { settled: false, .. } => self.absent("the versions that there are are not known yet"),
            _ => self.refusal(status, "unknown-version", "there is no such version", versions),
        }
    }

    /// Not the caller's fault.
    fn absent(&self, detail: &str) -> Problem {
        let problem = Problem::proxy(StatusCode::SERVICE_UNAVAILABLE, ProxyError::DestinationUnavailable, detail);
        self.varied(problem.retry_after(Duration::from_secs(1)))
    }

    fn refusal(&self, status: StatusCode, kind: &'static str, what: &str, versions: &[Version]) -> Problem {
        let known = versions.iter().map(|version| version.name.as_str()).collect::<Vec<_>>().join(", ");
        self.varied(Problem::policy(status, kind, format!("{what}; known versions: {known}")))
    }

    fn varied(&self, problem: Problem) -> Problem {
        match &self.vary {
            Some(fields) => problem.with_header(header::VARY, fields.clone()),
            None => problem,
        }
    }

    /// The ways to read a path, of which the first that leads to a route is meant: a version before the route's path,
    /// one right after it, none.
    fn readings<'a>(&self, path: &'a str) -> impl Iterator<Item = Reading<'a>> {
        let by_path = self.from.contains(&VersionSource::Path);
        let after = depth(&self.route);
        let before = by_path.then(|| self.reading(path, 0)).flatten();
        let after = (by_path && after > 0 && covers(&self.route, path)).then(|| self.reading(path, after)).flatten();
        let plain = Reading { path: Cow::Borrowed(path), named: None };
        [before, after, Some(plain)].into_iter().flatten().filter(|reading| covers(&self.route, &reading.path))
    }

    /// The path with its segment number `at` as a version, if it looks like one.
    fn reading<'a>(&self, path: &'a str, at: usize) -> Option<Reading<'a>> {
        let start = path.match_indices('/').nth(at)?.0;
        let segment = path[start + 1..].split('/').next()?;
        if !self.segments.contains(segment) && !looks_like_version(segment) {
            return None;
        }
        let rest = [&path[..start], &path[start + 1 + segment.len()..]].concat();
        let rest = if rest.is_empty() { "/".to_owned() } else { rest };
        Some(Reading { path: Cow::Owned(rest), named: Some((segment, at)) })
    }
}

fn known<'v>(versions: &'v [Version], name: &str) -> Option<&'v Version> {
    versions.iter().find(|version| version.name == name)
}

/// What one place says, which may say it more than once.
fn one<'v, 'n>(versions: &'v [Version], names: impl IntoIterator<Item = &'n str>) -> Said<'v> {
    let mut names = names.into_iter();
    let Some(first) = names.next() else { return Said::Nothing };
    if names.any(|name| name != first) {
        return Said::Contradiction;
    }
    known(versions, first).map_or(Said::Unknown, Said::This)
}

/// The version of the media type that the caller likes best among those with a version we know (RFC 9110 §12.5.1).
fn accepted<'v>(versions: &'v [Version], headers: &HeaderMap, prefix: &str, suffix: &str) -> Said<'v> {
    let ranges = headers.get_all(header::ACCEPT).iter().map(text).flat_map(|value| value.split(','));
    let mut best: Option<(f32, &Version)> = None;
    let mut unknown = false;
    for range in ranges {
        let mut params = range.split(';').map(str::trim);
        // Media types have no letter case (RFC 9110 §8.3.1), and so has the version in one.
        let media_type = params.next().unwrap_or_default().to_ascii_lowercase();
        let Some(name) = media_type.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(suffix)) else {
            continue;
        };
        let quality = params.find_map(|param| param.strip_prefix("q=").or_else(|| param.strip_prefix("Q=")));
        let quality = quality.map_or(1.0, |quality| quality.parse::<f32>().unwrap_or(0.0));
        if quality <= 0.0 || quality.is_nan() {
            continue;
        }
        match versions.iter().find(|version| version.name.eq_ignore_ascii_case(name)) {
            Some(version) if best.is_none_or(|(most, _)| quality > most) => best = Some((quality, version)),
            Some(_) => {}
            None => unknown = true,
        }
    }
    match best {
        Some((_, version)) => Said::This(version),
        None if unknown => Said::Unknown,
        None => Said::Nothing,
    }
}

/// `v` and digits: what people try when they look for another version.
fn looks_like_version(segment: &str) -> bool {
    segment.strip_prefix('v').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The text of a field, or one that is no version's name.
fn text(value: &HeaderValue) -> &str {
    value.to_str().map_or("", str::trim)
}

/// All values of a query parameter. Names of versions need no escapes, so none are undone.
fn values<'a>(query: Option<&'a str>, name: &str) -> impl Iterator<Item = &'a str> {
    query.unwrap_or_default().split('&').filter_map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// The fields of a version. Those that cannot be written are left out; checked values always can.
fn headers(info: &VersionInfo) -> Vec<(HeaderName, HeaderValue)> {
    let deprecation = info.deprecated.and_then(|date| {
        let date = sfv::Date::from_unix_seconds(date.unix().try_into().ok()?);
        let item = ItemSerializer::new().bare_item(date).finish();
        Some((HeaderName::from_static("deprecation"), HeaderValue::try_from(item).ok()?))
    });
    let sunset = info.sunset.and_then(|date| {
        let date = httpdate::fmt_http_date(date.into());
        Some((HeaderName::from_static("sunset"), HeaderValue::try_from(date).ok()?))
    });
    let link = info.link.as_ref().and_then(|link| {
        let link = format!("<{}>; rel=\"deprecation\"", link.as_str());
        Some((header::LINK, HeaderValue::try_from(link).ok()?))
    });
    [deprecation, sunset, link].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use http::Method;

    use super::*;
    use crate::route::Query;

    fn section(route: &str, from: &str, default: &str) -> config::Version {
        toml::from_str(&format!(
            "route = {route:?}\nfrom = {from}\n{default}\n[versions]\n\
             v1 = {{ deprecated = \"2026-01-01\", sunset = \"2027-01-01\", link = \"https://a.example/b\" }}\nv2 = {{}}"
        ))
        .unwrap()
    }

    fn versions<const N: usize>(sections: [config::Version; N]) -> Versions {
        let known: Vec<_> = sections.iter().map(listed).collect();
        Versions::new(sections.iter().zip(&known))
    }

    fn listed(section: &config::Version) -> KnownVersions {
        KnownVersions::Listed(section.versions.here().unwrap().clone())
    }

    fn picker(section: &config::Version) -> Picker {
        Picker::new(section, &listed(section))
    }

    /// What nodes announce of the service `s`.
    fn announced(versions: &[&str], settled: bool) -> KnownVersions {
        let versions = versions.iter().map(|name| ((*name).to_owned(), VersionInfo::default())).collect();
        KnownVersions::Announced { by_service: [("s".parse().unwrap(), versions)].into(), settled }
    }

    fn asked<'a>(headers: &'a HeaderMap, now: SystemTime) -> Asked<'a> {
        static SERVICE: LazyLock<Name> = LazyLock::new(|| "s".parse().unwrap());
        Asked { named: None, path: "/orders/1", service: &SERVICE, query: None, headers, caller: &String::new, now }
    }

    const ALL: &str =
        r#"["path", "header:x-api-version", "accept:application/vnd.example.{version}+json", "query:version"]"#;

    fn at(date: &str) -> SystemTime {
        starling_node::config::Date::try_from(date.to_owned()).unwrap().into()
    }

    fn get(host: &str) -> Sought<'_> {
        static NONE: LazyLock<HeaderMap> = LazyLock::new(HeaderMap::new);
        static ALL: LazyLock<Query<'static>> = LazyLock::new(|| Query::new(None));
        Sought { host, method: &Method::GET, headers: &NONE, query: &ALL }
    }

    fn routes(paths: &[&str]) -> Routes<Route> {
        let route = |path: &&str| -> Route {
            let (host, path) = path.split_once('/').unwrap();
            let host = if host.is_empty() { "*" } else { host };
            toml::from_str(&format!("host = {host:?}\npath = \"/{path}\"\nservice = \"s\"\nauth = []")).unwrap()
        };
        Routes::new(paths.iter().map(route))
    }

    #[test]
    fn a_path_leads_to_one_route_whichever_way_it_names_the_version() {
        let versions = versions([section("/orders", ALL, "")]);
        let routes = routes(&["/", "/orders", "/orders/admin", "/v7", "b.example/"]);
        // Host and path; the route, the path that the service sees, the version named, whether one is picked.
        for (request, want) in [
            ("a/orders/7", ("/orders", "/orders/7", None, true)),
            ("a/v1/orders/7", ("/orders", "/orders/7", Some("v1"), true)),
            ("a/orders/v1/7", ("/orders", "/orders/7", Some("v1"), true)),
            ("a/orders/v1", ("/orders", "/orders", Some("v1"), true)),
            ("a/orders/v1/", ("/orders", "/orders/", Some("v1"), true)),
            ("a/v9/orders/7", ("/orders", "/orders/7", Some("v9"), true)),
            ("a/orders/v9/7", ("/orders", "/orders/7", Some("v9"), true)),
            ("a/orders/vx/7", ("/orders", "/orders/vx/7", None, true)),
            ("a/ordersx/v1", ("/", "/ordersx/v1", None, false)),
            ("a/v1/ordersx", ("/", "/v1/ordersx", None, false)),
            ("a/v1", ("/", "/v1", None, false)),
            // No version hides a path from the route that guards it.
            ("a/v1/orders/admin", ("/orders/admin", "/orders/admin", Some("v1"), true)),
            ("a/orders/v1/admin", ("/orders/admin", "/orders/admin", Some("v1"), true)),
            ("a/orders/admin/v1", ("/orders/admin", "/orders/admin/v1", None, true)),
            ("a/v1/orders/v2/admin", ("/orders", "/orders/v2/admin", Some("v1"), true)),
            ("a/v1/v1/orders/admin", ("/", "/v1/v1/orders/admin", None, false)),
            // A route that names the segment itself.
            ("a/v7/orders", ("/v7", "/v7/orders", None, false)),
            // Another host's API of the same path.
            ("b.example/orders/v1/7", ("/", "/orders/v1/7", None, false)),
        ] {
            let (host, path) = request.split_at(request.find('/').unwrap());
            let found = versions.find(&routes, &get(host), path).unwrap();
            let got =
                (found.route.path.as_str(), &*found.path, found.named.map(|(name, _)| name), found.picker.is_some());
            assert_eq!(got, want, "{request}");
            assert_eq!(routes.find(&get(host), &found.path).unwrap(), found.route, "{request}: policy of another path");
        }
        assert!(versions.find(&self::routes(&["/orders"]), &get("a"), "/v1/other").is_none());
    }

    #[test]
    fn at_the_root_and_without_path_versions() {
        let versions = versions([section("/", ALL, ""), section("/orders", r#"["query:v"]"#, "")]);
        let routes = routes(&["/", "/orders"]);
        for (path, want) in [
            ("/v1/a", ("/", "/a", Some("v1"))),
            ("/v1", ("/", "/", Some("v1"))),
            ("/a/v1", ("/", "/a/v1", None)),
            ("/orders/v1", ("/orders", "/orders/v1", None)),
        ] {
            let found = versions.find(&routes, &get("a"), path).unwrap();
            assert_eq!((found.route.path.as_str(), &*found.path, found.named.map(|(name, _)| name)), want, "{path}");
        }
    }

    #[test]
    fn places_are_asked_in_the_written_order() {
        let from_all = picker(&section("/orders", ALL, "default = \"v2\""));
        let query_first = picker(&section("/orders", r#"["query:version", "path"]"#, ""));
        type Row<'a> = (&'a Picker, Option<&'a str>, &'a str, &'a [(&'static str, &'a str)], Result<&'a str, u16>);
        let media = |v: &str| format!("application/vnd.example.{v}+json");
        let rows: &[Row<'_>] = &[
            (&from_all, None, "", &[], Ok("v2")),
            (&from_all, Some("v1"), "version=v2", &[("x-api-version", "v2")], Ok("v1")),
            (&from_all, None, "version=v2", &[("x-api-version", "v1")], Ok("v1")),
            (&from_all, None, "a=b&version=v1", &[], Ok("v1")),
            (&from_all, None, "xversion=v1", &[], Ok("v2")),
            (&from_all, None, "version=v1&version=v1", &[], Ok("v1")),
            (&from_all, None, "version=v1&version=v2", &[], Err(400)),
            (&from_all, None, "version=v3", &[], Err(400)),
            (&from_all, None, "version=", &[], Err(400)),
            (&from_all, None, "version", &[], Err(400)),
            (&from_all, None, "", &[("x-api-version", "v3")], Err(400)),
            (&from_all, None, "", &[("x-api-version", "V1")], Err(400)),
            (&from_all, None, "", &[("x-api-version", "v1"), ("x-api-version", "v2")], Err(400)),
            (&from_all, None, "", &[("x-api-version", "v1, v2")], Err(400)),
            (&from_all, None, "", &[("x-api-version", "")], Err(400)),
            (&from_all, None, "", &[("accept", &media("v1"))], Ok("v1")),
            (&from_all, None, "", &[("accept", &media("V1").to_uppercase())], Ok("v1")),
            (&from_all, None, "", &[("accept", "text/html, */*")], Ok("v2")),
            (&from_all, None, "", &[("accept", &format!("{};q=0.5, {}", media("v2"), media("v1")))], Ok("v1")),
            (&from_all, None, "", &[("accept", "*/*"), ("accept", &media("v1"))], Ok("v1")),
            (&from_all, None, "", &[("accept", &format!("{}, {}", media("v9"), media("v1")))], Ok("v1")),
            (&from_all, None, "", &[("accept", &media("v9"))], Err(400)),
            (&from_all, None, "", &[("accept", &format!("{};q=0", media("v1")))], Ok("v2")),
            (&from_all, Some("v9"), "", &[], Err(404)),
            (&query_first, Some("v1"), "version=v2", &[], Ok("v2")),
            (&query_first, Some("v9"), "version=v2", &[], Err(404)),
            (&query_first, None, "", &[("x-api-version", "v1")], Err(400)),
        ];
        for (picker, named, query, fields, want) in rows {
            let mut headers = HeaderMap::new();
            for (name, value) in *fields {
                headers.append(*name, HeaderValue::from_str(value).unwrap());
            }
            let asked = Asked { named: *named, query: Some(query), ..asked(&headers, at("2026-06-01")) };
            let got = picker.pick(&asked);
            if let Err(problem) = &got {
                assert!(problem.detail.ends_with("known versions: v1, v2"), "{}", problem.detail);
            }
            let got = got.map(|picked| picked.version).map_err(|problem| problem.status.as_u16());
            assert_eq!(got.as_deref().map_err(|status| *status), *want, "{named:?} {query:?} {fields:?}");
        }
        assert!(from_all.pick(&asked(&HeaderMap::new(), at("2026-06-01"))).is_ok());
    }

    #[test]
    fn an_old_version_says_so_and_then_is_gone() {
        let picker = picker(&section("/orders", ALL, ""));
        let none = HeaderMap::new();
        let pick = |named, now| picker.pick(&Asked { named: Some(named), ..asked(&none, now) });
        let fields = [
            ("deprecation", "@1767225600"),
            ("sunset", "Fri, 01 Jan 2027 00:00:00 GMT"),
            ("link", "<https://a.example/b>; rel=\"deprecation\""),
            ("vary", "accept, x-api-version"),
        ];
        let sunset = at("2027-01-01");
        let picked = pick("v1", sunset - Duration::from_secs(1)).unwrap();
        let got: Vec<_> = picked.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(got, fields);
        let gone = pick("v1", sunset).unwrap_err();
        assert_eq!((gone.status, gone.kind), (StatusCode::GONE, Some("version-gone")));
        for (name, value) in fields {
            assert_eq!(gone.headers[name], value);
        }
        let fresh = pick("v2", sunset).unwrap();
        assert_eq!(fresh.headers, [(header::VARY, HeaderValue::from_static("accept, x-api-version"))]);
    }

    #[test]
    fn who_uses_an_old_version_is_told_where_the_new_one_is() {
        let none = HeaderMap::new();
        for (from, default, link) in [
            (
                r#"["header:v", "path"]"#,
                "default = \"v2\"",
                Some("</v2/orders/1?version=v1>; rel=\"successor-version\""),
            ),
            (r#"["path"]"#, "", None),
            (r#"["query:version"]"#, "default = \"v2\"", Some("</orders/1?version=v2>; rel=\"successor-version\"")),
            (r#"["header:v"]"#, "default = \"v2\"", None),
        ] {
            let picker = picker(&section("/orders", from, default));
            for (version, link) in [("v1", link), ("v2", None)] {
                let (mut headers, query) = (none.clone(), format!("version={version}"));
                headers.insert("v", version.parse().unwrap());
                let named = from.contains("path").then_some(version);
                let asked = Asked { named, query: Some(&query), ..asked(&headers, at("2026-06-01")) };
                let picked = picker.pick(&asked).unwrap();
                let links: Vec<_> = picked.headers.iter().filter(|(name, _)| *name == header::LINK).collect();
                let successor = links.iter().map(|(_, value)| text(value)).find(|link| link.contains("successor"));
                assert_eq!(successor, link, "{from} {version}");
            }
        }
    }

    #[test]
    fn who_names_no_version_gets_one_by_weight_and_may_stay_with_it() {
        let none = HeaderMap::new();
        let of = |caller: &str, picker: &Picker| {
            let caller = || caller.to_owned();
            picker.pick(&Asked { caller: &caller, ..asked(&none, at("2026-06-01")) }).unwrap().version
        };
        let weighted = |v1: u32, v2: u32, sticky: bool| {
            picker(&section("/orders", ALL, &format!("sticky = {sticky}\nweights = {{ v1 = {v1}, v2 = {v2} }}")))
        };
        let (some, more) = (weighted(90, 10, true), weighted(70, 30, true));
        assert_eq!(more.weights().unwrap(), "v1 70, v2 30");
        let mut counts = [0, 0];
        for n in 0..2000 {
            let caller = format!("consumer {n}");
            let first = of(&caller, &some);
            assert_eq!(first, of(&caller, &some));
            let later = of(&caller, &more);
            assert!(first == "v1" || later == "v2", "who has the new one keeps it");
            counts[0] += usize::from(first == "v2");
            counts[1] += usize::from(later == "v2");
        }
        assert!((140..=270).contains(&counts[0]) && (500..=700).contains(&counts[1]), "{counts:?}");
        let loose = weighted(1, 1, false);
        let both: BTreeSet<String> = (0..200).map(|_| of("a", &loose)).collect();
        assert_eq!(both.len(), 2);
        // Of the weights those count that somebody serves, and that are not gone.
        let section = section("/orders", ALL, "weights = { v1 = 1, v2 = 99 }");
        assert_eq!(of("a", &Picker::new(&section, &announced(&["v1", "v3"], true))), "v1");
        let late = Asked { ..asked(&none, at("2027-06-01")) };
        assert_eq!(picker(&section).pick(&late).unwrap().version, "v2");
        for known in [&[][..], &["v3"]] {
            let nobody = Picker::new(&section, &announced(known, true));
            let refused = nobody.pick(&asked(&none, at("2026-06-01"))).unwrap_err();
            assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{known:?}");
        }
    }

    #[test]
    fn what_nodes_announce_moves_no_path_and_no_other_service() {
        let none = HeaderMap::new();
        let section = section("/orders", ALL, "default = \"stable\"");
        let known = announced(&["v1", "stable", "2", "shop"], true);
        let (picker, versions) = (Picker::new(&section, &known), Versions::new([(&section, &known)]));
        let routes = routes(&["/", "/orders"]);
        // A node's word is no segment, unless it looks like a version or the file has it.
        for (path, want) in [
            ("/orders/2", ("/orders", "/orders/2", None)),
            ("/shop/orders/5", ("/", "/shop/orders/5", None)),
            ("/orders/v1/5", ("/orders", "/orders/5", Some("v1"))),
            ("/stable/orders/5", ("/orders", "/orders/5", Some("stable"))),
        ] {
            let found = versions.find(&routes, &get("a"), path).unwrap();
            assert_eq!((found.route.path.as_str(), &*found.path, found.named.map(|(name, _)| name)), want, "{path}");
        }
        let mut headers = HeaderMap::new();
        headers.insert("x-api-version", "shop".parse().unwrap());
        let now = at("2026-06-01");
        assert_eq!(picker.pick(&asked(&headers, now)).unwrap().version, "shop");
        let other: Name = "other".parse().unwrap();
        let of_other = Asked { service: &other, ..asked(&headers, now) };
        assert_eq!(picker.pick(&of_other).unwrap_err().status, StatusCode::SERVICE_UNAVAILABLE);
        // Before the mesh is heard, nobody is told that there is no such version.
        for (settled, status) in [(true, 404), (false, 503)] {
            let picker = Picker::new(&section, &announced(&["v1"], settled));
            let asked = Asked { named: Some("v2"), ..asked(&none, now) };
            assert_eq!(picker.pick(&asked).unwrap_err().status, status);
        }
    }

    #[test]
    fn a_default_that_nobody_serves_is_no_fault_of_the_caller() {
        let picker = Picker::new(&section("/orders", ALL, "default = \"v2\""), &announced(&["v1"], true));
        let refused = picker.pick(&asked(&HeaderMap::new(), at("2026-06-01"))).unwrap_err();
        assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    }
}
