//! Our client and our server: whole exchanges, and what happens when one end gives up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use starling_http::{
    Body, Drain, Guard, Guarded,
    h3::{
        Code,
        client::{Client, RequestError},
        server,
    },
};
use tokio::sync::Notify;

use crate::wire::{LIMIT, connections, get, head, send};

/// What the service saw.
#[derive(Default)]
struct Ledger {
    requests: AtomicUsize,
    /// Handlers and bodies that were given up.
    given_up: AtomicUsize,
    noticed: Notify,
    uploads: AtomicUsize,
}

/// Counts itself as given up unless it ended.
struct Watch(Arc<Ledger>, AtomicBool);

impl Watch {
    fn new(ledger: &Arc<Ledger>) -> Self {
        Self(ledger.clone(), AtomicBool::new(false))
    }
}

impl Guard for Watch {
    fn ended(&mut self) {
        self.1.store(true, SeqCst);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.1.load(SeqCst) {
            self.0.given_up.fetch_add(1, SeqCst);
            self.0.noticed.notify_one();
        }
    }
}

async fn answer(request: Request<Body>, ledger: Arc<Ledger>) -> Response<Guarded<Watch>> {
    ledger.requests.fetch_add(1, SeqCst);
    let mut watch = Watch::new(&ledger);
    let (head, body) = request.into_parts();
    let (status, body) = match head.uri.path() {
        "/echo" => (StatusCode::OK, body),
        "/length" => {
            let bytes = body.collect().await.map(|body| body.to_bytes().len());
            ledger.uploads.fetch_add(1, SeqCst);
            (StatusCode::OK, Body::full(format!("{bytes:?}")))
        }
        // Whether there is a body at all, before any of it is read.
        "/has-body" => (StatusCode::OK, Body::full(format!("{}", !http_body::Body::is_end_stream(&body)))),
        "/never" => std::future::pending().await,
        // Never reads the upload and never answers.
        "/deaf" => {
            let _held = body;
            std::future::pending().await
        }
        "/refuse" => (StatusCode::PAYLOAD_TOO_LARGE, Body::full("too large")),
        // A head, and then nothing for ever: the echo of an upload that goes on for ever.
        "/quiet" => (StatusCode::OK, body),
        "/broken" => (StatusCode::OK, Body::full("short").with_length(Some(9))),
        "/large-head" => {
            watch.ended();
            let mut response = Response::new(Guarded::new(Body::full("x"), watch));
            for i in 0..100 {
                response.headers_mut().insert(
                    http::HeaderName::from_bytes(format!("x-{i}").as_bytes()).unwrap(),
                    http::HeaderValue::from_str(&"a".repeat(1000)).unwrap(),
                );
            }
            return response;
        }
        _ => (StatusCode::NOT_FOUND, Body::full("nothing there")),
    };
    let mut response = Response::new(Guarded::new(body, watch));
    *response.status_mut() = status;
    response
}

struct Pair {
    client: Client,
    server: quinn::Connection,
    ledger: Arc<Ledger>,
    drain: Drain,
    _endpoints: [quinn::Endpoint; 2],
}

async fn pair() -> Pair {
    let (dialled, accepted, endpoints) = connections().await;
    let (ledger, drain) = (Arc::<Ledger>::default(), Drain::default());
    let of = ledger.clone();
    drain.spawn(server::serve(accepted.clone(), crate::limits(), drain.clone(), move |request| {
        answer(request, of.clone())
    }));
    Pair {
        client: Client::start(dialled, crate::shelf(), starling_http::h3::Order::InLine),
        server: accepted,
        ledger,
        drain,
        _endpoints: endpoints,
    }
}

impl Pair {
    async fn noticed(&self) {
        tokio::time::timeout(LIMIT, self.ledger.noticed.notified()).await.expect("the service is told");
    }

    /// Sends a request by hand, without its end.
    async fn open(&self, bytes: &[u8]) -> (quinn::SendStream, quinn::RecvStream) {
        let (mut send, receive) = self.client.connection().open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        (send, receive)
    }
}

