//! The edge's part of its file, parsed into values that cannot be wrong by themselves; `check` has what is wrong across them.

mod certificate;
mod check;
mod plan;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    path::PathBuf,
    str::FromStr,
    time::{Duration, SystemTime},
};

use http::{HeaderName, Uri};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};
use starling_node::{
    HedgeSettings, LimitSettings, RepeatSettings, RetrySettings,
    config::{self, Config, Diagnostic},
};
use starling_protocol::Name;

pub(crate) use self::certificate::{Acme, Certificate, ChallengeKind, Files, Source};
use self::check::check;
pub(crate) use self::plan::{Plan, Rate};
use crate::{
    cors::Cors,
    transform::{fields::Edits, size::Size},
};

/// Longest timeout of a route: more than a day is a slip of the pen.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

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
}

impl EdgeSections {
    /// Its tables, by the names of the fields.
    const TABLES: [&str; 6] = ["edge", "certificate", "route", "version", "plan", "jwt"];
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
}

fn yes() -> bool {
    true
}

/// `[[route]]`: which requests go to which service, and who may send them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Hosts it is for; all if not told.
    #[serde(default)]
    pub host: Host,
    /// Prefix of the path, matched on whole segments; `/` if not told.
    #[serde(default = "root")]
    pub path: String,
    /// The service behind it.
    pub service: Name,
    /// Ways to authenticate, any of which will do. Empty is public, and must be written.
    pub auth: Vec<AuthMethod>,
    /// Name of the plan whose limits hold here; none if not told.
    pub plan: Option<String>,
    /// Addresses that may use it; all if not told.
    #[serde(default, deserialize_with = "some")]
    pub allow: Vec<Network>,
    /// Addresses that may not, whatever `allow` says.
    #[serde(default)]
    pub deny: Vec<Network>,
    /// How large a request may be; as large as it likes if not told.
    pub max_request_size: Option<Size>,
    /// What is changed about the fields of a request.
    #[serde(default)]
    pub request_headers: Edits,
    /// What is changed about the fields of an answer.
    #[serde(default)]
    pub response_headers: Edits,
    /// What a token's `scope` must have, all of it.
    #[serde(default, deserialize_with = "scopes")]
    pub scopes: Vec<String>,
    /// Claims that a token must have, each with one of some values.
    #[serde(default)]
    pub claims: BTreeMap<String, OneOf>,
    /// Fields in which the service is told claims of the token, by the name of the field.
    #[serde(default, deserialize_with = "claim_headers")]
    pub claim_headers: Vec<(HeaderName, String)>,
    /// How much of a plan one call takes; 1 if not told.
    #[serde(default = "one")]
    pub cost: NonZeroU32,
    /// Whether the service sees the path without the prefix.
    #[serde(default)]
    pub strip_prefix: bool,
    /// Whether the service gets the path as it came, with `%2F` and empty segments, instead of in its one spelling.
    #[serde(default)]
    pub raw_path: bool,
    /// Time to the head of an answer; 15 s if not told, for gRPC what the caller says, or none.
    #[serde(default, deserialize_with = "timeout")]
    pub timeout: Option<Duration>,
    /// Silence that ends a call; 1 h if not told.
    #[serde(default, deserialize_with = "timeout")]
    pub idle_timeout: Option<Duration>,
    /// Time to the end of an answer; none if not told.
    #[serde(default, deserialize_with = "timeout")]
    pub total_timeout: Option<Duration>,
    /// Attempts at a request.
    #[serde(default)]
    pub retry: RetrySettings,
    /// A second copy of a request that takes long. Default: none.
    #[serde(default)]
    pub hedge: Option<HedgeSettings>,
    /// What the service sees as Host; what the client asked for, if not told.
    #[serde(default)]
    pub forward_host: ForwardHost,
    /// Which web pages may call, by the rules of browsers; that is the service's affair if not told.
    pub cors: Option<Cors>,
    /// Whether browsers' preflights, which carry no credentials, pass to the service without any.
    #[serde(default)]
    pub preflight: Preflight,
    /// Whether pages may call it by gRPC-Web; the service gets gRPC.
    #[serde(default)]
    pub grpc_web: bool,
}

