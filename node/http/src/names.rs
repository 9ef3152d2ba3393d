//! Names and numbers that are written into nearly every message: made once.

use http::{HeaderName, HeaderValue};
use starling_protocol::headers;

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident = $text:expr;)*) => {
        $($(#[$doc])* pub static $name: HeaderName = HeaderName::from_static($text);)*

        /// A name as it is known here, if it is; in lower case.
        pub(crate) fn known(name: &[u8]) -> Option<HeaderName> {
            match name {
                $(name if name == $text.as_bytes() => Some($name.clone()),)*
                _ => None,
            }
        }
    };
}

names! {
    /// [`headers::DEADLINE`].
    DEADLINE = headers::DEADLINE;
    /// [`headers::ATTEMPT`].
    ATTEMPT = headers::ATTEMPT;
    /// [`headers::LOAD`].
    LOAD = headers::LOAD;
    /// [`headers::SENT`].
    SENT = headers::SENT;
    /// [`headers::NOT_SWITCHED`].
    NOT_SWITCHED = headers::NOT_SWITCHED;
    /// [`headers::CALLER`].
    CALLER = headers::CALLER;
    /// [`headers::CALLER_SERVICES`].
    CALLER_SERVICES = headers::CALLER_SERVICES;
    /// [`headers::CONSUMER`].
    CONSUMER = headers::CONSUMER;
    /// [`headers::HOST`].
    HOST = headers::HOST;
    /// Which trace a call belongs to (W3C Trace Context).
    TRACEPARENT = "traceparent";
    /// What others have noted of the trace.
    TRACESTATE = "tracestate";
    /// An edge's name for the request.
    REQUEST_ID = "x-request-id";
    /// The client's address.
    FORWARDED_FOR = "x-forwarded-for";
    /// The client's scheme.
    FORWARDED_PROTO = "x-forwarded-proto";
    /// The authority that the client asked for.
    FORWARDED_HOST = "x-forwarded-host";
}

/// A number as the value of a field.
pub fn numeral(number: u64) -> HeaderValue {
    const SMALL: [&str; 16] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15"];
    match usize::try_from(number).ok().and_then(|number| SMALL.get(number)) {
        Some(text) => HeaderValue::from_static(text),
        None => HeaderValue::from(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_their_text() {
        for name in [&DEADLINE, &TRACEPARENT, &FORWARDED_HOST] {
            assert_eq!(known(name.as_str().as_bytes()).as_ref(), Some(name));
        }
        assert_eq!(known(b"starling-unknown"), None);
    }

    #[test]
    fn numbers_are_written_out() {
        for number in [0, 7, 15, 16, 12_345, u64::MAX] {
            assert_eq!(numeral(number), number.to_string());
        }
    }
}
