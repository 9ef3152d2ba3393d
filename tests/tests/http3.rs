//! HTTP/3 against real processes: a member over the mesh port and a stranger over the public port, who send what the RFC
//! forbids; and clients that give up.

use std::{
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_chaos::{Client, Cluster, Door, NodeSpec, free_port, self_signed, wait_for};
use starling_http::h3::codec::head::{decode_trailers, encode_trailers};
use starling_protocol::admin::MemberStatus;
use starling_tests::{
    binary, client_script, memory_kib, program, python,
    raw_h3::{self, DATA, GET, HEADERS, Outcome, RawClient, SETTINGS, code, frame, head, section, varint},
    relay::shuffling_relay,
    rogue::Rogue,
    run,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const HOST: &str = "api.example.com";
/// For clients that take the name of a server from where they dial.
const LOCAL: &str = "localhost";
/// Length of a large answer, in bytes.
const BIG: usize = 2 << 20;
const LIMIT: Duration = Duration::from_secs(60);

const NO_ERROR: u64 = 0x100;
const STREAM_CREATION_ERROR: u64 = 0x103;
const CLOSED_CRITICAL_STREAM: u64 = 0x104;
const FRAME_UNEXPECTED: u64 = 0x105;
const FRAME_ERROR: u64 = 0x106;
const EXCESSIVE_LOAD: u64 = 0x107;
const ID_ERROR: u64 = 0x108;
const SETTINGS_ERROR: u64 = 0x109;
const MISSING_SETTINGS: u64 = 0x10a;
const REQUEST_CANCELLED: u32 = 0x10c;
const REQUEST_INCOMPLETE: u64 = 0x10d;
const MESSAGE_ERROR: u64 = 0x10e;
const DECOMPRESSION_FAILED: u64 = 0x200;
const ENCODER_STREAM_ERROR: u64 = 0x201;
const DECODER_STREAM_ERROR: u64 = 0x202;

/// What reached the service.
#[derive(Default)]
struct Ledger {
    /// Heads of requests, as they came.
    heads: Mutex<Vec<String>>,
    /// Connections that were closed while an answer was owed.
    given_up: AtomicUsize,
}

impl Ledger {
    fn count(&self) -> usize {
        self.heads.lock().unwrap().len()
    }

    fn last(&self) -> String {
        self.heads.lock().unwrap().last().cloned().unwrap_or_default()
    }

    async fn wait_given_up(&self, at_least: usize) {
        wait_for("the service is told", LIMIT, || async {
            let seen = self.given_up.load(SeqCst);
            if seen >= at_least { Ok(()) } else { Err(format!("{seen} of {at_least}")) }
        })
        .await
        .unwrap();
    }
}

/// An HTTP/1.1 service that answers as its paths say.
async fn service(ledger: Arc<Ledger>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let ledger = ledger.clone();
            tokio::spawn(async move { serve(stream, &ledger).await });
        }
    });
    addr
}

async fn serve(mut stream: TcpStream, ledger: &Ledger) -> Option<()> {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
        buffer.drain(..end);
        let path = head.split(' ').nth(1).unwrap_or_default().to_string();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        let chunked = head.contains("transfer-encoding: chunked");
        ledger.heads.lock().unwrap().push(head);
        match path.as_str() {
            "/never" | "/quiet" => {
                if path == "/quiet" {
                    let answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
                    stream.write_all(answer).await.ok()?;
                }
                // Whatever ends the read ends the wait: an answer is owed.
                let mut rest = [0; 4096];
                while matches!(stream.read(&mut rest).await, Ok(read) if read > 0) {}
                ledger.given_up.fetch_add(1, SeqCst);
                return None;
            }
            "/refuse" => {
                stream.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno").await.ok()?;
                // Reads on for a moment, as a well-behaved server does, so that the answer is not lost to a reset.
                let mut rest = vec![0; 1 << 16];
                let _ = tokio::time::timeout(Duration::from_secs(2), async {
                    while matches!(stream.read(&mut rest).await, Ok(read) if read > 0) {}
                })
                .await;
                return None;
            }
            "/big" => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {BIG}\r\n\r\n");
                stream.write_all(head.as_bytes()).await.ok()?;
                stream.write_all(&vec![b'b'; BIG]).await.ok()?;
            }
            _ => {
                let ends = |buffer: &[u8]| match length {
                    Some(length) => buffer.len() >= length,
                    None => !chunked || buffer.ends_with(b"0\r\n\r\n"),
                };
                while !ends(&buffer) {
                    if stream.read_buf(&mut buffer).await.ok()? == 0 {
                        return None;
                    }
                }
                buffer.clear();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").await.ok()?;
            }
        }
    }
}

