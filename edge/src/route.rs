//! From a host and a path to a route, over one spelling of each path.

use std::{borrow::Borrow, borrow::Cow};

use crate::config::{Host, Route};

/// Routes, or whatever carries one, in the order in which they are tried.
#[derive(Debug, Clone)]
pub(crate) struct Routes<T>(Vec<T>);

impl<T: Borrow<Route>> Routes<T> {
    /// Takes routes in any order. No two may have the same host and path, which `config::check` sees to.
    pub(crate) fn new(routes: impl IntoIterator<Item = T>) -> Self {
        let mut routes: Vec<T> = routes.into_iter().collect();
        routes.sort_by_key(|route| {
            let Route { host, path, .. } = route.borrow();
            let host = match host {
                Host::Exact(_) => (2, 0),
                Host::Under(domain) => (1, domain.len()),
                Host::Any => (0, 0),
            };
            std::cmp::Reverse((host, depth(path)))
        });
        Self(routes)
    }

    /// The route of a request: of those that match both host and path, the one with the most specific host (a name,
    /// then the longest wildcard, then `*`), and among these the longest path.
    ///
    /// `host` may carry a port and any letter case; `path` must have come through [`canonical_path`].
    pub(crate) fn find(&self, host: &str, path: &str) -> Option<&T> {
        let host = bare_host(host);
        self.0.iter().find(|route| {
            let route: &Route = (*route).borrow();
            let host_matches = match &route.host {
                Host::Any => true,
                Host::Under(domain) => host.len() > domain.len() && host.ends_with(domain.as_str()),
                Host::Exact(name) => *name == host,
            };
            host_matches && covers(&route.path, path)
        })
    }

    /// All of them, most specific first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

/// A host without its port and final dot, in lower case (RFC 3986 §3.2.2).
pub(crate) fn bare_host(authority: &str) -> String {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

/// The segments of a path that count for a match: not the empty ones, and each without its parameters.
///
/// Some servers drop what follows a `;`, so that `/admin;x` is `/admin` to them: it has to be so for a route as well.
pub(crate) fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty()).map(without_params)
}

/// How many segments a path has.
pub(crate) fn depth(path: &str) -> usize {
    segments(path).count()
}

/// Whether a path is `prefix` or lies below it, on whole segments: `/orders` covers `/orders/1`, not `/ordersx`.
pub(crate) fn covers(prefix: &str, path: &str) -> bool {
    let mut path = segments(path);
    segments(prefix).all(|segment| path.next() == Some(segment))
}

/// What is left of a path below a prefix that covers it; starts with `/`.
pub(crate) fn below<'a>(prefix: &str, path: &'a str) -> &'a str {
    // In a path that is passed on as it came, there may be empty segments.
    let ends = path.char_indices().skip(1).filter(|(at, c)| *c == '/' && !path[..*at].ends_with('/'));
    let mut ends = ends.map(|(at, _)| at);
    match depth(prefix) {
        0 => path,
        depth => ends.nth(depth - 1).map_or("/", |at| &path[at..]),
    }
}

fn without_params(segment: &str) -> &str {
    let end = segment.find(';').into_iter().chain(segment.find("%3B")).min();
    &segment[..end.unwrap_or(segment.len())]
}

/// The one spelling of a path, which policy looks at and the service gets: no `.`, `..` or empty segments inside,
/// unreserved characters never encoded, other escapes in upper case (RFC 3986 §6.2.2).
///
/// The error says why there is none, for a 400: nothing is let through that a service could read as another path, so no
/// encoded slash, backslash, control byte, or dots that hide behind `;`. `path` comes without its query.
pub(crate) fn canonical_path(path: &str) -> Result<Cow<'_, str>, &'static str> {
    spell(path, Slashes::Refused)
}

/// The two ways to read a path that is to be passed on as it came, each in its one spelling: with encoded slashes and
/// backslashes as a part of their segment, and as ends of it. Policy has to be the same for both.
///
/// The error is as in [`canonical_path`]. No dot segments, in either reading: a service may resolve them its own way.
pub(crate) fn readings(path: &str) -> Result<[String; 2], &'static str> {
    let split = decode_unreserved(path, Slashes::Split)?;
    if split.split('/').any(|segment| matches!(without_params(segment), "." | "..")) {
        return Err("a dot segment in a path that is passed on as it came");
    }
    Ok([spell(path, Slashes::Kept)?.into_owned(), spell(path, Slashes::Split)?.into_owned()])
}

