//! The one normaliser: turns every request and response, whatever protocol it came by, into one checked form.
//!
//! Pure, so that it can be tested row by row. What it refuses is never forwarded; what it lets through means the same on
//! HTTP/1.1, 2 and 3 (RFC 9110 §7.6, RFC 9113 §8.2.2, RFC 9114 §4.2).

mod cookies;
mod fields;
mod request;
mod response;
mod trailers;

use http::StatusCode;

pub(crate) use self::response::clean_interim;
pub use self::{
    cookies::join_cookies,
    fields::{is_of_hops, number},
    request::{Checked, Tunnel, normalise_request, tunnel},
    response::normalise_response,
};
pub(crate) use self::{fields::content_length, trailers::clean_trailers};

/// Most fields in a head.
pub const MAX_FIELDS: usize = 100;

/// Most fields in a head from another node: an edge adds some to what it took.
pub const MAX_MESH_FIELDS: usize = MAX_FIELDS + 28;

/// Where a message comes from, which decides which of our own fields are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A local application or the internet: nothing of ours is believed.
    Outside,
    /// Another node, authenticated: its deadline, attempt and load are.
    Mesh,
    /// An edge, by its certificate: who the consumer is, too.
    Edge,
}

impl Origin {
    fn max_fields(self) -> usize {
        match self {
            Self::Outside => MAX_FIELDS,
            Self::Mesh | Self::Edge => MAX_MESH_FIELDS,
        }
    }
}

/// Why a message is refused. `status` is what the sender gets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Malformed {
    /// 400, 405, 414, 417, 431 or 501.
    pub status: StatusCode,
    /// What is wrong.
    pub reason: &'static str,
}

impl Malformed {
    /// A target that is not a path.
    pub const fn bad_target() -> Self {
        bad("the request target is not a path")
    }
}

impl From<Malformed> for crate::Problem {
    fn from(malformed: Malformed) -> Self {
        Self::proxy(malformed.status, crate::ProxyError::HttpRequestError, malformed.reason)
    }
}