/// A mesh with the service `up` on node `a`, an edge in front of it, and the identity of a member gone bad.
struct Scene {
    cluster: Cluster,
    public: SocketAddr,
    rogue: Rogue,
    stranger: quinn::Endpoint,
    client: Client,
    cert: String,
    ledger: Arc<Ledger>,
}

/// Where a raw client stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// A member, at the mesh port of the service's node.
    Mesh,
    /// A stranger, at the edge's public port.
    Public,
}

const SIDES: [Side; 2] = [Side::Mesh, Side::Public];

impl Side {
    fn authority(self) -> &'static str {
        match self {
            Self::Mesh => "up.mesh.internal",
            Self::Public => HOST,
        }
    }

    /// The head of a GET, or of another method.
    fn fields<'a>(self, method: &'a str, path: &'a str) -> Vec<(&'a str, &'a str)> {
        vec![(":method", method), (":scheme", "https"), (":authority", self.authority()), (":path", path)]
    }

    fn get(self) -> Vec<u8> {
        head(&self.fields("GET", "/"))
    }

    fn post(self, path: &str) -> Vec<u8> {
        head(&self.fields("POST", path))
    }
}

impl Scene {
    async fn new() -> Self {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let ledger = Arc::<Ledger>::default();
        let up = service(ledger.clone()).await;
        cluster.add(&NodeSpec::named("a").serving(format!("up={up}"))).await.unwrap();
        cluster.add(&NodeSpec::named("mallory")).await.unwrap();
        let (cert, key) = (cluster.dir().join("edge.pem"), cluster.dir().join("edge.key"));
        self_signed(&[HOST, LOCAL], &cert, &key).unwrap();
        let public = free_port();
        let sections = format!(
            "[edge]\nlisten = \"{public}\"\n\n[[certificate]]\nhosts = [\"{HOST}\", \"{LOCAL}\"]\ncert = {cert:?}\nkey = {key:?}\n\n\
             [[route]]\nservice = \"up\"\nauth = []\n"
        );
        cluster.add_edge("edge", &sections).await.unwrap();
        cluster.converge().await.unwrap();
        cluster.kill("mallory").await.unwrap();
        cluster.wait_status("a", "mallory", MemberStatus::Down).await.unwrap();
        Self {
            rogue: Rogue::of(&cluster.node("mallory").state).unwrap(),
            stranger: raw_h3::endpoint(None, b"h3").unwrap(),
            client: Client::trusting(&cert).unwrap(),
            cert: cert.to_string_lossy().into_owned(),
            public,
            cluster,
            ledger,
        }
    }

    fn address(&self, side: Side) -> SocketAddr {
        match side {
            Side::Mesh => self.cluster.node("a").mesh,
            Side::Public => self.public,
        }
    }

    fn config(&self, side: Side) -> quinn::ClientConfig {
        if side == Side::Mesh { self.rogue.calls_config() } else { raw_h3::client_config(None, b"h3").unwrap() }
    }

    async fn silent(&self, side: Side) -> RawClient {
        let endpoint = if side == Side::Mesh { self.rogue.calls() } else { &self.stranger };
        RawClient::silent(endpoint, self.address(side), HOST).await.unwrap()
    }

    async fn dial(&self, side: Side) -> RawClient {
        let endpoint = if side == Side::Mesh { self.rogue.calls() } else { &self.stranger };
        RawClient::dial(endpoint, self.address(side), HOST).await.unwrap()
    }

