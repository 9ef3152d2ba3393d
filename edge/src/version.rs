//! Versions of an API: which one a request means, and what to tell its caller about it.

#![allow(clippy::result_large_err, reason = "a problem is made once for a refused request, and rendered at once")]

use std::{
    borrow::{Borrow, Cow},
    collections::BTreeSet,
    time::SystemTime,
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use sfv::ItemSerializer;
use starling_http::Problem;

use crate::{
    config::{self, Route, VersionInfo, VersionSource},
    route::{Routes, covers, depth},
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
    /// The version that the path named, known or not; for [`Picker::pick`].
    pub(crate) named: Option<&'p str>,
}

impl Versions {
    /// Takes the sections in any order.
    pub(crate) fn new(versions: &[config::Version]) -> Self {
        let mut pickers: Vec<_> = versions.iter().map(Picker::new).collect();
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
        host: &str,
        path: &'p str,
    ) -> Option<Found<'r, 'p, T>> {
        let plain = routes.find(host, path);
        let plain_depth = plain.map_or(0, |route| depth(&route.borrow().path));
        for picker in &self.0 {
            for Reading { path, named } in picker.readings(path) {
                if named.is_some_and(|(_, at)| at < plain_depth) {
                    continue;
                }
                if let Some(route) = routes.find(host, &path)
                    && covers(&picker.route, &route.borrow().path)
                {
                    return Some(Found { route, path, picker: Some(picker), named: named.map(|(name, _)| name) });
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

/// Picks the version of a request to one API.
#[derive(Debug, Clone)]
pub(crate) struct Picker {
    route: String,
    from: Vec<VersionSource>,
    default: Option<String>,
    versions: Vec<Version>,
    /// The fields that decide, for caches (RFC 9110 §12.5.5).
    vary: Option<HeaderValue>,
}

#[derive(Debug, Clone)]
struct Version {
    name: String,
    sunset: Option<SystemTime>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// The version of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Picked<'a> {
    /// Its name.
    pub(crate) version: String,
    /// Where the request named it; `None` if it is the default.
    pub(crate) by: Option<&'a VersionSource>,
    /// Fields to append to the answer, whoever makes it: Deprecation (RFC 9745), Sunset (RFC 8594), Link (RFC 8288),
    /// Vary.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
}

/// What a request says at one place.
enum Said<'a> {
    Nothing,
    This(&'a Version),
    Unknown,
    Contradiction,
}

impl Picker {
    /// Takes one section.
    pub(crate) fn new(config: &config::Version) -> Self {
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
        let version = |(name, info): (&String, &VersionInfo)| Version {
            name: name.clone(),
            sunset: info.sunset.map(SystemTime::from),
            headers: headers(info),
        };
        Self {
            route: config.route.clone(),
            from: config.from.clone(),
            default: config.default.clone(),
            versions: config.versions.iter().map(version).collect(),
            vary,
        }
    }

    /// Picks the version: the first place in the written order that names one, else the default.
    ///
    /// `named` is what [`Versions::find`] took out of the path. Problems: 404 for a version in the path that there is
    /// not, 400 for one anywhere else, for none where there is no default, and for two at one place; 410 after its
    /// sunset.
    pub(crate) fn pick(
        &self,
        named: Option<&str>,
        query: Option<&str>,
        headers: &HeaderMap,
        now: SystemTime,
    ) -> Result<Picked<'_>, Problem> {
        let in_path = named.map_or(Said::Nothing, |name| self.one([name]));
        if matches!(in_path, Said::Unknown) {
            return Err(self.refusal(StatusCode::NOT_FOUND, "unknown-version", "there is no such version"));
        }
        for source in &self.from {
            let said = match source {
                VersionSource::Path => named.map_or(Said::Nothing, |name| self.one([name])),
                VersionSource::Header(name) => self.one(headers.get_all(name).iter().map(text)),
                VersionSource::Query(name) => self.one(values(query, name)),
                VersionSource::Accept { prefix, suffix } => self.accepted(headers, prefix, suffix),
            };
            match said {
                Said::Nothing => {}
                Said::This(version) => return self.picked(version, Some(source), now),
                Said::Unknown => {
                    return Err(self.refusal(StatusCode::BAD_REQUEST, "unknown-version", "there is no such version"));
                }
                Said::Contradiction => {
                    return Err(self.refusal(
                        StatusCode::BAD_REQUEST,
                        "unknown-version",
                        "more than one version is named",
                    ));
                }
            }
        }
        match self.default.as_deref().and_then(|name| self.known(name)) {
            Some(version) => self.picked(version, None, now),
            None => Err(self.refusal(StatusCode::BAD_REQUEST, "version-required", "no version is named")),
        }
    }

    fn picked<'a>(
        &'a self,
        version: &Version,
        by: Option<&'a VersionSource>,
        now: SystemTime,
    ) -> Result<Picked<'a>, Problem> {
        let vary = self.vary.iter().map(|fields| (header::VARY, fields.clone()));
        if version.sunset.is_some_and(|sunset| now >= sunset) {
            let mut problem =
                self.refusal(StatusCode::GONE, "version-gone", &format!("version {} is gone", version.name));
            problem.headers.extend(version.headers.iter().cloned());
            return Err(problem);
        }
        Ok(Picked { version: version.name.clone(), by, headers: version.headers.iter().cloned().chain(vary).collect() })
    }

    fn refusal(&self, status: StatusCode, kind: &'static str, what: &str) -> Problem {
        let known = self.versions.iter().map(|version| version.name.as_str()).collect::<Vec<_>>().join(", ");
        let problem = Problem::policy(status, kind, format!("{what}; known versions: {known}"));
        match &self.vary {
            Some(fields) => problem.with_header(header::VARY, fields.clone()),
            None => problem,
        }
    }

    fn known(&self, name: &str) -> Option<&Version> {
        self.versions.iter().find(|version| version.name == name)
    }

    /// What one place says, which may say it more than once.
    fn one<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Said<'_> {
        let mut names = names.into_iter();
        let Some(first) = names.next() else { return Said::Nothing };
        if names.any(|name| name != first) {
            return Said::Contradiction;
        }
        self.known(first).map_or(Said::Unknown, Said::This)
    }

    /// The version of the media type that the caller likes best among those with a version we know (RFC 9110 §12.5.1).
    fn accepted(&self, headers: &HeaderMap, prefix: &str, suffix: &str) -> Said<'_> {
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
            match self.versions.iter().find(|version| version.name.eq_ignore_ascii_case(name)) {
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
        if self.known(segment).is_none() && !looks_like_version(segment) {
            return None;
        }
        let rest = [&path[..start], &path[start + 1 + segment.len()..]].concat();
        let rest = if rest.is_empty() { "/".to_owned() } else { rest };
        Some(Reading { path: Cow::Owned(rest), named: Some((segment, at)) })
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
    use std::time::Duration;

    use super::*;

    fn section(route: &str, from: &str, default: &str) -> config::Version {
        toml::from_str(&format!(
            "route = {route:?}\nfrom = {from}\n{default}\n[versions]\n\
             v1 = {{ deprecated = \"2026-01-01\", sunset = \"2027-01-01\", link = \"https://a.example/b\" }}\nv2 = {{}}"
        ))
        .unwrap()
    }

    const ALL: &str =
        r#"["path", "header:x-api-version", "accept:application/vnd.example.{version}+json", "query:version"]"#;

    fn at(date: &str) -> SystemTime {
        config::version::Date::try_from(date.to_owned()).unwrap().into()
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
        let versions = Versions::new(&[section("/orders", ALL, "")]);
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
            let found = versions.find(&routes, host, path).unwrap();
            let got = (found.route.path.as_str(), &*found.path, found.named, found.picker.is_some());
            assert_eq!(got, want, "{request}");
            assert_eq!(routes.find(host, &found.path).unwrap(), found.route, "{request}: policy of another path");
        }
        assert!(versions.find(&self::routes(&["/orders"]), "a", "/v1/other").is_none());
    }

    #[test]
    fn at_the_root_and_without_path_versions() {
        let versions = Versions::new(&[section("/", ALL, ""), section("/orders", r#"["query:v"]"#, "")]);
        let routes = routes(&["/", "/orders"]);
        for (path, want) in [
            ("/v1/a", ("/", "/a", Some("v1"))),
            ("/v1", ("/", "/", Some("v1"))),
            ("/a/v1", ("/", "/a/v1", None)),
            ("/orders/v1", ("/orders", "/orders/v1", None)),
        ] {
            let found = versions.find(&routes, "a", path).unwrap();
            assert_eq!((found.route.path.as_str(), &*found.path, found.named), want, "{path}");
        }
    }

    #[test]
    fn places_are_asked_in_the_written_order() {
        let from_all = Picker::new(&section("/orders", ALL, "default = \"v2\""));
        let query_first = Picker::new(&section("/orders", r#"["query:version", "path"]"#, ""));
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
            let got = picker.pick(*named, Some(query), &headers, at("2026-06-01"));
            if let Err(problem) = &got {
                assert!(problem.detail.ends_with("known versions: v1, v2"), "{}", problem.detail);
            }
            let got = got.map(|picked| picked.version).map_err(|problem| problem.status.as_u16());
            assert_eq!(got.as_deref().map_err(|status| *status), *want, "{named:?} {query:?} {fields:?}");
        }
        assert!(from_all.pick(None, None, &HeaderMap::new(), at("2026-06-01")).is_ok());
    }

    #[test]
    fn an_old_version_says_so_and_then_is_gone() {
        let picker = Picker::new(&section("/orders", ALL, ""));
        let pick = |named, now| picker.pick(Some(named), None, &HeaderMap::new(), now);
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
}
