//! A service in the test's own process, which does what the test says and counts what it sees.

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

/// An answer's body.
pub type Answer = Response<BoxBody<Bytes, Infallible>>;

/// A running service. Its connections end with the runtime of the test.
pub struct Service {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Requests that it has seen the head of.
    pub begun: Arc<AtomicUsize>,
    /// Requests whose answer is still awaited, or under way.
    pub open: Arc<AtomicUsize>,
    /// Connections that it has accepted.
    pub connections: Arc<AtomicUsize>,
}

/// A request under way; counted until it is dropped.
pub struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// How a service speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge, so many streams at a time.
    H2c(u32),
}

impl Service {
    /// Starts one. `answer` gets the request and a count to keep until its answer is over.
    pub async fn start<F>(speaks: Speaks, answer: impl Fn(Request<Incoming>, Open) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("it has an address");
        let service = Self { addr, begun: Arc::default(), open: Arc::default(), connections: Arc::default() };
        let (begun, open, connections) = (service.begun.clone(), service.open.clone(), service.connections.clone());
        let answer = Arc::new(answer);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Relaxed);
                let _ = stream.set_nodelay(true);
                let (begun, open, answer) = (begun.clone(), open.clone(), answer.clone());
                let service = service_fn(move |request| {
                    begun.fetch_add(1, Relaxed);
                    open.fetch_add(1, Relaxed);
                    let answered = answer(request, Open(open.clone()));
                    async move { Ok::<_, Infallible>(answered.await) }
                });
                let stream = TokioIo::new(stream);
                type Served = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;
                let served: Served = match speaks {
                    Speaks::Http1 => {
                        Box::pin(hyper::server::conn::http1::Builder::new().serve_connection(stream, service))
                    }
                    Speaks::H2c(streams) => Box::pin(
                        hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                            .max_concurrent_streams(streams)
                            .serve_connection(stream, service),
                    ),
                };
                tokio::spawn(served);
            }
        });
        service
    }

    /// Requests that are not over.
    pub fn open(&self) -> usize {
        self.open.load(Relaxed)
    }
}

/// An answer of that status, with a text.
pub fn text(status: u16, text: impl Into<Bytes>) -> Answer {
    use http_body_util::{BodyExt, Full};
    let mut answer = Response::new(Full::new(text.into()).boxed());
    *answer.status_mut() = http::StatusCode::from_u16(status).expect("a status");
    answer
}

/// An answer whose body never comes, and which keeps `open` as long as somebody waits for it.
pub fn watch(open: Open) -> Answer {
    use http_body_util::BodyExt;
    struct Silent {
        _open: Open,
    }
    impl http_body::Body for Silent {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
            std::task::Poll::Pending
        }
    }
    Response::new(Silent { _open: open }.boxed())
}