    /// The bystander: an ordinary client.
    async fn assert_served(&self) {
        let request = Request::get(format!("https://{HOST}/")).body(Bytes::new()).unwrap();
        let answer = self.client.send(Door::Http3, self.public, request).await.unwrap();
        assert_eq!((answer.status, answer.text()), (200, "hello".into()));
    }

    fn assert_calm(&self) {
        for node in ["a", "edge"] {
            let log = self.cluster.node(node).process.log();
            assert!(!log.contains("panicked"), "{node}: {log}");
        }
    }
}

const HELLO: Outcome = Outcome::Answer(200, 5);

#[tokio::test]
async fn malformed_requests_cost_their_stream_and_nothing_else() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO);
        let reached = scene.ledger.count();
        let get = side.fields("GET", "/");
        let with = |name: &'static str, value: &'static str| {
            get.iter().map(|f| if f.0 == name { (f.0, value) } else { *f }).collect::<Vec<_>>()
        };
        let without = |name: &str| get.iter().filter(|f| f.0 != name).copied().collect::<Vec<_>>();
        let and = |more: &[(&'static str, &'static str)]| [&get[..], more].concat();
        let post = |more: &[(&'static str, &'static str)]| [&side.fields("POST", "/")[..], more].concat();
        let length = |value: &'static str| head(&post(&[("content-length", value)]));
        let mut rows: Vec<Vec<u8>> = [
            without(":method"),
            without(":scheme"),
            without(":path"),
            without(":authority"),
            and(&[(":path", "/")]),
            and(&[(":authority", "x")]),
            and(&[(":status", "200")]),
            and(&[(":unknown", "1")]),
            and(&[("x", "1"), (":method", "GET")]),
            [&[("x", "1")][..], &get].concat(),
            with(":path", ""),
            with(":path", "no-slash"),
            with(":path", "/a#b"),
            with(":path", "/a b"),
            with(":method", "G T"),
            with(":method", ""),
            with(":authority", ""),
            with(":authority", "user@x"),
            with(":scheme", ""),
            and(&[("host", "other.example.com")]),
            and(&[("host", "")]),
            and(&[("X-Upper", "1")]),
            and(&[("", "1")]),
            and(&[("x y", "1")]),
            and(&[("x", "a\r\nx-injected: 1")]),
            and(&[("x", "a\0b")]),
            and(&[("x", "a\nb")]),
            and(&[("connection", "close")]),
            and(&[("keep-alive", "timeout=5")]),
            and(&[("proxy-connection", "keep-alive")]),
            and(&[("transfer-encoding", "chunked")]),
            and(&[("upgrade", "websocket")]),
            and(&[("te", "gzip")]),
            and(&[("content-length", "1"), ("content-length", "2")]),
            and(&[("content-length", "+1")]),
            and(&[("content-length", "1x")]),
            and(&[("content-length", "7")]),
            vec![(":method", "CONNECT"), (":scheme", "https"), (":authority", "up:80"), (":path", "/")],
            vec![
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "https"),
                (":authority", HOST),
                (":path", "/"),
            ],
        ]
        .iter()
        .map(|fields| head(fields))
        .collect();
        // Bodies that are not as long as they say, and trailers that are none.
        rows.push([length("5"), frame(DATA, "hell")].concat());
        rows.push([length("5"), frame(DATA, "hello!")].concat());
        rows.push([length("0"), frame(DATA, "x")].concat());
        for trailer in [(":path", "/"), ("X-Upper", "1"), ("transfer-encoding", "chunked"), ("x", "a\nb")] {
            rows.push([head(&post(&[])), frame(DATA, "x"), head(&[trailer])].concat());
        }
        for row in &rows {
            let outcome = client.request(row).await.unwrap();
            assert_eq!(outcome, Outcome::Reset(MESSAGE_ERROR), "{side:?}: {}", String::from_utf8_lossy(row));
        }
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "the connection goes on");
        // Only what was well-formed until its body began may have reached the service, and none of it whole.
        let heads = scene.ledger.heads.lock().unwrap()[reached..].to_vec();
        assert!(heads.iter().all(|head| !head.starts_with("get") || head.starts_with("get / ")), "{heads:?}");
        assert!(heads.iter().all(|head| !head.contains("injected") && !head.contains("x-upper")), "{heads:?}");
    }
    scene.assert_served().await;
    scene.assert_calm();
}

