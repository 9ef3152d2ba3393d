//! Serves HTTP/3 on an established QUIC connection: the mesh's calls and the edge's public requests alike.

use std::{
    future::Future,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use h3::error::Code;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use tokio_util::task::TaskTracker;

use crate::{Body, Drain, guard};

/// How long a request's head may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// After the first GOAWAY, how long requests that were on their way are still taken.
const GOAWAY_GRACE: Duration = Duration::from_millis(100);
/// The first GOAWAY names an id far ahead, because RFC 9114 §5.2 lets a client take anything from that id on for
/// unprocessed; the second one names the real bound.
const GOAWAY_AHEAD: usize = 1 << 16;

type ServerConnection = h3::server::Connection<guard::Connection, Bytes>;
type Resolver = h3::server::RequestResolver<guard::Connection, Bytes>;
type SendStream = h3::server::RequestStream<guard::Send, Bytes>;

/// Serves requests until the peer closes or the node drains. Requests run side by side; one that fails resets its own
/// stream and nothing else.
pub async fn serve<H, F>(connection: quinn::Connection, drain: Drain, handler: H)
where
    H: Fn(Request<Body>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let transport = guard::Connection::new(connection.clone());
    let rejecting = transport.rejecting();
    let built =
        h3::server::builder().send_grease(false).max_field_section_size(guard::MAX_FRAME_BYTES).build(transport).await;
    let Ok(mut h3) = built else { return };
    let requests = TaskTracker::new();

    loop {
        tokio::select! {
            accepted = h3.accept() => match accepted {
                Ok(Some(resolver)) => spawn_request(&requests, &connection, resolver, &handler),
                Ok(None) | Err(_) => return,
            },
            () = drain.draining() => break,
        }
    }
    go_away(&mut h3, &connection, &rejecting, &drain, &requests, &handler).await;
}

/// Two-step GOAWAY, then waits for what was taken. `accept` does not end by itself after our own GOAWAY.
async fn go_away<H, F>(
    h3: &mut ServerConnection,
    connection: &quinn::Connection,
    rejecting: &AtomicBool,
    drain: &Drain,
    requests: &TaskTracker,
    handler: &H,
) where
    H: Fn(Request<Body>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    if h3.shutdown(GOAWAY_AHEAD).await.is_err() {
        return;
    }
    let grace = tokio::time::sleep(GOAWAY_GRACE.max(connection.rtt() * 2));
    tokio::pin!(grace);
    loop {
        tokio::select! {
            accepted = h3.accept() => match accepted {
                Ok(Some(resolver)) => spawn_request(requests, connection, resolver, handler),
                Ok(None) | Err(_) => break,
            },
            () = &mut grace => break,
        }
    }
    // The named id is the first that was *not* taken: one beyond the last.
    rejecting.store(true, Relaxed);
    let _ = h3.shutdown(1).await;
    requests.close();
    let finished = async {
        loop {
            tokio::select! {
                () = requests.wait() => return,
                // Keeps the connection's machinery going; what still arrives is rejected.
                accepted = h3.accept() => match accepted {
                    Ok(Some(resolver)) => drop(resolver),
                    Ok(None) | Err(_) => return requests.wait().await,
                },
            }
        }
    };
    tokio::select! {
        () = finished => {
            // The last bytes are written, not yet received: give them a moment before the connection goes.
            tokio::time::sleep(connection.rtt() * 2).await;
        }
        () = drain.closing() => {}
    }
}

fn spawn_request<H, F>(requests: &TaskTracker, connection: &quinn::Connection, resolver: Resolver, handler: &H)
where
    H: Fn(Request<Body>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let (handler, connection) = (handler.clone(), connection.clone());
    requests.spawn(async move {
        let answered = async move {
            let Ok(Ok((request, stream))) = tokio::time::timeout(HEAD_TIMEOUT, resolver.resolve_request()).await else {
                return;
            };
            let (send, receive) = stream.split();
            let (head, ()) = request.into_parts();
            let body = Body::h3_server(receive).peek().await;
            let response = handler(Request::from_parts(head, body)).await;
            send_response(send, response).await;
        };
        // A peer that is gone wants no answer; without this, a call to a quiet service would wait for it for ever.
        tokio::select! {
            () = answered => {}
            _ = connection.closed() => {}
        }
    });
}

/// Sends head, body and trailers. A body that breaks off resets the stream, so that nobody takes it for complete.
async fn send_response(mut stream: SendStream, response: Response<Body>) {
    let (parts, mut body) = response.into_parts();
    let too_big = match stream.send_response(Response::from_parts(parts, ())).await {
        Ok(()) => false,
        Err(h3::error::StreamError::HeaderTooBig { .. }) => true,
        Err(_) => return,
    };
    if too_big {
        // The peer announced how large a head it takes; a small one tells it what happened.
        let mut head = Response::new(());
        *head.status_mut() = StatusCode::BAD_GATEWAY;
        body = Body::empty();
        if stream.send_response(head).await.is_err() {
            return;
        }
    }
    if http_body::Body::is_end_stream(&body) {
        let _ = stream.finish().await;
        return;
    }
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            stream.stop_stream(Code::H3_INTERNAL_ERROR);
            return;
        };
        let sent = match frame.into_data() {
            Ok(data) => stream.send_data(data).await,
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => stream.send_trailers(trailers).await,
                Err(_) => Ok(()),
            },
        };
        if sent.is_err() {
            return;
        }
    }
    let _ = stream.finish().await;
}