/// Addresses that begin alike: `10.0.0.0/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network(IpNet);

impl Network {
    /// Whether an address is one of them. One of IPv4 is one, however it is written.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let one = || text.parse::<IpAddr>().ok().map(|address| IpNet::from(address.to_canonical()));
        let network = text.parse::<IpNet>().ok().or_else(one);
        // Clients of IPv4 are known by their addresses of IPv4, however they are written.
        let network = match network {
            Some(IpNet::V6(v6)) => match v6.addr().to_ipv4_mapped() {
                Some(v4) => v6.prefix_len().checked_sub(96).and_then(|length| IpNet::new(v4.into(), length).ok()),
                None => Some(IpNet::V6(v6)),
            },
            network => network,
        };
        network.map(|network| Self(network.trunc())).ok_or_else(|| {
            format!("{text:?} is no network: use an address, or a prefix such as \"10.0.0.0/8\" or \"2001:db8::/32\"")
        })
    }
}

/// Values of which a claim must have one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "OneOrMore")]
pub struct OneOf(pub(crate) Vec<String>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "not a value in quotes, or a list of these")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl From<OneOrMore> for OneOf {
    fn from(values: OneOrMore) -> Self {
        match values {
            OneOrMore::One(value) => Self(vec![value]),
            OneOrMore::More(values) => Self(values),
        }
    }
}

/// What a service sees as Host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum ForwardHost {
    /// `public`: what the client asked for.
    #[default]
    Public,
    /// `service`: the service's name in the mesh.
    Service,
    /// A host of its own.
    Named(String),
}

impl TryFrom<String> for ForwardHost {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "public" => Ok(Self::Public),
            "service" => Ok(Self::Service),
            name if name.parse::<http::uri::Authority>().is_ok() => Ok(Self::Named(name.into())),
            _ => Err(format!("{text:?} is not a host: use \"public\", \"service\" or a name")),
        }
    }
}

/// What becomes of a browser's preflight on a route that asks for credentials.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preflight {
    /// As of any other request.
    #[default]
    Refuse,
    /// It passes.
    Pass,
}

impl Route {
    /// Its limits of time.
    pub fn limits(&self) -> LimitSettings {
        LimitSettings { timeout: self.timeout, idle_timeout: self.idle_timeout, total_timeout: self.total_timeout }
    }

    /// How often a request may be made.
    pub fn repeats(&self) -> RepeatSettings {
        RepeatSettings { retry: self.retry, hedge: self.hedge }
    }
}

/// Scopes as RFC 6749 §3.3 writes them.
fn scopes<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let scopes = Vec::<String>::deserialize(d)?;
    let is_scope = |scope: &String| {
        !scope.is_empty() && scope.bytes().all(|b| matches!(b, b'!'..=b'~') && !matches!(b, b'"' | b'\\'))
    };
    match scopes.iter().find(|scope| !is_scope(scope)) {
        Some(bad) => {
            Err(de::Error::custom(format!("{bad:?} is not a scope: one word of visible ASCII, without quotes")))
        }
        None => Ok(scopes),
    }
}

fn claim_headers<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(HeaderName, String)>, D::Error> {
    let fields = BTreeMap::<String, String>::deserialize(d)?;
    let field = |(name, claim): (String, String)| {
        let name = name.parse::<HeaderName>().map_err(|_| format!("{name:?} is not the name of a field"))?;
        let text = name.as_str();
        let of_edge = ["x-real-ip", "x-request-id", "x-api-key"].contains(&text);
        if !text.starts_with("x-") || text.starts_with("x-forwarded-") || of_edge {
            return Err(format!(
                "{name} may have a meaning of its own: use another name with x-, such as \"x-tenant\""
            ));
        }
        // Others are read as `-` by some servers, so that a client could say the same in another spelling.
        match text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            true => Ok((name, claim)),
            false => Err(format!("{name}: use letters, digits and - only, such as \"x-tenant\"")),
        }
    };
    let fields = fields.into_iter().map(field).collect::<Result<Vec<_>, String>>().map_err(de::Error::custom)?;
    let twice = fields.iter().enumerate().find(|(at, (name, _))| fields[..*at].iter().any(|(other, _)| other == name));
    match twice {
        Some((_, (name, _))) => Err(de::Error::custom(format!("{name} is there twice: remove one"))),
        None => Ok(fields),
    }
}