#[tokio::test]
async fn frames_out_of_place_close_the_connection_and_no_other() {
    let scene = Scene::new().await;
    for side in SIDES {
        let bystander = scene.dial(side).await;
        let get = side.get();
        let post = side.post("/");
        let rows: Vec<(Vec<u8>, u64)> = vec![
            (frame(DATA, "x"), FRAME_UNEXPECTED),
            ([&frame(DATA, "")[..], &get].concat(), FRAME_UNEXPECTED),
            ([&post[..], &head(&[("a", "b")]), &frame(DATA, "x")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &head(&[("a", "b")]), &head(&[("a", "b")])].concat(), FRAME_UNEXPECTED),
            (frame(SETTINGS, ""), FRAME_UNEXPECTED),
            ([&post[..], &frame(SETTINGS, "")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x07, [0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x03, [0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x0d, [0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x05, [0, 0, 0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x02, "")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x06, [0; 8])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x08, "")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x09, "")].concat(), FRAME_UNEXPECTED),
            (frame(HEADERS, [1, 0, 0x80]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x80]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x10]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0xff, 0x24]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x51, 0x81, 0]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x51, 0x7f]), DECOMPRESSION_FAILED),
            (frame(HEADERS, ""), DECOMPRESSION_FAILED),
        ];
        for (row, code) in &rows {
            let client = scene.dial(side).await;
            assert_eq!(client.request(row).await.unwrap(), Outcome::Closed(*code), "{side:?}: {row:x?}");
        }
        assert_eq!(bystander.request(&get).await.unwrap(), HELLO, "others do not notice");
    }
    scene.assert_calm();
}

#[tokio::test]
async fn cut_messages_are_never_whole() {
    let scene = Scene::new().await;
    for side in SIDES {
        let get = side.get();
        let reached = scene.ledger.count();
        for (row, code) in [
            (&get[..1], FRAME_ERROR),
            (&get[..2], FRAME_ERROR),
            (&get[..get.len() - 1], FRAME_ERROR),
            (&[0x40][..], FRAME_ERROR),
            (&[&get[..], &[0x21, 5, 1]].concat()[..], FRAME_ERROR),
        ] {
            let client = scene.dial(side).await;
            assert_eq!(client.request(row).await.unwrap(), Outcome::Closed(code), "{side:?}: {row:x?}");
        }
        let client = scene.dial(side).await;
        assert_eq!(client.request(&[]).await.unwrap(), Outcome::Reset(REQUEST_INCOMPLETE), "{side:?}");
        assert_eq!(client.request(&frame(0x21, "x")).await.unwrap(), Outcome::Reset(REQUEST_INCOMPLETE), "{side:?}");
        assert_eq!(scene.ledger.count(), reached, "{side:?}: none of it reached the service");
        let cut = [side.post("/"), varint(DATA), varint(10), b"hello".to_vec()].concat();
        assert_eq!(client.request(&cut).await.unwrap(), Outcome::Closed(FRAME_ERROR), "{side:?}");
    }
    scene.assert_served().await;
    scene.assert_calm();
}

