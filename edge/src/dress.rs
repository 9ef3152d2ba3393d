//! What a service gets of a request: the path that it is to see, and who called and from where, by our word and nobody else's.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request};
use starling_http::{Problem, ProxyError};
use starling_protocol::headers;

use crate::{
    api_key,
    config::{ForwardHost, Route},
    hops, jwt,
};

/// What is said of a request in place of what its client says.
pub(crate) struct Dress<'a> {
    /// As policy has it.
    pub(crate) path: &'a str,
    pub(crate) route: &'a Route,
    pub(crate) consumer: Option<&'a str>,
    /// What the caller's token says, for the service.
    pub(crate) told: &'a [(HeaderName, HeaderValue)],
    pub(crate) client: IpAddr,
    /// What the client asked for.
    pub(crate) authority: &'a str,
}

impl Dress<'_> {
    /// Changes a request so that the service may have it.
    pub(crate) fn put_on(&self, parts: &mut request::Parts, request_id: &str) -> Result<(), Problem> {
        let path = self.route.target(self.path);
        let target = match parts.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path.into_owned(),
        };
        parts.uri = target.parse().map_err(|_| unfit("the request target is not a path"))?;
        for name in FORWARDED.into_iter().chain(PATH_OVERRIDES) {
            parts.headers.remove(name);
        }
        if !self.route.conditions.methods.is_empty() {
            // The method that the route was chosen by is the one that counts.
            for name in METHOD_OVERRIDES {
                parts.headers.remove(name);
            }
        }
        // Also those that nothing is said in: a client cannot say it in their place.
        for name in self.route.told_headers() {
            parts.headers.remove(name);
        }
        parts.headers.extend(self.told.iter().cloned());
        hide_keys(&mut parts.headers);
        let client = self.client.to_canonical().to_string();
        let forwarded = hops::forwarded(self.client, self.authority);
        let host = match &self.route.forward_host {
            ForwardHost::Public => Some(self.authority),
            ForwardHost::Named(name) => Some(name.as_str()),
            ForwardHost::Service => None,
        };
        let set: [(&'static str, &str); 5] = [
            ("forwarded", &forwarded),
            ("x-forwarded-for", &client),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", self.authority),
            ("x-request-id", request_id),
        ];
        let consumer = self.consumer.map(|consumer| (headers::CONSUMER, consumer));
        let host = host.map(|host| (headers::HOST, host));
        for (name, value) in set.into_iter().chain(consumer).chain(host) {
            let value = HeaderValue::from_str(value).map_err(|_| unfit("a name that no field can carry"))?;
            parts.headers.insert(HeaderName::from_static(name), value);
        }
        Ok(())
    }
}

/// Removes what a key of ours came in, which is for us alone; a token may be the service's to read.
pub(crate) fn hide_keys(fields: &mut HeaderMap) {
    fields.remove("x-api-key");
    if jwt::bearer(fields).is_ok_and(|token| token.is_some_and(api_key::is_api_key)) {
        fields.remove(header::AUTHORIZATION);
    }
}

/// Fields that say where a request comes from; a client's own word for it is not passed on.
pub(crate) const FORWARDED: [&str; 10] = [
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-forwarded-method",
    "x-forwarded-uri",
    "x-real-ip",
    "forwarded",
    "client-cert",
    "client-cert-chain",
];

/// Fields that some services take for the path, which policy has looked at.
pub(crate) const PATH_OVERRIDES: [&str; 3] = ["x-original-url", "x-original-uri", "x-rewrite-url"];
/// Fields that some services take for the method.
pub(crate) const METHOD_OVERRIDES: [&str; 4] =
    ["x-http-method-override", "x-http-method", "x-method-override", "x-original-method"];

fn unfit(detail: &'static str) -> Problem {
    Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, detail)
}