fn post(path: &str) -> Vec<u8> {
    head(&[(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", path)])
}

/// The body of an upload of so many times 16 KiB, which then stays open if `endless`: as an edge has it from a client, over a
/// connection of its own.
async fn upload(chunks: usize, endless: bool) -> Body {
    let (dialled, accepted, endpoints) = connections().await;
    let (sender, mut bodies) = tokio::sync::mpsc::channel(1);
    tokio::spawn(server::serve(accepted, crate::limits(), Drain::default(), move |request: Request<Body>| {
        let sender = sender.clone();
        async move {
            let _ = sender.send(request.into_body()).await;
            std::future::pending::<Response<Body>>().await
        }
    }));
    tokio::spawn(async move {
        let (mut send, receive) = dialled.open_bi().await.unwrap();
        send.write_all(&post("/")).await.unwrap();
        let chunk = [&[0, 0x80, 0, 0x40, 0][..], &[7; 16 << 10]].concat();
        for _ in 0..chunks {
            if send.write_all(&chunk).await.is_err() {
                break;
            }
        }
        if !endless {
            let _ = send.finish();
        }
        let _ = send.stopped().await;
        // The exchange goes on until whoever has the body is done with it.
        std::future::pending::<()>().await;
        drop((receive, endpoints));
    });
    bodies.recv().await.unwrap()
}

#[tokio::test]
async fn bodies_and_trailers_go_both_ways() {
    let pair = pair().await;
    for size in [0, 1, 1000, 1025, 70_000, 3 << 20] {
        let bytes = Bytes::from(vec![b'x'; size]);
        let answer =
            send(&pair.client, Method::POST, "/echo", &HeaderMap::new(), Some(Body::full(bytes.clone()))).await;
        let echoed = answer.unwrap().body.collect().await.unwrap().to_bytes();
        assert!(echoed == bytes, "{size} bytes came back as {}", echoed.len());
    }
    let answer =
        send(&pair.client, Method::POST, "/echo", &HeaderMap::new(), Some(upload(400, false).await)).await.unwrap();
    assert_eq!(answer.body.collect().await.unwrap().to_bytes().len(), 400 * (16 << 10));
    assert_eq!(pair.ledger.given_up.load(SeqCst), 0);
}

#[tokio::test]
async fn an_answer_to_head_has_no_body_and_a_large_head_is_told() {
    let pair = pair().await;
    let answer = send(&pair.client, Method::HEAD, "/echo", &HeaderMap::new(), None).await.unwrap();
    assert_eq!(answer.body.collect().await.unwrap().to_bytes().len(), 0);
    let answer = send(&pair.client, Method::HEAD, "/large-head", &HeaderMap::new(), None).await.unwrap();
    assert_eq!(answer.head.status, StatusCode::BAD_GATEWAY, "an answer of our own making");
    assert_eq!(answer.body.collect().await.unwrap().to_bytes().len(), 0);
    let answer = get(&pair.client, "/large-head").await.unwrap();
    assert_eq!(answer.head.status, StatusCode::BAD_GATEWAY);
    let text = answer.body.collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("larger than the client takes"), "{text:?}");
    let mut fields = HeaderMap::new();
    fields.insert("x", http::HeaderValue::from_str(&"a".repeat(70_000)).unwrap());
    let refused = send(&pair.client, Method::GET, "/echo", &fields, None).await;
    assert!(matches!(refused, Err(RequestError::TooLarge)), "{refused:?}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_never_whole() {
    let pair = pair().await;
    // What is known at once to be broken need not even begin.
    let error = match get(&pair.client, "/broken").await {
        Ok(answer) => answer.body.collect().await.unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("H3_INTERNAL_ERROR"), "{error}");
    assert!(get(&pair.client, "/echo").await.is_ok(), "the connection goes on");
}

#[tokio::test]
async fn a_caller_that_goes_before_the_head_is_noticed() {
    let pair = pair().await;
    // Dropped by us: STOP_SENDING and RESET.
    let asking = get(&pair.client, "/never");
    assert!(tokio::time::timeout(Duration::from_millis(300), asking).await.is_err());
    pair.noticed().await;
    // Either alone, by hand.
    let (mut send, mut receive) = pair.open(&post("/never")).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    receive.stop(Code::H3_REQUEST_CANCELLED.into()).unwrap();
    pair.noticed().await;
    send.reset(Code::H3_REQUEST_CANCELLED.into()).ok();
    for path in ["/never", "/length", "/deaf"] {
        let (mut send, receive) = pair.open(&[&post(path)[..], &[0, 5, b'h']].concat()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        send.reset(Code::H3_REQUEST_CANCELLED.into()).unwrap();
        if path != "/length" {
            pair.noticed().await;
        }
        drop(receive);
    }
    assert!(get(&pair.client, "/echo").await.is_ok(), "the connection goes on");
}

#[tokio::test]
async fn a_caller_that_goes_between_frames_is_noticed() {
    let pair = pair().await;
    let answer =
        send(&pair.client, Method::POST, "/quiet", &HeaderMap::new(), Some(upload(1, true).await)).await.unwrap();
    drop(answer);
    pair.noticed().await;
    let data = [&[0, 1, b'h'][..]].concat();
    for stop in [true, false] {
        let (mut send, mut receive) = pair.open(&[&post("/quiet")[..], &data].concat()).await;
        let mut first = [0; 8];
        receive.read(&mut first).await.unwrap();
        if stop {
            receive.stop(Code::H3_REQUEST_CANCELLED.into()).unwrap();
        } else {
            send.reset(Code::H3_REQUEST_CANCELLED.into()).unwrap();
        }
        pair.noticed().await;
        drop((send, receive));
    }
}

/// A server whose service takes the upload, answers with a head and goes on answering, and reads the upload only when it is
/// told to.
#[tokio::test]
async fn an_upload_that_broke_off_unread_is_never_whole() {
    for way in ["reset", "stop", "drop"] {
        let (dialled, accepted, _endpoints) = connections().await;
        let (hand_over, mut uploads) = tokio::sync::mpsc::channel(1);
        let ledger = Arc::<Ledger>::default();
        let of = ledger.clone();
        tokio::spawn(server::serve(accepted, crate::limits(), Drain::default(), move |request: Request<Body>| {
            let (hand_over, of) = (hand_over.clone(), of.clone());
            async move {
                let answering = upload(1, true).await;
                let _ = hand_over.send(request.into_body()).await;
                Response::new(Guarded::new(answering, Watch::new(&of)))
            }
        }));
        let (mut send, mut receive) = dialled.open_bi().await.unwrap();
        send.write_all(&[&post("/")[..], &[0, 2, 1, 2], &[0, 5, 3]].concat()).await.unwrap();
        let mut first = [0; 8];
        receive.read(&mut first).await.unwrap();
        let mut unread = uploads.recv().await.unwrap();
        match way {
            "reset" => send.reset(Code::H3_REQUEST_CANCELLED.into()).unwrap(),
            "stop" => receive.stop(Code::H3_REQUEST_CANCELLED.into()).unwrap(),
            _ => {
                send.reset(Code::H3_REQUEST_CANCELLED.into()).unwrap();
                receive.stop(Code::H3_REQUEST_CANCELLED.into()).unwrap();
            }
        }
        tokio::time::timeout(LIMIT, ledger.noticed.notified()).await.expect("the answer is given up");
        assert!(!http_body::Body::is_end_stream(&unread), "{way}");
        let outcome = tokio::time::timeout(LIMIT, async {
            while let Some(frame) = unread.frame().await {
                frame?;
            }
            Ok::<_, starling_http::BodyError>(())
        });
        assert!(outcome.await.expect("the reader is told").is_err(), "{way}: half an upload looked whole");
        assert!(unread.frame().await.is_some_and(|frame| frame.is_err()), "{way}: and stays broken");
    }
}

#[tokio::test]
async fn a_client_that_waits_for_100_gets_it_when_its_body_is_wanted() {
    let pair = pair().await;
    let expecting = |path: &str| {
        let mut fields = vec![(":method", "POST"), (":scheme", "https"), (":authority", "x")];
        fields.extend([(":path", path), ("expect", "100-continue")]);
        head(&fields)
    };
    let (mut send, mut receive) = pair.open(&expecting("/length")).await;
    let mut interim = [0; 16];
    let read = tokio::time::timeout(LIMIT, receive.read(&mut interim)).await.expect("100 comes").unwrap().unwrap();
    // HEADERS, :status 100 from the static table.
    assert_eq!(interim[..read], [1, 0x40, 4, 0, 0, 0xff, 0]);
    send.write_all(&[0, 3, 1, 2, 3]).await.unwrap();
    send.finish().unwrap();
    let answer = tokio::time::timeout(LIMIT, receive.read_to_end(1000)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&answer).ends_with("Ok(3)"), "{answer:x?}");
    // Who is refused is not asked for the body first.
    let (_send, mut receive) = pair.open(&expecting("/refuse")).await;
    let answer = tokio::time::timeout(LIMIT, receive.read_to_end(1000)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&answer).ends_with("too large"), "{answer:x?}");
    assert_ne!(answer[..7], [1, 0x40, 4, 0, 0, 0xff, 0], "100 before a refusal");
}

#[tokio::test]
async fn an_early_answer_stops_the_upload_and_is_not_lost() {
    let pair = pair().await;
    for _ in 0..20 {
        let endless = Some(upload(10_000, true).await);
        let answer = send(&pair.client, Method::POST, "/refuse", &HeaderMap::new(), endless).await.unwrap();
        assert_eq!(answer.head.status, StatusCode::PAYLOAD_TOO_LARGE);
        let upload = answer.upload.expect("an upload that goes on");
        assert_eq!(answer.body.collect().await.unwrap().to_bytes(), "too large");
        tokio::time::timeout(LIMIT, upload).await.expect("the upload is stopped").unwrap();
    }
    let (_send, mut receive) = pair.open(&post("/refuse")).await;
    let answer = tokio::time::timeout(LIMIT, receive.read_to_end(10_000)).await.unwrap().unwrap();
    assert!(!answer.is_empty());
    assert_eq!(
        tokio::time::timeout(LIMIT, _send.stopped()).await.unwrap().unwrap(),
        Some(Code::H3_NO_ERROR.into()),
        "nothing is wrong, the rest is not needed"
    );
}

#[tokio::test]
async fn an_end_in_a_packet_of_its_own_makes_no_body() {
    let pair = pair().await;
    for (method, expected) in
        [("GET", "false"), ("HEAD", ""), ("DELETE", "false"), ("OPTIONS", "false"), ("POST", "true")]
    {
        let fields = [(":method", method), (":scheme", "https"), (":authority", "x"), (":path", "/has-body")];
        let (mut send, mut receive) = pair.open(&head(&fields)).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        // An empty DATA frame is no body either.
        // A POST is answered before, and stopped.
        let _ = send.write_all(&[0, 0]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let _ = send.finish();
        let answer = tokio::time::timeout(LIMIT, receive.read_to_end(10_000)).await.unwrap().unwrap();
        assert!(String::from_utf8_lossy(&answer).ends_with(expected), "{method}: {answer:x?}");
    }
    // One that does have a body keeps it.
    let (mut send, mut receive) =
        pair.open(&head(&[(":method", "GET"), (":scheme", "https"), (":authority", "x"), (":path", "/length")])).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    send.write_all(&[0, 2, 1, 2]).await.unwrap();
    send.finish().unwrap();
    let answer = tokio::time::timeout(LIMIT, receive.read_to_end(10_000)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&answer).ends_with("Ok(2)"), "{answer:x?}");
}

#[tokio::test]
async fn rapid_resets_reach_nobody_for_long() {
    let pair = pair().await;
    let get = head(&[(":method", "GET"), (":scheme", "https"), (":authority", "x"), (":path", "/never")]);
    let upload_to_length = post("/length");
    for n in 0..2000 {
        // A whole request whose answer is stopped; or an upload that is only reset.
        let is_upload = n % 2 == 0;
        let (mut send, mut receive) = pair.open(if is_upload { &upload_to_length } else { &get }).await;
        if !is_upload {
            let _ = send.finish();
            tokio::task::yield_now().await;
            receive.stop(Code::H3_REQUEST_CANCELLED.into()).unwrap();
        }
        let _ = send.reset(Code::H3_REQUEST_CANCELLED.into());
        // Time for the server to begin, if it wants to.
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
    assert!(
        crate::wire::get(&pair.client, "/echo").await.is_ok(),
        "others on the connection wait a little, and are served"
    );
    let reached = pair.ledger.requests.load(SeqCst);
    assert!(reached < 200, "{reached} of 2000 reached the service");
}

#[tokio::test]
async fn a_connection_that_remembers_too_much_is_replaced() {
    const MAX: usize = 4096;
    let pair = pair().await;
    let slow = send(&pair.client, Method::POST, "/echo", &HeaderMap::new(), Some(upload(1, true).await)).await.unwrap();
    let get = head(&[(":method", "GET"), (":scheme", "https"), (":authority", "x"), (":path", "/never")]);
    // Answers that the caller stops leave nothing behind.
    for _ in 0..MAX + 200 {
        let (mut send, mut receive) = pair.open(&get).await;
        receive.stop(Code::H3_REQUEST_CANCELLED.into()).unwrap();
        let _ = send.finish();
    }
    assert!(crate::wire::get(&pair.client, "/echo").await.is_ok());
    assert!(pair.client.takes_requests(), "stopped streams do not count");
    // Uploads that turn out wrong while they are read do: nobody stops their answers.
    let mut fields = vec![(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/length")];
    fields.push(("content-length", "3"));
    let wrong = [&head(&fields)[..], &[0, 2, 1, 2], &[0, 2, 1, 2]].concat();
    // Many at a time, because each has to wait a little once there were some.
    for _ in 0..=MAX / 200 {
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let (connection, wrong) = (pair.client.connection().clone(), wrong.clone());
            asking.spawn(async move {
                let Ok((mut send, mut receive)) = connection.open_bi().await else { return };
                let _ = send.write_all(&wrong).await;
                let _ = send.finish();
                let _ = receive.read_to_end(1000).await;
            });
        }
        while asking.join_next().await.is_some() {}
    }
    tokio::time::timeout(LIMIT, async {
        while pair.client.takes_requests() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the server goes away");
    assert!(pair.server.close_reason().is_none(), "with a request under way");
    drop(slow);
    tokio::time::timeout(LIMIT, pair.server.closed()).await.expect("and closes with its last request");
}

#[tokio::test]
async fn a_drain_waits_until_a_large_answer_has_arrived() {
    let pair = pair().await;
    let big = Bytes::from(vec![b'x'; 3 << 20]);
    let answer =
        send(&pair.client, Method::POST, "/echo", &HeaderMap::new(), Some(Body::full(big.clone()))).await.unwrap();
    let drain = pair.drain.clone();
    let draining = tokio::spawn(async move { drain.finish(Duration::from_secs(30)).await });
    // A reader that takes its time: far more than a few round trips.
    let (mut body, mut read) = (answer.body, 0);
    while let Some(frame) = body.frame().await {
        read += frame.expect("nothing is cut").into_data().map_or(0, |data| data.len());
        if read < 1 << 20 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    assert_eq!(read, big.len());
    assert!(draining.await.unwrap());
}

#[tokio::test]
async fn a_drain_finishes_what_was_taken_and_rejects_the_rest() {
    let pair = pair().await;
    let slow = send(&pair.client, Method::POST, "/echo", &HeaderMap::new(), Some(upload(1, true).await)).await.unwrap();
    let draining = {
        let drain = pair.drain.clone();
        tokio::spawn(async move { drain.finish(Duration::from_secs(30)).await })
    };
    tokio::time::timeout(LIMIT, async {
        while pair.client.takes_requests() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("GOAWAY comes");
    let refused = get(&pair.client, "/echo").await;
    assert!(matches!(refused, Err(RequestError::NotSent(_))), "our own client sends nothing more: {refused:?}");
    // Beyond the second GOAWAY nothing is processed, and a client that sends all the same is told that it was not.
    let rejected = tokio::time::timeout(LIMIT, async {
        loop {
            let (mut send, mut receive) = pair.client.connection().open_bi().await.expect("not closed yet");
            let _ = send.write_all(&post("/echo")).await;
            let _ = send.finish();
            match receive.read_to_end(1000).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(code))) => return code,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await
    .unwrap();
    assert_eq!(rejected, Code::H3_REQUEST_REJECTED.into());
    drop(slow);
    assert!(draining.await.unwrap(), "the drain ends with the last request");
    assert!(pair.server.close_reason().is_some());
}