#[tokio::test]
async fn critical_streams_keep_their_rules() {
    let scene = Scene::new().await;
    for side in SIDES {
        // What is written on the control stream behind its type.
        for (bytes, code) in [
            (frame(0x07, [0]), MISSING_SETTINGS),
            (frame(0x21, [0]), MISSING_SETTINGS),
            ([frame(SETTINGS, ""), frame(SETTINGS, "")].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(DATA, "x")].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(HEADERS, [0, 0])].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(0x05, [0, 0])].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(0x06, [0; 8])].concat(), FRAME_UNEXPECTED),
            (frame(SETTINGS, [0x02, 0x01]), SETTINGS_ERROR),
            (frame(SETTINGS, [0x08, 0x02]), SETTINGS_ERROR),
            (frame(SETTINGS, [0x06, 0x01, 0x06, 0x01]), SETTINGS_ERROR),
            (frame(SETTINGS, [0x06]), FRAME_ERROR),
            ([varint(SETTINGS), varint(1 << 20)].concat(), EXCESSIVE_LOAD),
            ([frame(SETTINGS, ""), frame(0x07, [1]), frame(0x07, [2])].concat(), ID_ERROR),
            ([frame(SETTINGS, ""), frame(0x0d, [4]), frame(0x0d, [3])].concat(), ID_ERROR),
            ([frame(SETTINGS, ""), frame(0x03, [0])].concat(), ID_ERROR),
            ([frame(SETTINGS, ""), frame(0x07, [0, 0])].concat(), FRAME_ERROR),
            ([frame(SETTINGS, ""), frame(0x07, "")].concat(), FRAME_ERROR),
        ] {
            let client = scene.silent(side).await;
            let _control = client.one_way(&[varint(0), bytes.clone()].concat()).await.unwrap();
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(code), "{side:?}: {bytes:x?}");
        }
        for (stream, code) in [
            (&[0x00, 0x04, 0x00][..], STREAM_CREATION_ERROR),
            (&[0x01, 0x00], STREAM_CREATION_ERROR),
            (&[0x02, 0x3f, 0xbd, 0x01], ENCODER_STREAM_ERROR),
            (&[0x02, 0xc0, 0x00], ENCODER_STREAM_ERROR),
            (&[0x02, 0x41, 0x61, 0x00], ENCODER_STREAM_ERROR),
            (&[0x02, 0x00], ENCODER_STREAM_ERROR),
            (&[0x03, 0x80], DECODER_STREAM_ERROR),
            (&[0x03, 0x01], DECODER_STREAM_ERROR),
            (&[0x03, 0x00], DECODER_STREAM_ERROR),
        ] {
            let client = scene.dial(side).await;
            let _stream = client.one_way(stream).await.unwrap();
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(code), "{side:?}: {stream:x?}");
        }
        for kind in [2u64, 3] {
            let client = scene.dial(side).await;
            let _first = client.one_way(&varint(kind)).await.unwrap();
            let _second = client.one_way(&varint(kind)).await.unwrap();
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(STREAM_CREATION_ERROR), "{side:?} {kind}");
        }
        for reset in [true, false] {
            let mut client = scene.dial(side).await;
            assert_eq!(client.request(&side.get()).await.unwrap(), HELLO);
            let control = client.control();
            if reset {
                control.reset(code(0)).unwrap();
            } else {
                control.finish().unwrap();
            }
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(CLOSED_CRITICAL_STREAM), "{side:?}");
        }
        // The server's own control stream must not be stopped.
        let client = scene.dial(side).await;
        let mut theirs = client.connection().accept_uni().await.unwrap();
        let mut kind = [9];
        theirs.read_exact(&mut kind).await.unwrap();
        assert_eq!(kind, [0]);
        theirs.stop(code(0)).unwrap();
        assert_eq!(client.closed().await.unwrap(), Outcome::Closed(CLOSED_CRITICAL_STREAM), "{side:?}");
    }
    scene.assert_served().await;
    scene.assert_calm();
}

