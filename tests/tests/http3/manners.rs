//! Who gives up, who answers early, where a request ends, and what a service reads of it.

use std::{
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use starling_chaos::wait_for;
use starling_tests::{
    program,
    raw_h3::{DATA, Outcome, code, frame, head},
    run,
};
use tokio::net::TcpStream;

use crate::scene::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_goes_is_noticed_by_the_service() {
    let scene = Scene::new().await;
    let mut told = 0;
    for side in SIDES {
        for path in ["/never", "/quiet"] {
            for way in ["stop", "reset", "close"] {
                let client = scene.dial(side).await;
                let reached = scene.ledger.count();
                let bytes = [side.post(path), frame(DATA, "x")].concat();
                let (mut send, mut receive) = client.open(&bytes).await.unwrap();
                wait_for("the call reaches the service", LIMIT, || async {
                    if scene.ledger.count() > reached { Ok(()) } else { Err("not yet".to_string()) }
                })
                .await
                .unwrap();
                if path == "/quiet" {
                    let mut first = [0; 64];
                    receive.read(&mut first).await.unwrap();
                }
                match way {
                    "stop" => receive.stop(code(REQUEST_CANCELLED)).unwrap(),
                    "reset" => send.reset(code(REQUEST_CANCELLED)).unwrap(),
                    _ => client.connection().close(code(NO_ERROR as u32), b""),
                }
                told += 1;
                scene.ledger.wait_given_up(told).await;
            }
        }
    }
    // The same through the doors of HTTP/1.1 and 2, whose cancellation crosses the mesh as HTTP/3's.
    let Some(curl) = program("curl") else { return };
    let resolve = format!("{HOST}:{}:127.0.0.1", scene.public.port());
    for version in ["--http1.1", "--http2"] {
        for path in ["/never", "/quiet"] {
            let url = format!("https://{HOST}:{}{path}", scene.public.port());
            run(&curl, &["-sSN", "-m", "2", version, "--cacert", &scene.cert, "--resolve", &resolve, &url]);
            told += 1;
            scene.ledger.wait_given_up(told).await;
        }
    }
    scene.assert_served().await;
    scene.assert_calm();
}

#[tokio::test]
async fn an_early_answer_stops_the_upload_and_arrives() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        for _ in 0..10 {
            let (mut send, receive) = client.open(&side.post("/refuse")).await.unwrap();
            let stopped = send.stopped();
            let uploading = async {
                let chunk = frame(DATA, vec![7; 16 << 10]);
                while send.write_all(&chunk).await.is_ok() {}
            };
            let (outcome, ()) = tokio::join!(client.outcome(receive), uploading);
            assert_eq!(outcome.unwrap(), Outcome::Answer(413, 2), "{side:?}");
            let stopped = stopped.await.unwrap().map(quinn::VarInt::into_inner);
            assert_eq!(stopped, Some(NO_ERROR), "{side:?}: nothing is wrong, the rest is not needed");
        }
    }
    scene.assert_calm();
}

#[tokio::test]
async fn an_end_in_a_packet_of_its_own_makes_no_body() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        for method in ["GET", "DELETE", "OPTIONS"] {
            let (mut send, receive) = client.open(&head(&side.fields(method, "/"))).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            send.write_all(&frame(DATA, "")).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            send.finish().unwrap();
            assert_eq!(client.outcome(receive).await.unwrap(), HELLO, "{side:?} {method}");
            let seen = scene.ledger.last();
            assert!(!seen.contains("transfer-encoding") && !seen.contains("content-length"), "{side:?}: {seen}");
        }
        // A body that is there is passed on.
        let fields = side.fields("DELETE", "/");
        assert_eq!(client.request(&[head(&fields), frame(DATA, "x")].concat()).await.unwrap(), HELLO);
        assert!(scene.ledger.last().contains("transfer-encoding: chunked"), "{}", scene.ledger.last());
    }
    // Over HTTP/2, whose end may come in a frame of its own, too: at the edge and at a node's own door.
    for (addr, host, tls) in
        [(scene.public, HOST, true), (scene.cluster.node("seed").outbound, "up.mesh.internal", false)]
    {
        let status = http2_get_with_late_end(&scene, addr, host, tls).await;
        let seen = scene.ledger.last();
        assert_eq!(status, 200, "{host}: {seen}");
        assert!(!seen.contains("transfer-encoding") && !seen.contains("content-length"), "{host}: {seen}");
    }
    scene.assert_calm();
}

/// A body of nothing that takes its time to end.
struct LateEnd(Pin<Box<tokio::time::Sleep>>);

impl http_body::Body for LateEnd {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        ready!(self.0.as_mut().poll(cx));
        Poll::Ready(None)
    }
}

/// A GET over HTTP/2 whose stream ends only some time after its head.
async fn http2_get_with_late_end(scene: &Scene, addr: SocketAddr, host: &str, tls: bool) -> u16 {
    use http_body_util::BodyExt;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let body = LateEnd(Box::pin(tokio::time::sleep(Duration::from_millis(200))));
    let request = Request::get(format!("https://{host}/")).body(body).unwrap();
    let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let mut sender = if tls {
        let stream = scene.client.connect_tls(addr, host, b"h2").await.unwrap();
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    } else {
        let stream = TcpStream::connect(addr).await.unwrap();
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    };
    let answer = tokio::time::timeout(LIMIT, sender.send_request(request)).await.unwrap().unwrap();
    let status = answer.status().as_u16();
    answer.into_body().collect().await.unwrap();
    status
}

#[tokio::test]
async fn cookies_reach_an_http1_service_in_one_line() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        let fields = [&side.fields("GET", "/")[..], &[("cookie", "a=1"), ("x", "1"), ("cookie", "b=2")]].concat();
        assert_eq!(client.request(&head(&fields)).await.unwrap(), HELLO);
        let cookies: Vec<String> =
            scene.ledger.last().lines().filter(|line| line.starts_with("cookie:")).map(String::from).collect();
        assert_eq!(cookies, ["cookie: a=1; b=2"], "{side:?}");
    }
}