fn one() -> NonZeroU32 {
    NonZeroU32::MIN
}

fn root() -> String {
    "/".into()
}

/// Which hosts a route is for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub enum Host {
    /// `*`
    #[default]
    Any,
    /// `*.example.com`: every name under the domain, which is kept with its dot in front; not the domain itself.
    Under(String),
    /// One name or address, in lower case.
    Exact(String),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Under(domain) => write!(f, "*{domain}"),
            Self::Exact(name) => f.write_str(name),
        }
    }
}

impl TryFrom<String> for Host {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let name = text.to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let is_v6 = |n: &str| {
            n.strip_prefix('[').and_then(|n| n.strip_suffix(']')).is_some_and(|n| n.parse::<Ipv6Addr>().is_ok())
        };
        match name.strip_prefix('*') {
            Some("") => Ok(Self::Any),
            Some(rest) if rest.strip_prefix('.').is_some_and(is_domain) => Ok(Self::Under(rest.into())),
            None if is_domain(name) || is_v6(name) => Ok(Self::Exact(name.into())),
            _ => Err(format!(
                "{text:?} is not a host: use \"api.example.com\", \"*.example.com\" or \"*\", without a port"
            )),
        }
    }
}

/// Labels of RFC 1123 §2.1, and `_`, which is common below public names.
fn is_domain(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// A way to say who the caller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuthMethod {
    /// A key of ours, in `x-api-key` or as a bearer token.
    ApiKey,
    /// A token of the issuer in `[jwt]`.
    Jwt,
}

/// `[[version]]`: the versions of one route's API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// Path of the route.
    pub route: String,
    /// Where a request may name its version, in the order tried; at least one.
    #[serde(deserialize_with = "some")]
    pub from: Vec<VersionSource>,
    /// Version of a request that names none; such a request is refused if not told.
    pub default: Option<String>,
    /// The versions there are; at least one.
    #[serde(deserialize_with = "versions")]
    pub versions: BTreeMap<String, VersionInfo>,
}

/// Where a request may name its version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum VersionSource {
    /// A segment before the route's path or right after it; the service never sees it.
    Path,
    /// The value of a header field.
    Header(HeaderName),
    /// A media type of Accept, in lower case, with the version between the two parts.
    Accept {
        /// Before the version.
        prefix: String,
        /// After the version.
        suffix: String,
    },
    /// The value of a query parameter, which stays in place.
    Query(String),
}

/// As the file has it.
impl fmt::Display for VersionSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path => f.write_str("path"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Accept { prefix, suffix } => write!(f, "accept:{prefix}{{version}}{suffix}"),
            Self::Query(name) => write!(f, "query:{name}"),
        }
    }
}

impl TryFrom<String> for VersionSource {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let bad = |what: &str| Err(format!("{text:?}: {what}"));
        match text.split_once(':') {
            None if text == "path" => Ok(Self::Path),
            Some(("header", name)) => match HeaderName::from_str(name) {
                Ok(name) => Ok(Self::Header(name)),
                Err(_) => bad("not a header name; use for example \"header:x-api-version\""),
            },
            Some(("query", name)) if is_label(name) => Ok(Self::Query(name.into())),
            Some(("query", _)) => bad("the parameter's name may have A-Z, a-z, 0-9, '.', '_' and '-' only"),
            Some(("accept", pattern)) => {
                let pattern = pattern.to_ascii_lowercase();
                match pattern.split_once("{version}") {
                    Some((prefix, suffix)) if is_media_type(prefix, suffix) => {
                        Ok(Self::Accept { prefix: prefix.into(), suffix: suffix.into() })
                    }
                    _ => bad("not a media type with {version} once; use for example \
                         \"accept:application/vnd.example.{version}+json\""),
                }
            }
            _ => bad("not a place for a version; use \"path\", \"header:NAME\", \"accept:PATTERN\" or \"query:NAME\""),
        }
    }
}

