//! Leaving HTTP/1.1 on a connection: CONNECT (RFC 9110 §9.3.6) and Upgrade (§7.8).

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Version, header, response};
use http_body::Body as _;
use hyper::upgrade::OnUpgrade;

use crate::tunnel::{self, Protocol, websocket};

/// A request to leave HTTP on this connection.
pub(super) struct Switch {
    /// To what; bytes to the authority if `None`.
    pub(super) protocol: Option<Protocol>,
    /// Of a WebSocket.
    key: Option<HeaderValue>,
    upgrade: OnUpgrade,
}

impl Switch {
    /// Reads what a request asks for. An `Upgrade` may be passed over, and is where the tunnel would begin within the request's body,
    /// or where it asks for another version of HTTP (RFC 9110 §7.8).
    pub(super) fn asked_for(request: &mut Request<hyper::body::Incoming>) -> Option<Self> {
        if *request.method() == Method::CONNECT {
            return Some(Self { protocol: None, key: None, upgrade: hyper::upgrade::on(request) });
        }
        let fields = request.headers();
        let has_body = !request.body().is_end_stream() || fields.contains_key(header::CONTENT_LENGTH);
        let says = |name: HeaderName, what: &str| {
            let values = fields.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case(what))
        };
        let is_upgrade = request.version() == Version::HTTP_11
            && *request.method() == Method::GET
            && !has_body
            && says(header::CONNECTION, "upgrade");
        if !is_upgrade {
            return None;
        }
        let named = if says(header::UPGRADE, Protocol::WEBSOCKET) {
            Protocol::WEBSOCKET
        } else {
            fields.get(header::UPGRADE)?.to_str().ok()?.split(',').next()?.trim()
        };
        let protocol = Protocol::read(named).filter(|protocol| !protocol.is_http())?;
        let key = match protocol.is_websocket() {
            // Without it, it is none (RFC 6455 §4.2.1), and the service is the one to say so.
            true => Some(request.headers_mut().remove(header::SEC_WEBSOCKET_KEY)?),
            false => None,
        };
        Some(Self { protocol: Some(protocol), key, upgrade: hyper::upgrade::on(request) })
    }

    /// The answer that makes the switch, what comes of the connection then, and how long its client may take nothing.
    pub(super) fn consent(self, mut head: response::Parts) -> (response::Parts, OnUpgrade, Duration) {
        head.headers.remove(header::CONTENT_LENGTH);
        if let Some(Protocol(name)) = &self.protocol {
            head.status = StatusCode::SWITCHING_PROTOCOLS;
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            head.headers.insert(header::UPGRADE, HeaderValue::from_str(name).expect("a token"));
        }
        if let Some(key) = &self.key {
            head.headers.insert(header::SEC_WEBSOCKET_ACCEPT, websocket::accept_of(key.as_bytes()));
        }
        let patience = tunnel::patience_in(self.protocol.as_ref());
        (head, self.upgrade, patience)
    }

    /// An answer that makes none. What a client sent behind a CONNECT, without waiting, are bytes of its tunnel, and no requests.
    pub(super) fn refuse(&self, head: &mut response::Parts) {
        if self.protocol.is_none() {
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}