/// What becomes of a slash or a backslash that is encoded.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Slashes {
    Refused,
    Kept,
    Split,
}

fn spell(path: &str, slashes: Slashes) -> Result<Cow<'_, str>, &'static str> {
    if !path.starts_with('/') {
        return Err("the path does not start with a slash");
    }
    let decoded = decode_unreserved(path, slashes)?;
    let mut segments: Vec<&str> = Vec::new();
    // After a dot segment the path ends in a slash, as a directory.
    let mut directory = false;
    for segment in decoded.split('/').skip(1) {
        directory = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." if segments.pop().is_none() => return Err("the path climbs above its root"),
            ".." => {}
            _ if matches!(without_params(segment), "." | "..") => return Err("a dot segment with parameters"),
            // To whoever drops parameters and empty segments, it is not there.
            _ if without_params(segment).is_empty() => return Err("a segment of parameters alone"),
            _ => segments.push(segment),
        }
    }
    let mut normal = String::with_capacity(decoded.len());
    for segment in &segments {
        normal.push('/');
        normal.push_str(segment);
    }
    if directory {
        normal.push('/');
    }
    Ok(if normal == path { Cow::Borrowed(path) } else { Cow::Owned(normal) })
}

fn decode_unreserved(path: &str, slashes: Slashes) -> Result<String, &'static str> {
    let mut decoded = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(c) = rest.chars().next() {
        if !matches!(c, '!'..='~') || matches!(c, '\\' | '?' | '#') {
            return Err("a character that a path may not have");
        }
        if c != '%' {
            decoded.push(c);
            rest = &rest[1..];
            continue;
        }
        let escape = rest.get(..3).ok_or("a broken percent escape")?;
        let byte = hex_byte(&escape[1..]).ok_or("a broken percent escape")?;
        match byte {
            b'/' | b'\\' if slashes == Slashes::Refused => return Err("an encoded slash or backslash"),
            b'/' | b'\\' if slashes == Slashes::Split => decoded.push('/'),
            0..0x20 | 0x7f => return Err("an encoded control character"),
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => decoded.push(char::from(byte)),
            _ => decoded.push_str(&escape.to_ascii_uppercase()),
        }
        rest = &rest[3..];
    }
    Ok(decoded)
}