#[tokio::test]
async fn what_is_unknown_is_ignored() {
    let scene = Scene::new().await;
    for side in SIDES {
        let mut client = scene.dial(side).await;
        let grease = |n: u64| 0x1f * n + 0x21;
        client.control().write_all(&[frame(grease(5), "abc"), frame(0xf0700, [0, 1])].concat()).await.unwrap();
        let mut streams = Vec::new();
        for kind in [grease(0), grease(70), 0x54] {
            streams.push(client.one_way(&[varint(kind), b"whatever".to_vec()].concat()).await.unwrap());
        }
        // Closed or reset before anybody knows what it is.
        client.one_way(&[0x40]).await.unwrap().finish().unwrap();
        client.one_way(&[0x40]).await.unwrap().reset(code(7)).unwrap();
        // QPACK's streams may be there, and say what needs no table.
        streams.push(client.one_way(&[0x02, 0x20, 0x20]).await.unwrap());
        streams.push(client.one_way(&[0x03, 0x44, 0x7f, 0x05]).await.unwrap());
        let long = frame(grease(1), vec![0; 200_000]);
        let around = [
            &frame(grease(0), "x")[..],
            &side.post("/"),
            &frame(grease(2), ""),
            &frame(DATA, ""),
            &frame(DATA, "ab"),
            &long,
            &frame(DATA, "c"),
            &head(&[("x-t", "1")]),
            &frame(grease(9), "z"),
        ]
        .concat();
        assert_eq!(client.request(&around).await.unwrap(), HELLO, "{side:?}");
        assert_eq!(client.request_in_drops(&side.get()).await.unwrap(), HELLO, "{side:?}: one byte a packet");
        let posted =
            [side.post("/"), frame(DATA, "ab"), frame(DATA, ""), frame(DATA, "c"), head(&[("x-t", "1")])].concat();
        assert_eq!(client.request_in_drops(&posted).await.unwrap(), HELLO, "{side:?}: one byte a packet");
        // Frames may say their type and length in more bytes than they need.
        let section = section(&side.fields("GET", "/"));
        let wide = [&[0x40, 0x01, 0xc0, 0, 0, 0, 0, 0][..], &(section.len() as u16).to_be_bytes(), &section].concat();
        assert_eq!(client.request(&wide).await.unwrap(), HELLO, "{side:?}");
        // Settings that nobody knows.
        let client = scene.silent(side).await;
        let settings =
            [varint(grease(3)), varint(1 << 40), varint(0x07), varint(100), varint(0x01), varint(4096)].concat();
        let _control = client.one_way(&[varint(0), frame(SETTINGS, settings)].concat()).await.unwrap();
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}");
        // No settings at all, so far: they may be late.
        let client = scene.silent(side).await;
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}");
        drop(streams);
    }
    scene.assert_calm();
}

#[tokio::test]
async fn packets_doubled_and_reordered_change_nothing() {
    let scene = Scene::new().await;
    for side in SIDES {
        let endpoint = if side == Side::Mesh { scene.rogue.calls() } else { &scene.stranger };
        let relay = shuffling_relay(scene.address(side)).await;
        let client = RawClient::dial(endpoint, relay, HOST).await.unwrap();
        for size in [0, 1, 1500, 300_000] {
            let reached = scene.ledger.count();
            let length = size.to_string();
            let fields = [&side.fields("POST", "/")[..], &[("content-length", length.as_str())]].concat();
            let bytes = [head(&fields), frame(DATA, vec![7; size])].concat();
            assert_eq!(client.request(&bytes).await.unwrap(), HELLO, "{side:?}: {size} bytes");
            assert_eq!(scene.ledger.count(), reached + 1, "{side:?}: no request is made twice");
        }
        assert_eq!(client.request_in_drops(&side.get()).await.unwrap(), HELLO, "{side:?}");
        let big = client.request(&head(&side.fields("GET", "/big"))).await.unwrap();
        assert_eq!(big, Outcome::Answer(200, BIG), "{side:?}");
    }
    scene.assert_calm();
}

#[tokio::test]
async fn heads_have_a_limit_and_a_polite_answer() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        let reached = scene.ledger.count();
        let large = "a".repeat(70_000);
        let fields = [&side.fields("GET", "/")[..], &[("x", large.as_str())]].concat();
        let refused = |outcome: Outcome| matches!(outcome, Outcome::Answer(431, _));
        assert!(refused(client.request(&head(&fields)).await.unwrap()), "{side:?}: one large field");
        // By its header alone: nothing of it is waited for.
        let (_send, receive) = client.open(&[varint(HEADERS), varint(1 << 30)].concat()).await.unwrap();
        assert!(refused(client.outcome(receive).await.unwrap()), "{side:?}: a frame of a gigabyte");
        // 25,000 fields in as many bytes.
        let bomb = [&section(&side.fields("GET", "/"))[..], &[0xdd; 25_000]].concat();
        assert!(refused(client.request(&frame(HEADERS, bomb)).await.unwrap()), "{side:?}: many fields");
        let names: Vec<String> = (0..130).map(|i| format!("x-{i}")).collect();
        let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "1")).collect();
        let fields = [&side.fields("GET", "/")[..], &many].concat();
        assert!(refused(client.request(&head(&fields)).await.unwrap()), "{side:?}: 130 fields");
        let fields = [&side.fields("GET", "/")[..], &many[..97]].concat();
        assert_eq!(client.request(&head(&fields)).await.unwrap(), HELLO, "{side:?}: 97 fields, and what the edge adds");
        assert_eq!(scene.ledger.count(), reached + 1, "{side:?}");
        // Trailers, too; and frames that carry nothing.
        let trailers = [side.post("/"), frame(DATA, "x"), head(&[("x", &large)])].concat();
        assert_eq!(client.request(&trailers).await.unwrap(), Outcome::Reset(EXCESSIVE_LOAD), "{side:?}");
        let empty = [side.post("/"), frame(DATA, "").repeat(3000)].concat();
        assert_eq!(client.request(&empty).await.unwrap(), Outcome::Reset(EXCESSIVE_LOAD), "{side:?}");
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}: the connection goes on");
    }
    scene.assert_calm();
}

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