const fn bad(reason: &'static str) -> Malformed {
    Malformed { status: StatusCode::BAD_REQUEST, reason }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, Method, Request, Version, request};
    use proptest::prelude::*;

    use super::*;
    use crate::tunnel::Protocol;

    fn request(version: Version, uri: &str, fields: &[(&str, &str)]) -> request::Parts {
        let mut builder = Request::builder().version(version).uri(uri);
        for (name, value) in fields {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    fn check(version: Version, uri: &str, fields: &[(&str, &str)]) -> Result<Checked, Malformed> {
        normalise_request(&mut request(version, uri, fields), Origin::Outside)
    }

    #[test]
    fn one_authority() {
        let h1 = |uri, fields: &[(&str, &str)]| check(Version::HTTP_11, uri, fields).map(|c| c.authority);
        assert_eq!(h1("/a", &[("host", "Orders.mesh")]).unwrap(), "orders.mesh");
        assert_eq!(h1("http://orders/a", &[("host", "orders")]).unwrap(), "orders");
        assert_eq!(h1("http://orders:80/a", &[("host", "orders")]).unwrap(), "orders:80");
        assert_eq!(h1("/a", &[]).unwrap_err().reason, "no Host");
        assert_eq!(h1("/a", &[("host", "a"), ("host", "a")]).unwrap_err().reason, "more than one Host");
        assert!(h1("http://a/", &[("host", "b")]).is_err());
        assert!(h1("/", &[("host", "user@a")]).is_err());
        assert!(h1("/", &[("host", "a b")]).is_err());
        for version in [Version::HTTP_2, Version::HTTP_3] {
            assert_eq!(check(version, "https://a:8443/", &[]).unwrap().authority, "a:8443");
            assert!(check(version, "https://a/", &[("host", "b")]).is_err());
            assert!(check(version, "/", &[]).is_err());
        }
    }

    #[test]
    fn a_target_starts_with_a_slash() {
        for (uri, target) in [("http://a", "/"), ("http://a?x=1", "/?x=1"), ("http://a#/b", "/"), ("http://a/b", "/b")]
        {
            let mut parts = request(Version::HTTP_11, uri, &[("host", "a")]);
            normalise_request(&mut parts, Origin::Outside).unwrap();
            assert_eq!(parts.uri.path_and_query().unwrap().as_str(), target, "{uri}");
        }
    }

    #[test]
    fn a_request_has_a_path() {
        for uri in [http::Uri::from_parts(http::uri::Parts::default()).unwrap(), http::Uri::from_static("a")] {
            let (mut parts, ()) = Request::new(()).into_parts();
            parts.uri = uri;
            parts.headers.insert("host", "a".parse().unwrap());
            assert!(normalise_request(&mut parts, Origin::Outside).is_err(), "{:?}", parts.uri);
        }
    }

    #[test]
    fn trailers_are_carried_for_who_says_so_as_http_has_it() {
        for (connection, te, left) in [
            ("TE", "trailers", true),
            ("keep-alive", "Trailers", true),
            ("te", "deflate;q=0.5, trailers", true),
            ("te", "deflate", false),
        ] {
            let mut parts = request(Version::HTTP_11, "/", &[("host", "a"), ("connection", connection), ("te", te)]);
            normalise_request(&mut parts, Origin::Outside).unwrap();
            let kept = parts.headers.get("te").map(|te| te.as_bytes());
            assert_eq!(kept, left.then_some(&b"trailers"[..]), "{connection}: {te}");
        }
    }

    #[test]
    fn connection_fields_go_or_are_refused() {
        let fields = [("host", "a"), ("connection", "x-hop, close"), ("x-hop", "1"), ("x-end", "2"), ("te", "gzip")];
        let mut parts = request(Version::HTTP_11, "/", &fields);
        normalise_request(&mut parts, Origin::Outside).unwrap();
        assert_eq!(parts.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
        for version in [Version::HTTP_2, Version::HTTP_3] {
            for (name, value) in [("connection", "close"), ("transfer-encoding", "chunked"), ("te", "gzip")] {
                assert!(check(version, "https://a/", &[(name, value)]).is_err(), "{name} on {version:?}");
            }
            assert!(check(version, "https://a/", &[("te", "trailers")]).is_ok());
        }
    }

    #[test]
    fn lengths_agree_or_are_refused() {
        let length = |fields: &[(&str, &str)]| {
            let fields = [&[("host", "a")], fields].concat();
            check(Version::HTTP_11, "/", &fields).map(|c| c.length)
        };
        assert_eq!(length(&[("content-length", "5")]).unwrap(), Some(5));
        assert_eq!(length(&[("content-length", "5, 5")]).unwrap(), Some(5));
        for bad in ["", "-1", "+5", "5,6", "0x5", "99999999999999999999999"] {
            assert!(length(&[("content-length", bad)]).is_err(), "{bad}");
        }
        assert!(length(&[("content-length", "5"), ("content-length", "6")]).is_err());
        assert!(length(&[("content-length", "5"), ("transfer-encoding", "chunked")]).is_err());
    }

    #[test]
    fn our_own_fields_are_not_believed_from_outside() {
        let own =
            ["starling-caller", "starling-deadline", "starling-consumer", "x-forwarded-client-cert", "starling_caller"];
        let mut fields = vec![("host", "a"), ("x-mine", "1")];
        fields.extend(own.iter().map(|name| (*name, "spoofed")));
        let mut parts = request(Version::HTTP_11, "/", &fields);
        normalise_request(&mut parts, Origin::Outside).unwrap();
        assert_eq!(parts.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-mine"]);

        let mut parts = request(Version::HTTP_11, "/", &fields);
        normalise_request(&mut parts, Origin::Mesh).unwrap();
        let mut kept: Vec<_> = parts.headers.keys().map(HeaderName::as_str).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["starling-deadline", "x-mine"]);
    }

    #[test]
    fn what_cannot_be_forwarded_is_refused() {
        let status = |method: Method, uri: &str, fields: &[(&str, &str)]| {
            let mut parts = request(Version::HTTP_11, uri, &[&[("host", "a")], fields].concat());
            parts.method = method;
            normalise_request(&mut parts, Origin::Outside).map_err(|m| m.status.as_u16())
        };
        assert_eq!(status(Method::GET, "/", &[("expect", "the-unexpected")]), Err(417));
        assert!(status(Method::OPTIONS, "*", &[]).is_ok());
        assert_eq!(status(Method::GET, "*", &[]), Err(400));
    }

    #[test]
    fn tunnels_are_told_apart() {
        let asked = |uri: &str, protocol: Option<&str>, fields: &[(&str, &str)]| {
            let mut parts = request(Version::HTTP_2, uri, fields);
            parts.method = Method::CONNECT;
            parts.extensions.extend(
                protocol
                    .map(|name| {
                        let mut extensions = http::Extensions::new();
                        extensions.insert(Protocol::read(name).unwrap());
                        extensions
                    })
                    .unwrap_or_default(),
            );
            normalise_request(&mut parts, Origin::Outside).map(|c| (c.tunnel.unwrap(), parts.uri.to_string()))
        };
        assert_eq!(asked("db:5432", None, &[]), Ok((Tunnel::Bytes, "/".into())));
        assert_eq!(asked("https://a/chat?x", Some("WebSocket"), &[]), Ok((Tunnel::Upgrade, "/chat?x".into())));
        assert_eq!(asked("https://a/", Some("connect-udp"), &[]), Ok((Tunnel::Udp, "/".into())));
        assert!(asked("db:5432", None, &[("content-length", "0")]).is_err());
        for target in ["/path", "db", "https://db:1/"] {
            assert!(asked(target, None, &[]).is_err(), "{target}");
        }
        assert_eq!(check(Version::HTTP_2, "https://a/", &[]).unwrap().tunnel, None);
    }

    #[test]
    fn an_answer_to_head_promises_nothing() {
        let (mut parts, ()) = http::Response::builder().header("content-length", "9").body(()).unwrap().into_parts();
        assert_eq!(normalise_response(&mut parts, &Method::HEAD, Origin::Outside), Ok(None));
        assert_eq!(normalise_response(&mut parts, &Method::GET, Origin::Outside), Ok(Some(9)));
    }

    proptest! {
        /// Whatever comes in, what goes out has no hop-by-hop field, no Host, one length at most, and a path.
        #[test]
        fn the_normal_form_holds(
            version in proptest::sample::select(vec![Version::HTTP_11, Version::HTTP_2, Version::HTTP_3]),
            fields in proptest::collection::vec((
                proptest::sample::select(vec!["host", "connection", "te", "content-length", "transfer-encoding",
                    "starling-caller", "x-a", "upgrade", "keep-alive", "expect"]),
                "[ -~]{0,12}",
            ), 0..8),
            path in "(/[a-z*]{0,5}|\\*)",
        ) {
            let uri = if version == Version::HTTP_11 { path } else { format!("https://a{path}") };
            let mut builder = Request::builder().version(version).uri(uri);
            for (name, value) in &fields {
                builder = builder.header(*name, value);
            }
            let Ok(request) = builder.body(()) else { return Ok(()) };
            let mut parts = request.into_parts().0;
            if normalise_request(&mut parts, Origin::Outside).is_ok() {
                for gone in ["host", "connection", "transfer-encoding", "upgrade", "keep-alive", "starling-caller", "expect"] {
                    prop_assert!(!parts.headers.contains_key(gone), "{}", gone);
                }
                prop_assert!(parts.headers.get_all("content-length").iter().count() <= 1);
                prop_assert!(parts.uri.authority().is_none() && parts.uri.path_and_query().is_some());
            }
        }
    }
}
