//! A service of the mesh that decides whether requests of a route may pass.
//!
//! It is asked with the head of the request, and never sees its body. A success lets the request pass, with some fields of the
//! answer. Any other answer that is the service's own is the client's answer. Without one nothing passes.

use std::{net::IpAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header, request};
use http_body_util::{BodyExt, Limited};
use starling_http::{Body, Guarded, Problem, ProxyError};
use starling_node::{Call, Carried, LimitSettings, MadeByNode, RepeatSettings, trace::Origin};
use starling_protocol::headers;

use crate::{
    caller::Caller,
    config::{Forward, Route},
    dress::{FORWARDED, METHOD_OVERRIDES, PATH_OVERRIDES, hide_keys},
    gateway::Gateway,
    hops,
};

/// Longest body of its answer.
const MAX_BODY: usize = 64 << 10;
/// Requests of one address that wait for a decision.
const MAX_DECIDING_OF_ONE: usize = 256;
/// Longest name that it may give a caller, in bytes.
const MAX_NAME: usize = 256;

/// What becomes of a request.
pub(crate) enum Decision {
    Passes {
        /// Who it is, by the service's word.
        consumer: Option<String>,
        /// For the service behind.
        told: Vec<(HeaderName, HeaderValue)>,
    },
    /// This is its answer.
    Refused(Box<Response<Guarded<Carried>>>),
}

/// What is decided about.
pub(crate) struct Asked<'a> {
    pub(crate) parts: &'a request::Parts,
    pub(crate) route: &'a Route,
    /// Path and query, in the spelling that the route was found by.
    pub(crate) target: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) from: IpAddr,
}

impl Asked<'_> {
    /// The question: a GET, with the fields of the request that are about its caller, and with ours about the request.
    fn question(&self, forward: &Forward, caller: &Caller, request_id: &str) -> Result<Request<Body>, Problem> {
        let mut fields = self.parts.headers.clone();
        let about_body = |name: &HeaderName| name.as_str().starts_with("content-") || OF_THE_REQUEST.contains(name);
        let gone: Vec<_> = fields.keys().filter(|name| about_body(name)).cloned().collect();
        let said = FORWARDED.into_iter().chain(PATH_OVERRIDES).chain(METHOD_OVERRIDES).map(HeaderName::from_static);
        gone.into_iter().chain(said).for_each(|name| drop(fields.remove(name)));
        for name in self.route.told_headers().chain(&forward.consumer) {
            fields.remove(name);
        }
        hide_keys(&mut fields);
        fields.extend(caller.told.iter().cloned());
        let method = if self.parts.method == Method::CONNECT { &Method::GET } else { &self.parts.method };
        let (from, forwarded) = (self.from.to_canonical().to_string(), hops::forwarded(self.from, self.authority));
        let set: [(&'static str, &str); 7] = [
            ("forwarded", &forwarded),
            ("x-forwarded-for", &from),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", self.authority),
            ("x-forwarded-method", method.as_str()),
            ("x-forwarded-uri", self.target),
            ("x-request-id", request_id),
        ];
        for (name, value) in set.into_iter().chain(caller.consumer.as_deref().map(|name| (headers::CONSUMER, name))) {
            let value = HeaderValue::from_str(value).map_err(|_| unfit())?;
            fields.insert(HeaderName::from_static(name), value);
        }
        let mut question = Request::new(Body::empty());
        *question.uri_mut() = forward.path.parse().map_err(|_| unfit())?;
        *question.headers_mut() = fields;
        Ok(question)
    }
}

impl Gateway {
    /// Asks the service, and waits for its answer, but no longer than the route says.
    pub(crate) async fn decide(
        &self,
        forward: &Forward,
        asked: &Asked<'_>,
        caller: &Caller,
        request_id: &str,
    ) -> Result<Decision, Problem> {
        let Some(place) = self.standing.deciding.enter(asked.from, MAX_DECIDING_OF_ONE) else {
            return Err(undecided("too many requests from this address wait for a decision"));
        };
        let mut question = asked.question(forward, caller, request_id)?;
        let mut observed = self.observer.outgoing(&Method::GET, question.headers_mut(), Origin::Ours);
        observed.is_for(forward.service.as_str());
        let within = Some(forward.timeout);
        let limits = LimitSettings { timeout: within, total_timeout: within, ..LimitSettings::default() };
        let limits = limits.of(question.headers());
        let (service, repeats) = (forward.service.clone(), RepeatSettings::default());
        let call = Call { service, version: None, request: question, limits, repeats };
        let no_answer = || undecided("whether this may pass cannot be told now");
        let answer = self.client.call(call, &mut observed).await.map_err(|error| {
            tracing::debug!(service = %forward.service, %error, "no decision");
            no_answer()
        })?;
        let is_its_own = answer.extensions().get::<MadeByNode>().is_none();
        let (head, body) = observed.answered(answer).into_parts();
        if !is_its_own || head.status.is_server_error() || head.status.is_informational() {
            tracing::debug!(service = %forward.service, status = %head.status, "no decision");
            return Err(no_answer());
        }
        let body = Limited::new(body, MAX_BODY).collect();
        if head.status.is_success() {
            // What it says is in the head. A body that is left where it is would cost the service its connection.
            tokio::spawn(async move {
                let _until_then = place;
                let _ = body.await;
            });
            let consumer = match forward.consumer.as_ref().and_then(|name| head.headers.get(name)) {
                Some(name) => Some(consumer(name).ok_or_else(no_answer)?),
                None => None,
            };
            let told = |name: &HeaderName| told(&head.headers, name);
            return Ok(Decision::Passes { consumer, told: forward.headers.iter().flat_map(told).collect() });
        }
        let body: Bytes = body.await.map_err(|_| no_answer())?.to_bytes();
        let mut refusal = Response::new(Guarded::from(Body::full(body)));
        *refusal.status_mut() = head.status;
        *refusal.headers_mut() = head.headers;
        refusal.headers_mut().remove(header::CONTENT_LENGTH);
        Ok(Decision::Refused(Box::new(refusal)))
    }
}

/// Fields that are about the request's body, or would have the question answered in another way than with what there is.
const OF_THE_REQUEST: [HeaderName; 12] = [
    header::ACCEPT_ENCODING,
    header::EXPECT,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::IF_UNMODIFIED_SINCE,
    header::RANGE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

fn told(fields: &HeaderMap, name: &HeaderName) -> Vec<(HeaderName, HeaderValue)> {
    fields.get_all(name).iter().map(|value| (name.clone(), value.clone())).collect()
}

/// A name by which limits know a caller, so that it cannot pass for one that is known in another way.
fn consumer(name: &HeaderValue) -> Option<String> {
    let name = name.to_str().ok()?;
    let is_plain = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic());
    is_plain.then(|| format!("forward:{name}"))
}

fn undecided(detail: &'static str) -> Problem {
    Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "undecided", detail).retry_after(Duration::from_secs(1))
}

fn unfit() -> Problem {
    Problem::proxy(StatusCode::BAD_REQUEST, ProxyError::HttpRequestError, "the request target is not a path")
}
