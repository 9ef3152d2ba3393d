//! The edge's part of its file, parsed into values that cannot be wrong by themselves; `check` has what is wrong across them.

mod action;
mod certificate;
mod check;
mod client_certificate;
mod forward;
mod jwt;
mod matching;
mod plan;
mod published;
mod quota_store;
mod route;
pub(crate) mod version;

use std::net::SocketAddr;

use http::HeaderValue;
use serde::{Deserialize, Deserializer, de};
use starling_node::config::{self, Config, Diagnostic};

use self::check::check;
pub(crate) use self::{
    action::Maintenance,
    certificate::{Acme, Certificate, ChallengeKind, Eab, Files, Source},
    client_certificate::{ClientCertificate, NamedBy},
    forward::Forward,
    jwt::{Jwks, Jwt},
    plan::{Plan, Rate},
    published::Published,
    quota_store::{OnStoreDown, QuotaStore},
    route::{AuthMethod, ForwardHost, Host, Network, Preflight, Route},
    version::{Version, VersionInfo, VersionSource, is_version},
};
use crate::transform::size::Size;

pub use self::published::published;

/// Reads an edge's file, which is a node's and one part more, and every problem in it with its line. What it says is there
/// only if there is no problem.
pub fn read_config(text: &str) -> (Option<(Config, EdgeSections)>, Vec<Diagnostic>) {
    let (node, mut found) = config::read_part::<Config>(text, |name| !EdgeSections::TABLES.contains(&name));
    let (edge, more) = config::read_part::<EdgeSections>(text, |name| EdgeSections::TABLES.contains(&name));
    // What is no TOML at all is found twice.
    found.extend(more.into_iter().filter(|problem| !found.contains(problem)).collect::<Vec<_>>());
    let (Some(node), Some(edge)) = (node, edge) else { return (None, found) };
    let problems = node.problems().into_iter().chain(check(&edge));
    let problems = located(text, problems);
    if problems.is_empty() { (Some((node, edge)), problems) } else { (None, problems) }
}

/// What clients will not like about the certificates of a file without problems, each with its line. An edge runs with it.
pub fn doubts(text: &str, sections: &EdgeSections) -> Vec<Diagnostic> {
    located(text, check::doubts(sections))
}

fn located(text: &str, found: impl IntoIterator<Item = (String, String)>) -> Vec<Diagnostic> {
    let located = |(key, what): (String, String)| Diagnostic {
        line: config::line_of(text, &key),
        problem: format!("{key}: {what}"),
    };
    found.into_iter().map(located).collect()
}

/// What an edge has in its file beside the keys of a node.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSections {
    /// The public listeners.
    pub edge: Edge,
    /// Certificates, picked by server name.
    #[serde(default)]
    pub certificate: Vec<Certificate>,
    /// Routes into the mesh.
    #[serde(default)]
    pub route: Vec<Route>,
    /// API versions.
    #[serde(default)]
    pub version: Vec<Version>,
    /// Rates that routes and keys refer to by name.
    #[serde(default)]
    pub plan: Vec<Plan>,
    /// Who issues tokens, if anybody.
    pub jwt: Option<Jwt>,
    /// Who issues certificates to callers, if anybody.
    pub client_certificate: Option<ClientCertificate>,
    /// Where edges count quotas together, if not among themselves.
    pub quota_store: Option<QuotaStore>,
}

impl EdgeSections {
    /// Its tables, by the names of the fields.
    const TABLES: [&str; 8] =
        ["edge", "certificate", "route", "version", "plan", "jwt", "client_certificate", "quota_store"];
}

/// `[edge]`: the public listeners.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    /// TCP for HTTP/1.1 and 2, and UDP for HTTP/3, on one port.
    pub listen: SocketAddr,
    /// Where plain HTTP is answered with a redirect to HTTPS.
    pub redirect: Option<SocketAddr>,
    /// Port that Alt-Svc names (RFC 7838), if it is not the one of `listen`.
    pub alt_svc_port: Option<u16>,
    /// Whether answers tell of HTTP/3 by Alt-Svc; they do if not told.
    #[serde(default = "yes")]
    pub alt_svc: bool,
    /// What Strict-Transport-Security tells clients (RFC 6797 §6.1); nothing if not told.
    pub hsts: Option<Hsts>,
    /// What the process may have; with nine tenths of it new requests are refused. If not told, it is what its control group may.
    pub memory: Option<Size>,
    /// How many handshakes an address may begin; two thousand a second if not told.
    pub handshakes: Option<Rate>,
    /// Where routes, plans, versions and the issuer of tokens come from, if not from this file.
    pub config: Option<From>,
    /// Addresses of proxies in front of it, whose word counts for who the client is.
    #[serde(default)]
    pub trusted_hops: Vec<Network>,
    /// In which field they say so.
    #[serde(default)]
    pub trusted_field: HopsField,
    /// Addresses whose TCP connections begin with a PROXY protocol header of version 2.
    #[serde(default)]
    pub proxy_protocol: Vec<Network>,
}

