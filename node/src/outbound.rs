//! The doors for the local application: the outbound listener, which routes by host name, and a port for each upstream.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use http::{Request, Response, StatusCode};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use starling_protocol::{Name, service_of_host};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    Body, Call, Drain, MeshClient, Problem, ProxyError,
    message::{self, Origin},
    metrics::Metrics,
    problem::is_grpc,
};

/// How long a request's head may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest head, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Streams on one HTTP/2 connection of the application.
const MAX_STREAMS: u32 = 1024;
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Time for a call.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// One door.
#[derive(Clone)]
pub(crate) struct Outbound {
    pub(crate) client: MeshClient,
    /// The service that this door leads to; by host name if `None`.
    pub(crate) service: Option<Name>,
    pub(crate) metrics: Metrics,
}

impl Outbound {
    /// Serves until the drain is over.
    pub(crate) async fn serve(self, listener: TcpListener, drain: Drain) {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, from)) => {
                        let (door, of) = (self.clone(), drain.clone());
                        drain.spawn(async move { door.serve_connection(stream, from, of).await });
                    }
                    // Out of descriptors, most likely: wait for some to come back.
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                () = drain.draining() => return,
            }
        }
    }

    async fn serve_connection(self, stream: TcpStream, from: SocketAddr, drain: Drain) {
        let _ = stream.set_nodelay(true);
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            let door = self.clone();
            async move { Ok::<_, std::convert::Infallible>(door.answer(request.map(Body::from)).await) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD_BYTES)
            .max_headers(message::MAX_FIELDS);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(STREAM_WINDOW_BYTES * 8)
            .max_header_list_size(MAX_HEAD_BYTES as u32);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = drain.draining() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    served = connection.as_mut() => served,
                    () = drain.closing() => return,
                }
            }
        };
        if let Err(error) = served {
            tracing::debug!(%from, %error, "connection of an application");
        }
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let grpc = is_grpc(request.headers());
        let method = request.method().clone();
        let begun = Instant::now();
        let mut service = None;
        let response = match self.call(request, &mut service).await {
            Ok(response) => response,
            Err(problem) => problem.into_response(self.client.pseudonym(), grpc),
        };
        let service = service.as_ref().map_or("unknown", Name::as_str);
        self.metrics.client_call(service, &method, response.status(), begun.elapsed());
        response
    }

    async fn call(&self, request: Request<Body>, called: &mut Option<Name>) -> Result<Response<Body>, Problem> {
        let (mut parts, body) = request.into_parts();
        let checked = message::normalise_request(&mut parts, Origin::Outside)?;
        let service = match &self.service {
            Some(service) => service.clone(),
            None => {
                let host = checked.authority.rsplit_once(':').map_or(checked.authority.as_str(), |(host, _)| host);
                service_of_host(host).ok_or_else(|| {
                    let detail = format!("{host} is not a service of the mesh; call <service>.mesh.internal");
                    Problem::proxy(StatusCode::NOT_FOUND, ProxyError::DestinationNotFound, detail)
                })?
            }
        };
        *called = Some(service.clone());
        let request = Request::from_parts(parts, body.with_length(checked.length));
        let call = Call { service, version: None, request, timeout: DEFAULT_TIMEOUT };
        Ok(self.client.call(call).await?)
    }
}