fn is_media_type(prefix: &str, suffix: &str) -> bool {
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&b);
    prefix.split_once('/').is_some_and(|(kind, rest)| {
        !kind.is_empty() && kind.bytes().chain(rest.bytes()).chain(suffix.bytes()).all(is_token)
    })
}

/// What is to be said of a version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VersionInfo {
    /// Since when, or from when, it should not be used any more (RFC 9745).
    pub deprecated: Option<Date>,
    /// From when on it is gone (RFC 8594).
    pub sunset: Option<Date>,
    /// Where that is explained.
    pub link: Option<Link>,
}

/// The start of a day in UTC, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Date(u64);

impl Date {
    /// Seconds since 1970.
    pub fn unix(self) -> u64 {
        self.0
    }
}

impl From<Date> for SystemTime {
    fn from(date: Date) -> Self {
        Self::UNIX_EPOCH + Duration::from_secs(date.0)
    }
}

impl TryFrom<String> for Date {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        unix_of_day(&text).map(Self).ok_or_else(|| format!("{text:?} is not a date since 1970: use \"YYYY-MM-DD\""))
    }
}

fn unix_of_day(text: &str) -> Option<u64> {
    let number = |text: &str, digits| {
        (text.len() == digits && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse::<u16>().ok())?
    };
    let (year, rest) = text.split_once('-')?;
    let (month, day) = rest.split_once('-')?;
    let month = time::Month::try_from(u8::try_from(number(month, 2)?).ok()?).ok()?;
    let day = u8::try_from(number(day, 2)?).ok()?;
    let date = time::Date::from_calendar_date(number(year, 4)?.into(), month, day).ok()?;
    date.midnight().assume_utc().unix_timestamp().try_into().ok()
}

/// An absolute http or https URI that can stand in a Link field (RFC 8288) as it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Link(String);

impl Link {
    /// The URI.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Link {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let plain = text.bytes().all(|b| b.is_ascii_graphic() && !b"<>\"\\^`{|}".contains(&b));
        let absolute = text.parse().is_ok_and(|uri: http::Uri| matches!(uri.scheme_str(), Some("https" | "http")));
        if plain && absolute {
            Ok(Self(text))
        } else {
            Err(format!("{text:?} is not a link: use an absolute URI such as \"https://example.com/news\""))
        }
    }
}

/// `[jwt]`: whose tokens are taken.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jwt {
    /// What `iss` must be, letter by letter.
    #[serde(deserialize_with = "text")]
    pub issuer: String,
    /// What `aud` must have one of; at least one.
    #[serde(deserialize_with = "some")]
    pub audience: Vec<String>,
    /// Where the issuer's keys are, a JWK Set (RFC 7517 §5).
    pub jwks: Jwks,
    /// PEM file of the certificates to trust when they are fetched; the system's if not told.
    pub ca: Option<PathBuf>,
    /// Algorithms that are taken; at least one.
    #[serde(deserialize_with = "some")]
    pub algorithms: Vec<Algorithm>,
}

/// Where an issuer's keys are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Jwks {
    /// In a file.
    File(PathBuf),
    /// At a URL, from where they are fetched again and again.
    Url(Uri),
}