/// A value of Strict-Transport-Security: `max-age=SECONDS`, and `includeSubDomains` and `preload` behind it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Hsts(pub(crate) HeaderValue);

impl TryFrom<String> for Hsts {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut parts = text.split(';').map(str::trim);
        let age = parts.next().and_then(|part| digits(part.strip_prefix("max-age=")?));
        let is_known =
            |part: &str| part.eq_ignore_ascii_case("includeSubDomains") || part.eq_ignore_ascii_case("preload");
        match HeaderValue::try_from(&text) {
            Ok(value) if age.is_some() && parts.all(is_known) => Ok(Self(value)),
            _ => Err(format!("{text:?} is no such value: use one like \"max-age=31536000; includeSubDomains\"")),
        }
    }
}

/// Where proxies say whom they have a request from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HopsField {
    /// X-Forwarded-For.
    #[default]
    XForwardedFor,
    /// Forwarded (RFC 7239).
    Forwarded,
}

/// Where rules come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum From {
    /// What `starling edge publish` has published.
    Mesh,
}

fn yes() -> bool {
    true
}

pub(crate) const LABEL: &str = "use 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'";

/// Whether a text can name a plan, a consumer, a version or a query parameter: safe in a header, a URI and a log line.
pub(crate) fn is_label(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

fn text<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    Some(String::deserialize(d)?)
        .filter(|text| !text.is_empty())
        .ok_or_else(|| de::Error::custom("this must not be empty"))
}

