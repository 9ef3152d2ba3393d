//! HTTP/3 over real QUIC connections: against itself, against the `h3` crate in both roles, and against an end that answers
//! by hand what no decent server would.

mod answers;
mod exchanges;
mod interop;
mod wire;

/// Room for as many bodies as a test has.
fn shelf() -> starling_http::Shelf {
    starling_http::Shelf::new(1 << 30, 1 << 20)
}

fn limits() -> starling_http::h3::server::Limits {
    starling_http::h3::server::Limits {
        shelf: shelf(),
        idle: None,
        order: starling_http::h3::Order::InLine,
        peer: starling_http::h3::server::Peer::Client,
    }
}