impl TryFrom<String> for Jwks {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() {
            return Err("it is empty; give a file, or the URL of the issuer's jwks_uri".into());
        }
        if !text.contains("://") {
            return Ok(Self::File(text.into()));
        }
        let own = |host: &str| matches!(host, "localhost" | "127.0.0.1" | "[::1]");
        match text.parse::<Uri>() {
            Ok(uri) if uri.host().is_some_and(|host| !host.is_empty()) => match uri.scheme_str() {
                Some("https") => Ok(Self::Url(uri)),
                Some("http") if uri.host().is_some_and(own) => Ok(Self::Url(uri)),
                _ => {
                    Err(format!("{text:?} is fetched without TLS, so that anybody on the way could sign; use https://"))
                }
            },
            _ => Err(format!("{text:?} is no URL; give the issuer's jwks_uri, or a file")),
        }
    }
}

/// A signature algorithm with a public key (RFC 7518 §3.1, RFC 8037 §3.1).
///
/// There is no value for `none` or for the HMACs, whose key would be the issuer's secret: they cannot be let in by
/// mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Algorithm(jsonwebtoken::Algorithm);

impl Algorithm {
    pub(crate) fn get(self) -> jsonwebtoken::Algorithm {
        self.0
    }
}

impl TryFrom<String> for Algorithm {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        use jsonwebtoken::Algorithm::*;
        let known = [ES256, ES384, EdDSA, RS256, RS384, RS512, PS256, PS384, PS512];
        text.parse().ok().filter(|algorithm| known.contains(algorithm)).map(Self).ok_or_else(|| {
            let why = match text.as_str() {
                "none" => "is no signature",
                "HS256" | "HS384" | "HS512" => "needs the issuer's secret, and is refused",
                _ => "is not known",
            };
            format!("algorithm {text:?} {why}: use some of {known:?}")
        })
    }
}

pub(crate) const LABEL: &str = "use 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'";

/// Whether a text can name a plan, a consumer, a version or a query parameter: safe in a header, a URI and a log line.
pub(crate) fn is_label(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

fn timeout<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(d)?;
    let end = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit_ms = match &text[end..] {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60 * 1000),
        "h" => Some(60 * 60 * 1000),
        _ => None,
    };
    unit_ms
        .and_then(|unit| digits(&text[..end])?.checked_mul(unit))
        .map(Duration::from_millis)
        .filter(|timeout| !timeout.is_zero() && *timeout <= MAX_TIMEOUT)
        .map(Some)
        .ok_or_else(|| {
            de::Error::custom(format!(
                "{text:?} is not a timeout: use \"500ms\", \"10s\", \"5m\" or \"1h\", at most \"24h\""
            ))
        })
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

fn versions<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, VersionInfo>, D::Error> {
    let versions = BTreeMap::<String, VersionInfo>::deserialize(d)?;
    if versions.is_empty() {
        return Err(de::Error::custom("there must be a version, such as { v1 = {} }"));
    }
    // A segment of dots would not survive the path's normal form.
    let bad = versions.keys().find(|name| !is_label(name) || name.bytes().all(|b| b == b'.'));
    bad.map_or(Ok(()), |name| Err(de::Error::custom(format!("{name:?} is not a version name: {LABEL}"))))?;
    Ok(versions)
}

#[cfg(test)]
mod tests {
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
        assert_eq!(edge.version[0].versions["v1"].deprecated.unwrap().unix(), 1_767_225_600);
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
            (route("auth = [\"basic\"]"), "expected `api-key` or `jwt`"),
            (route("auth = []\nservce = 1"), "unknown field `servce`"),
            (route("auth = []\ntimeout = \"10\""), "is not a timeout"),
            (route("auth = []\ntimeout = \"0s\""), "is not a timeout"),
            (route("auth = []\ntimeout = \"99999999999999999999h\""), "is not a timeout"),
            (route("auth = []\ntimeout = \"1é\""), "is not a timeout"),
            (route("auth = []\nhost = \"a.example:443\""), "without a port"),
            (route("auth = []\nhost = \"a.*.example\""), "is not a host"),
            (route("auth = []\nhost = \"*example.com\""), "is not a host"),
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
