//! The `h3` crate at the other end, in both roles: an independent implementation.

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use proptest::prelude::*;
use starling_http::{
    Body, Drain,
    h3::{client::Client, server},
};

use crate::wire::{connections, send};

/// Echoes head and body of a request: fields starting with `x-` come back, the path as `x-path`.
async fn echo(request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::ACCEPTED;
    for (name, value) in &head.headers {
        if name.as_str().starts_with("x-") {
            response.headers_mut().append(name, value.clone());
        }
    }
    response.headers_mut().insert("x-path", HeaderValue::from_str(head.uri.path()).unwrap());
    response
}

fn fields() -> impl Strategy<Value = HeaderMap> {
    let field = ("x-[a-z]{1,12}", "[!-~]{0,60}");
    proptest::collection::vec(field, 0..20).prop_map(|fields| {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        map.remove("x-path");
        map
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Without the field that the echo adds.
fn echoed(mut fields: HeaderMap) -> (HeaderMap, String) {
    let path = fields.remove("x-path").map(|path| path.to_str().unwrap().to_string()).unwrap_or_default();
    (
        fields
            .into_iter()
            .fold((HeaderMap::new(), None), |(mut map, last), (name, value)| {
                let name = name.or(last).unwrap();
                if name.as_str().starts_with("x-") {
                    map.append(&name, value);
                }
                (map, Some(name))
            })
            .0,
        path,
    )
}

async fn h3_client_to_us(fields: HeaderMap, body: Bytes) -> (StatusCode, HeaderMap, Bytes) {
    let (dialled, accepted, _endpoints) = connections().await;
    tokio::spawn(server::serve(accepted, crate::limits(), Drain::default(), echo));
    let (mut driver, mut sender) = h3::client::new(h3_quinn::Connection::new(dialled)).await.unwrap();
    let driving = tokio::spawn(async move { std::future::poll_fn(|cx| driver.poll_close(cx)).await });
    let mut request = Request::post("https://x/some/path").body(()).unwrap();
    request.headers_mut().extend(fields);
    let mut stream = sender.send_request(request).await.unwrap();
    for chunk in body.chunks(1000) {
        stream.send_data(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    stream.finish().await.unwrap();
    let (head, ()) = stream.recv_response().await.unwrap().into_parts();
    let mut received = Vec::new();
    while let Some(mut data) = stream.recv_data().await.unwrap() {
        received.extend_from_slice(&data.copy_to_bytes(data.remaining()));
    }
    driving.abort();
    (head.status, head.headers, received.into())
}

async fn us_to_h3_server(fields: HeaderMap, body: Bytes) -> (StatusCode, HeaderMap, Bytes) {
    let (dialled, accepted, _endpoints) = connections().await;
    let serving = tokio::spawn(async move {
        let mut server = h3::server::Connection::new(h3_quinn::Connection::new(accepted)).await.unwrap();
        while let Ok(Some(resolver)) = server.accept().await {
            let (request, mut stream) = resolver.resolve_request().await.unwrap();
            let mut response = Response::builder().status(StatusCode::ACCEPTED).body(()).unwrap();
            *response.headers_mut() = request.headers().clone();
            response.headers_mut().insert("x-path", HeaderValue::from_str(request.uri().path()).unwrap());
            stream.send_response(response).await.unwrap();
            while let Some(mut data) = stream.recv_data().await.unwrap() {
                stream.send_data(data.copy_to_bytes(data.remaining())).await.unwrap();
            }
            stream.finish().await.unwrap();
        }
    });
    let client = Client::start(dialled, crate::shelf(), starling_http::h3::Order::InLine);
    let answer = send(&client, Method::PUT, "/some/path", &fields, Some(Body::full(body))).await.unwrap();
    let received = answer.body.collect().await.unwrap().to_bytes();
    serving.abort();
    (answer.head.status, answer.head.headers, received)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn h3_reads_what_we_write_and_we_read_what_it_writes(
        fields in fields(),
        body in proptest::collection::vec(any::<u8>(), 0..5000),
        ours in any::<bool>(),
    ) {
        let body = Bytes::from(body);
        let (status, headers, received) = runtime().block_on(async {
            let (fields, body) = (fields.clone(), body.clone());
            if ours { us_to_h3_server(fields, body).await } else { h3_client_to_us(fields, body).await }
        });
        prop_assert_eq!(status, StatusCode::ACCEPTED);
        prop_assert_eq!(echoed(headers), (fields, "/some/path".to_string()));
        prop_assert!(received == body);
    }
}
