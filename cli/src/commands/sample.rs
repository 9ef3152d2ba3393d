//! A sample service for the demo: says who it is, echoes bodies with their length, and makes bodies to download.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{body::Frame, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

use crate::{Failure, args::SampleArgs};

const CHUNK_BYTES: usize = 64 << 10;

pub(crate) async fn run(args: &SampleArgs) -> Result<(), Failure> {
    super::node::follow_parent();
    let listener = TcpListener::bind(args.listen).await?;
    let name: Bytes = format!("hello from {}\n", args.name).into();
    loop {
        let (stream, _) = listener.accept().await?;
        let _ = stream.set_nodelay(true);
        let name = name.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, name.clone()));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// `POST` answers with the SHA-256 of what came; `GET /bytes/N` sends N zero bytes; anything else says hello.
async fn answer(
    request: Request<hyper::body::Incoming>,
    name: Bytes,
) -> Result<Response<BoxBody<Bytes, Infallible>>, hyper::Error> {
    let size = request.uri().path().split_once("/bytes/").and_then(|(_, n)| n.parse::<usize>().ok());
    if request.method() == Method::POST {
        let mut digest = Sha256::new();
        let mut body = request.into_body();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                digest.update(&data);
            }
        }
        let hex: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
        return Ok(Response::new(http_body_util::Full::new(Bytes::from(hex)).boxed()));
    }
    let Some(size) = size else { return Ok(Response::new(http_body_util::Full::new(name).boxed())) };
    let chunks = (0..size).step_by(CHUNK_BYTES).map(move |at| {
        let zeroes = Bytes::from_static(&[0; CHUNK_BYTES]);
        Ok(Frame::data(zeroes.slice(..CHUNK_BYTES.min(size - at))))
    });
    let mut response = Response::new(StreamBody::new(futures_util::stream::iter(chunks)).boxed());
    response.headers_mut().insert(http::header::CONTENT_LENGTH, size.into());
    Ok(response)
}