#[tokio::test]
async fn rapid_resets_reach_the_service_by_tens_and_harm_nobody() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        let (reached, memory) = (scene.ledger.count(), scene.memory_kib());
        let never = head(&side.fields("GET", "/never"));
        let begun = std::time::Instant::now();
        for _ in 0..10_000 {
            let Ok((mut send, mut receive)) = client.open(&never).await else { break };
            let _ = send.reset(code(REQUEST_CANCELLED));
            let _ = receive.stop(code(REQUEST_CANCELLED));
        }
        scene.assert_served().await;
        let took = begun.elapsed();
        // Whatever was under way has arrived by then.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let reached = scene.ledger.count() - reached;
        let allowed = 100 + 20 * took.as_secs() as usize;
        assert!(reached <= allowed, "{side:?}: {reached} of 10,000 reached the service in {took:?}");
        let grown = scene.memory_kib().saturating_sub(memory);
        assert!(grown < 64 << 10, "{side:?}: memory grew by {grown} KiB");
    }
    scene.assert_calm();
}

#[tokio::test]
async fn credit_that_is_withheld_holds_one_call_and_little_memory() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        let memory = scene.memory_kib();
        // Heads that never end, and uploads that stand still.
        let mut held = Vec::new();
        for i in 0..60 {
            let bytes = if i % 2 == 0 {
                side.get()[..5].to_vec()
            } else {
                [side.post("/"), varint(DATA), varint(1 << 20)].concat()
            };
            held.push(client.open(&bytes).await.unwrap());
        }
        scene.assert_served().await;
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}");
        // Large answers that nobody takes, beyond the first KiB of each.
        let endpoint = if side == Side::Mesh { scene.rogue.calls() } else { &scene.stranger };
        let mut config = scene.config(side);
        let mut transport = quinn::TransportConfig::default();
        transport.stream_receive_window(1024u32.into());
        config.transport_config(Arc::new(transport));
        let stuck = RawClient::dial_with(endpoint, config, scene.address(side), HOST).await.unwrap();
        for _ in 0..20 {
            held.push(stuck.open(&head(&side.fields("GET", "/big"))).await.unwrap());
        }
        assert_eq!(stuck.request(&side.get()).await.unwrap(), HELLO, "{side:?}: a neighbour on the same connection");
        scene.assert_served().await;
        let grown = scene.memory_kib().saturating_sub(memory);
        assert!(grown < 64 << 10, "{side:?}: memory grew by {grown} KiB");
    }
    scene.assert_calm();
}

