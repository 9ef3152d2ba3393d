//! `[[route]]`: which requests go to which service, and who may send them.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, StatusCode};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};
use starling_node::{HedgeSettings, LimitSettings, RepeatSettings, RetrySettings};
use starling_protocol::Name;

use super::{
    action::{Maintenance, Prefix, Redirect},
    digits,
    forward::Forward,
    matching::Conditions,
    some,
};
use crate::{
    cors::Cors,
    route,
    transform::{fields::Edits, size::Size},
};

/// Longest timeout of a route: more than a day is a slip of the pen.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

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
    /// What a request must have besides, for the route to be its.
    #[serde(default, rename = "match")]
    pub conditions: Conditions,
    /// The service behind it, unless it is a redirect.
    pub service: Option<Name>,
    /// Where requests are sent instead.
    pub redirect: Option<Redirect>,
    /// Whether, and how, they are put off.
    pub maintenance: Option<Maintenance>,
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
    /// How large an answer may be; as large as it likes if not told.
    pub max_response_size: Option<Size>,
    /// Whether answers are compressed that clients can read then.
    #[serde(default)]
    pub compress: bool,
    /// How many requests may be under way at once; as many as come if not told.
    pub max_concurrency: Option<NonZeroU32>,
    /// What is changed about the fields of a request.
    #[serde(default)]
    pub request_headers: Edits,
    /// What is changed about the fields of an answer.
    #[serde(default)]
    pub response_headers: Arc<Edits>,
    /// What a token's `scope` must have, all of it.
    #[serde(default, deserialize_with = "scopes")]
    pub scopes: Vec<String>,
    /// Claims that a token must have, each with one of some values.
    #[serde(default)]
    pub claims: BTreeMap<String, OneOf>,
    /// Fields in which the service is told claims of the token, by the name of the field.
    #[serde(default, deserialize_with = "claim_headers")]
    pub claim_headers: Vec<(HeaderName, String)>,
    /// Names that a caller's certificate may have; any if not told.
    #[serde(default, deserialize_with = "some")]
    pub client_names: Vec<String>,
    /// Whether the service is told the caller's certificate (RFC 9440).
    #[serde(default)]
    pub forward_client_certificate: bool,
    /// A service that decides besides whether a request may pass.
    pub forward: Option<Forward>,
    /// How much of a plan one call takes; 1 if not told.
    #[serde(default = "one")]
    pub cost: NonZeroU32,
    /// Field of an answer in which the service says how much the call takes in all; clients do not see it.
    #[serde(default, deserialize_with = "cost_field")]
    pub cost_from: Option<HeaderName>,
    /// Whether the service sees the path without the prefix.
    #[serde(default)]
    pub strip_prefix: bool,
    /// What the service sees in place of the prefix.
    pub rewrite: Option<Prefix>,
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
    /// Whether it is every address.
    pub(crate) fn is_all(&self) -> bool {
        self.0.prefix_len() == 0
    }

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
    /// The path that the service sees, of one in its one spelling, or as it came.
    pub(crate) fn target<'a>(&self, path: &'a str) -> Cow<'a, str> {
        match &self.rewrite {
            Some(prefix) => prefix.with(route::below(&self.path, path)).into(),
            None if self.strip_prefix => route::below(&self.path, path).into(),
            None => path.into(),
        }
    }

    /// Where a redirect leads for a request with that path and query; `None` if it is none.
    pub(crate) fn location(&self, path: &str, query: Option<&str>) -> Option<(StatusCode, String)> {
        let redirect = self.redirect.as_ref()?;
        Some((redirect.status, redirect.to.of(route::below(&self.path, path), query)))
    }

    /// Fields in which the service is told of the caller: what the client says under these names is gone.
    pub(crate) fn told_headers(&self) -> impl Iterator<Item = &HeaderName> {
        let forwarded = self.forward.iter().flat_map(|forward| &forward.headers);
        self.claim_headers.iter().map(|(name, _)| name).chain(forwarded)
    }

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
    let field = |(name, claim): (String, String)| named_by_hand(&name).map(|name| (name, claim));
    let fields = fields.into_iter().map(field).collect::<Result<Vec<_>, String>>().map_err(de::Error::custom)?;
    let twice = fields.iter().enumerate().find(|(at, (name, _))| fields[..*at].iter().any(|(other, _)| other == name));
    match twice {
        Some((_, (name, _))) => Err(de::Error::custom(format!("{name} is there twice: remove one"))),
        None => Ok(fields),
    }
}

/// A field that an operator makes up, to tell a service something of a caller.
pub(super) fn named_by_hand(name: &str) -> Result<HeaderName, String> {
    let name = name.parse::<HeaderName>().map_err(|_| format!("{name:?} is not the name of a field"))?;
    let text = name.as_str();
    let of_edge = ["x-real-ip", "x-request-id", "x-api-key"].contains(&text);
    if !text.starts_with("x-") || text.starts_with("x-forwarded-") || of_edge {
        return Err(format!("{name} may have a meaning of its own: use another name with x-, such as \"x-tenant\""));
    }
    // Others are read as `-` by some servers, so that a client could say the same in another spelling.
    match text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        true => Ok(name),
        false => Err(format!("{name}: use letters, digits and - only, such as \"x-tenant\"")),
    }
}

fn cost_field<'de, D: Deserializer<'de>>(d: D) -> Result<Option<HeaderName>, D::Error> {
    named_by_hand(&String::deserialize(d)?).map(Some).map_err(de::Error::custom)
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
    /// A certificate of an authority in `[client_certificate]`.
    ClientCertificate,
}

pub(super) fn timeout<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
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