fn some<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    let list = Vec::deserialize(d)?;
    if list.is_empty() { Err(de::Error::custom("this list must not be empty")) } else { Ok(list) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const EDGE: &str = "[edge]\nlisten = \"0.0.0.0:443\"\n";
    const ROUTE: &str = "[[route]]\npath = \"/orders\"\nservice = \"orders\"\nauth = []\n";

    fn parse(text: &str) -> Result<EdgeSections, String> {
        toml::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn the_example_of_the_contract() {
        let edge = parse(
            r#"
            [edge]
            listen = "0.0.0.0:443"
            redirect = "0.0.0.0:80"
            alt_svc_port = 443
            [[certificate]]
            hosts = ["API.example.com"]
            cert = "/etc/starling/api.pem"
            key = "/etc/starling/api.key"
            [[route]]
            host = "api.example.com"
            path = "/orders"
            service = "orders"
            auth = ["api-key", "jwt"]
            plan = "default"
            strip_prefix = false
            timeout = "10s"
            [[version]]
            route = "/orders"
            from = ["path", "header:x-api-version", "accept:application/vnd.example.{version}+json", "query:version"]
            default = "v2"
            versions = { v1 = { deprecated = "2026-01-01", sunset = "2027-01-01", link = "https://a.example" }, v2 = {} }
            [[plan]]
            name = "default"
            rate = "50/s"
            burst = 100
            [jwt]
            issuer = "https://id.example.com/"
            audience = ["api"]
            jwks = "/etc/starling/jwks.json"
            algorithms = ["RS256", "ES256"]
            "#,
        )
        .unwrap();
        assert_eq!(edge.certificate[0].hosts, ["api.example.com"]);
        assert_eq!(edge.route[0].auth, [AuthMethod::ApiKey, AuthMethod::Jwt]);
        assert_eq!(edge.route[0].timeout, Some(Duration::from_secs(10)));
        assert_eq!(edge.version[0].from[0], VersionSource::Path);
        assert_eq!(edge.version[0].versions.here().unwrap()["v1"].deprecated.unwrap().unix(), 1_767_225_600);
        let rate = edge.plan[0].rate.unwrap();
        assert_eq!((rate.count.get(), edge.plan[0].burst(rate).get()), (50, 100));
        let keys: Vec<_> = check(&edge).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["certificate[0].cert", "certificate[0].key", "jwt.jwks"]);
    }

    #[test]
    fn what_is_not_told() {
        let edge = parse(&format!(
            "{EDGE}[[route]]\nservice = \"orders\"\nauth = []\n[[plan]]\nname = \"p\"\nrate = \"100/m\""
        ))
        .unwrap();
        let route = &edge.route[0];
        assert_eq!((&route.host, route.path.as_str(), route.timeout), (&Host::Any, "/", None));
        assert!(!route.strip_prefix && !edge.plan[0].shadow);
        let rate = edge.plan[0].rate.unwrap();
        assert_eq!((edge.plan[0].burst(rate).get(), rate.window), (100, Duration::from_secs(60)));
    }

    #[test]
    fn wrong_values_say_what_to_do() {
        let route = |line: &str| format!("{EDGE}[[route]]\nservice = \"orders\"\n{line}");
        let plan = |line: &str| format!("{EDGE}[[plan]]\nname = \"p\"\n{line}");
        let version = |lines: &str| format!("{EDGE}[[version]]\nroute = \"/\"\n{lines}");
        let jwt = |lines: &str| format!("{EDGE}[jwt]\nissuer = \"i\"\naudience = [\"a\"]\n{lines}");
        for (text, want) in [
            (route(""), "missing field `auth`"),
            (route("auth = [\"basic\"]"), "expected one of `api-key`, `jwt`, `client-certificate`"),
            (route("auth = []\nservce = 1"), "unknown field `servce`"),
            (route("auth = []\ntimeout = \"10\""), "is not a timeout"),
            (route("auth = []\ntimeout = \"0s\""), "is not a timeout"),
            (route("auth = []\ntimeout = \"99999999999999999999h\""), "is not a timeout"),
            (route("auth = []\ntimeout = \"1é\""), "is not a timeout"),
            (route("auth = []\nhost = \"a.example:443\""), "without a port"),
            (route("auth = []\nhost = \"a.*.example\""), "is not a host"),
            (route("auth = []\nhost = \"*example.com\""), "is not a host"),
            (format!("{EDGE}hsts = \"31536000\""), "is no such value"),
            (format!("{EDGE}hsts = \"max-age=1; everywhere\""), "is no such value"),
            (format!("{EDGE}memory = \"1G\""), "is not a size"),
            (plan("rate = \"0/s\""), "is not a rate"),
            (plan("rate = \"50/d\""), "is not a rate"),
            (plan("rate = \"+5/s\""), "is not a rate"),
            (plan("rate = \"5/s\"\nburst = 0"), "nonzero"),
            (route("auth = [\"jwt\"]\nscopes = [\"a b\"]"), "is not a scope"),
            (route("auth = [\"jwt\"]\nclaims = { a = 1 }"), "not a value in quotes"),
            (route("auth = [\"jwt\"]\nclaim_headers = { authorization = \"a\" }"), "such as \"x-tenant\""),
            (route("auth = [\"jwt\"]\nclaim_headers = { x-forwarded-for = \"a\" }"), "such as \"x-tenant\""),
            (route("auth = []\ncost = 0"), "nonzero"),
            (route("auth = []\nallow = [\"10.0.0.0/33\"]"), "is no network"),
            (route("auth = []\ndeny = [\"example.com\"]"), "is no network"),
            (route("auth = []\ndeny = [\"::ffff:0:0/90\"]"), "is no network"),
            (route("auth = []\nallow = []"), "must not be empty"),
            (route("auth = [\"jwt\"]\nclaim_headers = { x_user = \"a\" }"), "such as"),
            (route("auth = [\"jwt\"]\nclaim_headers = { x-user_id = \"a\" }"), "letters, digits"),
            (route("auth = [\"jwt\"]\nclaim_headers = { x-a = \"a\", X-A = \"b\" }"), "twice"),
            (route("auth = []\nrequest_headers = { remove = [\"via\"] }"), "leave it alone"),
            (route("auth = []\nmax_request_size = \"10\""), "is not a size"),
            (route("auth = []\nrequest_headers = { set = { host = \"a\" } }"), "leave it alone"),
            (route("auth = []\nresponse_headers = { drop = [\"a\"] }"), "unknown field"),
            (plan("burst = 5"), "rate or quota"),
            (plan("quota = \"5/day\"\nburst = 5"), "burst goes with rate"),
            (plan("rate = \"5/s\"\nquota = \"5/week\""), "is not a quota"),
            (plan("rate = \"5/s\"\nquota = []"), "quota is empty"),
            (plan("quota = 5"), "not a quota such as"),
            (plan("quota = [\"5/day\", \"6/day\"]"), "two quotas a day"),
            (plan("quota = \"5/day\"\ntime_zone = \"Mars/Olympus\""), "is no time zone"),
            (plan("rate = \"5/s\"\ntime_zone = \"UTC\""), "time_zone goes with a quota"),
            (plan("quota = \"5/7d\"\ntime_zone = \"UTC\""), "time_zone goes with a quota"),
            (version("from = [\"cookie:v\"]\nversions = { v1 = {} }"), "not a place for a version"),
            (version("from = [\"accept:application/json\"]\nversions = { v1 = {} }"), "with {version} once"),
            (version("from = [\"header:a b\"]\nversions = { v1 = {} }"), "not a header name"),
            (version("from = []\nversions = { v1 = {} }"), "must not be empty"),
            (version("from = [\"path\"]\nversions = {}"), "there must be a version"),
            (version("from = [\"path\"]\nversions = { \"a/b\" = {} }"), "is not a version name"),
            (version("from = [\"path\"]\nversions = { \"..\" = {} }"), "is not a version name"),
            (version("from = [\"path\"]\nversions = { v1 = { sunset = \"2026-02-30\" } }"), "YYYY-MM-DD"),
            (version("from = [\"path\"]\nversions = { v1 = { sunset = \"2026-1-1\" } }"), "YYYY-MM-DD"),
            (version("from = [\"path\"]\nversions = { v1 = { link = \"https://a/>x\" } }"), "is not a link"),
            (jwt("jwks = \"http://a/b\"\nalgorithms = [\"RS256\"]"), "without TLS"),
            (jwt("jwks = \"ftp://a/b\"\nalgorithms = [\"RS256\"]"), "without TLS"),
            (jwt("jwks = \"https://\"\nalgorithms = [\"RS256\"]"), "is no URL"),
            (jwt("jwks = \"\"\nalgorithms = [\"RS256\"]"), "it is empty"),
            (jwt("jwks = \"a.json\"\nalgorithms = []"), "must not be empty"),
            (jwt("jwks = \"a.json\"\nalgorithms = [\"none\"]"), "is no signature"),
            (jwt("jwks = \"a.json\"\nalgorithms = [\"RS256\", \"HS256\"]"), "needs the issuer's secret"),
            (jwt("jwks = \"a.json\""), "missing field `algorithms`"),
            (format!("{EDGE}[[certificate]]\nhosts = [\"a\"]"), "give cert and key files, or acme"),
            (format!("{EDGE}[[certificate]]\nhosts = [\"a\"]\nkey = \"a\"\nacme = {{}}"), "acme and files at once"),
            (format!("{EDGE}[[certificate]]\nhosts = [\"*.a.b\"]\nacme = {{}}"), "which *.a.b is not"),
            (format!("{EDGE}[[certificate]]\nhosts = [\"10.0.0.1\"]\nacme = {{}}"), "which 10.0.0.1 is not"),
            (
                format!("{EDGE}[[certificate]]\nhosts = [\"a\"]\nacme = {{ directory = \"http://a\" }}"),
                "is no directory",
            ),
            (
                format!("{EDGE}[[certificate]]\nhosts = [\"a\"]\nacme = {{ directory = \"zero\" }}"),
                "letsencrypt-staging",
            ),
            (format!("{EDGE}[[certificate]]\nhosts = [\"a\"]\nacme = {{ email = \"me\" }}"), "is no address for mail"),
            (format!("{EDGE}[[certificate]]\nhosts = [\"a\"]\nacme = {{ challenge = \"dns-01\" }}"), "tls-alpn-01"),
            (format!("{EDGE}[[certificate]]\nhosts = [\"a\"]\ncert = \"a\""), "missing field `key`"),
            (format!("{EDGE}[[certificate]]\nhosts = []\ncert = \"a\"\nkey = \"b\""), "hosts is empty"),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(want), "{text}\ngave {error}");
        }
    }

    #[test]
    fn sections_that_contradict_each_other() {
        let keys = |text: &str| -> Vec<String> {
            check(&parse(text).unwrap()).into_iter().map(|(key, _)| key).filter(|key| key != "certificate").collect()
        };
        assert!(check(&parse(&format!("{EDGE}{ROUTE}")).unwrap())[0].1.contains("there is no certificate"));
        assert_eq!(keys(EDGE), ["route"]);
        assert_eq!(keys(&format!("{EDGE}{ROUTE}")), [""; 0]);
        for (more, want) in [
            ("plan = \"gold\"", "route[0].plan"),
            ("[[route]]\npath = \"/orders/\"\nservice = \"b\"\nauth = []", "route[1].path"),
            ("[[route]]\npath = \"b\"\nservice = \"b\"\nauth = []", "route[1].path"),
            ("[[route]]\npath = \"/a/../b\"\nservice = \"b\"\nauth = []", "route[1].path"),
            ("[[route]]\npath = \"/a%62\"\nservice = \"b\"\nauth = []", "route[1].path"),
            ("[[route]]\npath = \"/b\"\nservice = \"b\"\nauth = [\"jwt\"]", "route[1].auth"),
            ("[[version]]\nroute = \"/b\"\nfrom = [\"path\"]\nversions = { v1 = {} }", "version[0].route"),
            (
                "[[version]]\nroute = \"/orders\"\nfrom = [\"path\"]\ndefault = \"v2\"\nversions = { v1 = {} }",
                "version[0].default",
            ),
            (
                "[[version]]\nroute = \"/orders\"\nfrom = [\"path\"]\n\
                 versions = { v1 = { deprecated = \"2027-01-01\", sunset = \"2026-01-01\" } }",
                "version[0].versions.v1.sunset",
            ),
            (
                "[[version]]\nroute = \"/orders\"\nfrom = [\"path\"]\nweights = { v2 = 1 }\nversions = { v1 = {} }",
                "version[0].weights.v2",
            ),
            (
                "[[version]]\nroute = \"/orders\"\nfrom = [\"path\"]\ndefault = \"v1\"\nsticky = true\nversions = \"mesh\"",
                "version[0].sticky",
            ),
            (
                "[[version]]\nroute = \"/orders\"\nfrom = [\"path\"]\nversions = { v1 = { successor = \"v1\" } }",
                "version[0].versions.v1.successor",
            ),
            ("[[plan]]\nname = \"p\"\nrate = \"1/s\"\n[[plan]]\nname = \"p\"\nrate = \"2/s\"", "plan[1].name"),
        ] {
            assert_eq!(keys(&format!("{EDGE}{ROUTE}{more}")), [want], "{more}");
        }
        let other_host = "[[route]]\nhost = \"a.example\"\npath = \"/orders\"\nservice = \"b\"\nauth = []";
        assert_eq!(keys(&format!("{EDGE}{ROUTE}{other_host}")), [""; 0]);
    }

    #[test]
    fn certificate_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let pair = || {
            let key = rcgen::KeyPair::generate().unwrap();
            let cert = rcgen::CertificateParams::new(vec!["a.example".into()]).unwrap().self_signed(&key).unwrap();
            (cert.pem(), key.serialize_pem())
        };
        let ((cert, key), (_, other)) = (pair(), pair());
        for (cert, key, want) in [
            (&cert, &key, None),
            (&cert, &other, Some("certificate[0].key")),
            (&cert, &cert, Some("certificate[0].key")),
            (&key, &key, Some("certificate[0].cert")),
        ] {
            let (cert_file, key_file) = (dir.path().join("c.pem"), dir.path().join("k.pem"));
            std::fs::write(&cert_file, cert).unwrap();
            std::fs::write(&key_file, key).unwrap();
            let text = format!(
                "{EDGE}{ROUTE}[[certificate]]\nhosts = [\"a.example\"]\ncert = {cert_file:?}\nkey = {key_file:?}"
            );
            let problems = check(&parse(&text).unwrap());
            assert_eq!(problems.first().map(|(key, _)| key.as_str()), want, "{problems:?}");
        }
    }

    #[test]
    fn networks_hold_however_addresses_are_written() {
        let network = |text: &str| Network::try_from(text.to_owned()).unwrap();
        for (text, address, is_in) in [
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "::ffff:10.1.2.3", true),
            ("10.1.2.3/8", "10.9.9.9", true),
            ("::ffff:203.0.113.0/120", "203.0.113.7", true),
            ("::ffff:203.0.113.7", "203.0.113.7", true),
            ("203.0.113.7", "203.0.113.8", false),
            ("2001:db8::/32", "2001:db8:1::1", true),
            ("2001:db8::/32", "10.0.0.1", false),
            ("0.0.0.0/0", "2001:db8::1", false),
        ] {
            assert_eq!(network(text).contains(address.parse().unwrap()), is_in, "{text} {address}");
        }
    }
}
