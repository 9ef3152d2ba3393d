//! Header fields of our own, and those that never cross a hop unchanged. All lower case.

/// Milliseconds that are left to answer; shrinks hop by hop.
pub const DEADLINE: &str = "starling-deadline";
/// Which attempt this is, from 1; keeps a chain of proxies from multiplying retries.
pub const ATTEMPT: &str = "starling-attempt";
/// On responses: other calls in flight at the service, of all callers.
pub const LOAD: &str = "starling-load";
/// On responses made by the answering node: `no` when the service saw nothing of the call, `maybe` otherwise.
pub const SENT: &str = "starling-sent";
/// On responses made by the answering node: the service was asked to switch to another protocol, and answered as if it had not.
pub const NOT_SWITCHED: &str = "starling-not-switched";
/// To the local service: the calling node's name, from its certificate, never from the wire.
pub const CALLER: &str = "starling-caller";
/// To the local service: the services that the caller's certificate grants, separated by commas; absent if there are none.
/// Names are given by whoever makes tokens; a service can be served by none but those who were granted it.
pub const CALLER_SERVICES: &str = "starling-caller-services";
/// To the service behind an edge: the authenticated consumer.
pub const CONSUMER: &str = "starling-consumer";
/// From an edge: the authority that the client asked for, which the service is to see as Host.
pub const HOST: &str = "starling-host";
/// Prefix of every field that is ours; nothing under it is believed when it comes from outside.
pub const PREFIX: &str = "starling-";
/// Envoy's field for a client certificate; stripped from outside like our own.
pub const XFCC: &str = "x-forwarded-client-cert";