impl Scene {
    /// Resident memory of the two nodes under attack.
    fn memory_kib(&self) -> u64 {
        ["a", "edge"].iter().map(|node| memory_kib(&self.cluster.node(node).process, "VmRSS:")).sum()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_clients_understand_us_and_we_them() {
    let scene = Scene::new().await;
    let url = format!("https://{HOST}:{}/", scene.public.port());
    // ngtcp2 with nghttp3.
    if let Some(gtlsclient) = program("gtlsclient") {
        let port = scene.public.port().to_string();
        let local_url = format!("https://{LOCAL}:{port}/");
        let dir = scene.cluster.dir().join("downloads");
        std::fs::create_dir_all(&dir).unwrap();
        let args =
            ["-q", "--exit-on-all-streams-close", "--download", &dir.to_string_lossy(), LOCAL, &port, &local_url];
        let (ok, out, err) = run(&gtlsclient, &args);
        assert!(ok, "{out}{err}");
        let files: Vec<_> =
            std::fs::read_dir(&dir).unwrap().map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect();
        assert_eq!(files, [b"hello"], "{out}{err}");
    }
    // aioquic, and its pylsqpack, which reads and writes what our codec wrote and reads.
    let Some(python) = python() else { return };
    let script = client_script("h3.py");
    let connect = scene.public.to_string();
    let args = [&script, &url, "--connect", &connect, "--ca", &scene.cert, "--parallel", "20", "--data", "x"];
    let (ok, out, err) = run(&python, &args);
    assert!(ok && out.matches("\"status\": 200").count() == 20, "{out}{err}");
    qpack_agrees(&python);
}

/// ls-qpack reads what our codec writes, and our codec what ls-qpack writes, Huffman codes and all.
fn qpack_agrees(python: &Path) {
    let mut rng = StdRng::seed_from_u64(9);
    let mut names =
        vec!["accept", "cookie", "content-type", "x-frame-options", "vary", "authorization", "x-mine", "via"];
    let long = "x-".repeat(100);
    names.push(&long);
    let sections: Vec<HeaderMap> = (0..300)
        .map(|_| {
            let mut fields = HeaderMap::new();
            for _ in 0..rng.random_range(0..12) {
                let name = names[rng.random_range(0..names.len())];
                let most = if rng.random() { 20 } else { 400 };
                let length = rng.random_range(0..most);
                let value: Vec<u8> =
                    (0..length).map(|_| rng.random_range(0x21..=0xff)).filter(|b| *b != 0x7f).collect();
                let mut value = HeaderValue::from_bytes(&value).unwrap();
                value.set_sensitive(rng.random());
                fields.append(http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
            }
            fields
        })
        .collect();
    let written: Vec<String> = sections
        .iter()
        .map(|fields| {
            let mut frame = BytesMut::new();
            encode_trailers(fields, 1 << 20, &mut frame).unwrap();
            frame[3..].iter().map(|byte| format!("{byte:02x}")).collect()
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.json"), dir.path().join("out.json"));
    std::fs::write(&input, serde_json::to_string(&written).unwrap()).unwrap();
    let status = std::process::Command::new(python)
        .arg(client_script("qpack.py"))
        .stdin(std::fs::File::open(&input).unwrap())
        .stdout(std::fs::File::create(&output).unwrap())
        .status()
        .unwrap();
    assert!(status.success(), "ls-qpack reads all that we write");
    let read: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(&output).unwrap()).unwrap();
    assert_eq!(read.len(), sections.len());
    for (fields, read) in sections.iter().zip(&read) {
        let latin1 = |bytes: &[u8]| bytes.iter().map(|byte| char::from(*byte)).collect::<String>();
        let sent: Vec<[String; 2]> =
            fields.iter().map(|(name, value)| [name.to_string(), latin1(value.as_bytes())]).collect();
        assert_eq!(serde_json::from_value::<Vec<[String; 2]>>(read["fields"].clone()).unwrap(), sent);
        let hex = read["section"].as_str().unwrap();
        let again: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        assert_eq!(&decode_trailers(&again, 1 << 20).unwrap(), fields);
    }
}

#[tokio::test]
async fn the_head_of_a_get_is_understood() {
    // The raw client's own words, once: a test of the tests.
    let scene = Scene::new().await;
    let client = scene.dial(Side::Public).await;
    let mut fields = GET.to_vec();
    fields[2].1 = HOST;
    assert_eq!(client.request(&head(&fields)).await.unwrap(), HELLO);
    assert!(scene.ledger.last().starts_with("get / http/1.1\r\n"), "{}", scene.ledger.last());
    assert_eq!(client.request(&head(&Side::Public.fields("GET", "/nothing/here"))).await.unwrap(), HELLO);
}