fn hex_byte(digits: &str) -> Option<u8> {
    // `from_str_radix` would take a sign.
    digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u8::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(host: &str, path: &str) -> Route {
        toml::from_str(&format!("host = {host:?}\npath = {path:?}\nservice = \"s\"\nauth = []")).unwrap()
    }

    #[test]
    fn the_most_specific_route_wins() {
        let routes = Routes::new([
            route("*", "/"),
            route("*", "/orders"),
            route("*.example.com", "/"),
            route("*.eu.example.com", "/"),
            route("api.example.com", "/orders"),
            route("api.example.com", "/orders/open"),
            route("[::1]", "/"),
        ]);
        for (host, path, want) in [
            ("api.example.com", "/orders", "api.example.com/orders"),
            ("API.Example.COM.:8443", "/orders/1", "api.example.com/orders"),
            ("api.example.com", "/orders/open/1", "api.example.com/orders/open"),
            ("api.example.com", "/orders/opened", "api.example.com/orders"),
            ("api.example.com", "/ordersx", "*.example.com/"),
            ("a.b.example.com", "/orders", "*.example.com/"),
            ("a.eu.example.com", "/orders", "*.eu.example.com/"),
            ("example.com", "/orders/", "*/orders"),
            ("notexample.com", "/ordersx", "*/"),
            ("other", "/orders;v=1/2", "*/orders"),
            ("other", "/orders%3Bv=1/2", "*/orders"),
            ("[::1]:443", "/x", "[::1]/"),
            ("[::1]", "/x", "[::1]/"),
        ] {
            let found = routes.find(host, path).map(|route| format!("{}{}", route.host, route.path));
            assert_eq!(found.as_deref(), Some(want), "{host}{path}");
        }
        assert!(Routes::new([route("a.example", "/a")]).find("a.example", "/").is_none());
        assert!(Routes::new([route("a.example", "/")]).find("b.example", "/").is_none());
    }

    #[test]
    fn what_is_left_below_a_prefix() {
        for (prefix, path, want) in [
            ("/orders", "/orders/1", "/1"),
            ("/orders/", "/orders/1", "/1"),
            ("/orders", "/orders", "/"),
            ("/orders", "/orders/", "/"),
            ("/orders", "/orders;a=b/1/2", "/1/2"),
            ("/", "/orders/1", "/orders/1"),
            ("/a/b", "/a/b/c/", "/c/"),
            ("/a/b", "//a///b//c", "//c"),
            ("/a/b", "//a///b", "/"),
            ("/a", "/a%2Fb//c", "//c"),
        ] {
            assert_eq!(below(prefix, path), want, "{prefix} {path}");
        }
    }

    #[test]
    fn a_path_has_one_spelling() {
        for (path, want) in [
            ("/", "/"),
            ("/orders/1", "/orders/1"),
            ("/orders/", "/orders/"),
            ("/public/../admin", "/admin"),
            ("/public/%2e%2E/admin", "/admin"),
            ("/public/.%2e/admin", "/admin"),
            ("/public//../admin", "/admin"),
            ("/public/./..//admin/", "/admin/"),
            ("//admin", "/admin"),
            ("//", "/"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/%61dmin", "/admin"),
            ("/a%3ab%c3%a4", "/a%3Ab%C3%A4"),
            ("/a%252fb", "/a%252fb"),
            ("/a;x=1/b", "/a;x=1/b"),
            ("/...", "/..."),
            ("/..a/.b", "/..a/.b"),
        ] {
            let normal = canonical_path(path).unwrap();
            assert_eq!(normal, want, "{path}");
            assert_eq!(canonical_path(&normal).unwrap(), normal, "{path} is not stable");
            assert_eq!(matches!(normal, Cow::Borrowed(_)), path == want, "{path}");
        }
    }

    #[test]
    fn a_path_that_is_passed_on_as_it_came_has_two_readings() {
        for (path, kept, split) in [
            ("/a/b", "/a/b", "/a/b"),
            ("/a%2fb//%63", "/a%2Fb/c", "/a/b/c"),
            ("/a%5Cb", "/a%5Cb", "/a/b"),
            ("/x/http://y", "/x/http:/y", "/x/http:/y"),
        ] {
            assert_eq!(readings(path).unwrap(), [kept, split], "{path}");
        }
        for path in [
            "/a/../b",
            "/a%2F..%2Fb",
            "/a%5c%2e%2e/b",
            "/a%2f..;x=1%2fb",
            "/a/.",
            "/a/;x/b",
            "/a%2f;x%2fb",
            "/a%00",
            "/a\\b",
            "/a%2",
            "a",
        ] {
            assert!(readings(path).is_err(), "{path}");
        }
    }

    #[test]
    fn a_path_that_can_be_read_in_two_ways_is_refused() {
        for path in [
            "",
            "*",
            "orders",
            "/..",
            "/../a",
            "/a/../../b",
            "/%2e%2e/a",
            "/a%2fb",
            "/a%2Fb",
            "/a%5cb",
            "/a\\b",
            "/a%00",
            "/a%0d%0a",
            "/a%7f",
            "/a\0",
            "/a b",
            "/ä",
            "/a%",
            "/a%2",
            "/a%zz",
            "/a%+1",
            "/a%ä",
            "/public/..;/admin",
            "/public/;/admin",
            "/;x/admin",
            "/public/%3B/admin",
            "/public/..;x=1/admin",
            "/public/.;/admin",
            "/public/%2e%2e;/admin",
            "/public/..%3b/admin",
            "/a?b",
            "/a#b",
            "/a%\u{e9}1",
        ] {
            assert!(canonical_path(path).is_err(), "{path:?} became {:?}", canonical_path(path));
        }
    }
}
