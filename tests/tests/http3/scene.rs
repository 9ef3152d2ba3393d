//! A mesh with a service that keeps a ledger, an edge, and who attacks it.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Client, Cluster, Door, NodeSpec, free_port, self_signed, wait_for};
use starling_protocol::admin::MemberStatus;
use starling_tests::{
    binary, memory_kib,
    raw_h3::{self, Outcome, RawClient, head},
    rogue::Rogue,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

pub(crate) const HOST: &str = "api.example.com";
/// For clients that take the name of a server from where they dial.
pub(crate) const LOCAL: &str = "localhost";
/// Length of a large answer, in bytes.
pub(crate) const BIG: usize = 2 << 20;
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) const NO_ERROR: u64 = 0x100;
pub(crate) const STREAM_CREATION_ERROR: u64 = 0x103;
pub(crate) const CLOSED_CRITICAL_STREAM: u64 = 0x104;
pub(crate) const FRAME_UNEXPECTED: u64 = 0x105;
pub(crate) const FRAME_ERROR: u64 = 0x106;
pub(crate) const EXCESSIVE_LOAD: u64 = 0x107;
pub(crate) const ID_ERROR: u64 = 0x108;
pub(crate) const SETTINGS_ERROR: u64 = 0x109;
pub(crate) const MISSING_SETTINGS: u64 = 0x10a;
pub(crate) const REQUEST_CANCELLED: u32 = 0x10c;
pub(crate) const REQUEST_INCOMPLETE: u64 = 0x10d;
pub(crate) const MESSAGE_ERROR: u64 = 0x10e;
pub(crate) const DECOMPRESSION_FAILED: u64 = 0x200;
pub(crate) const ENCODER_STREAM_ERROR: u64 = 0x201;
pub(crate) const DECODER_STREAM_ERROR: u64 = 0x202;

/// What reached the service.
#[derive(Default)]
pub(crate) struct Ledger {
    /// Heads of requests, as they came.
    pub(crate) heads: Mutex<Vec<String>>,
    /// Connections that were closed while an answer was owed.
    pub(crate) given_up: AtomicUsize,
}

impl Ledger {
    pub(crate) fn count(&self) -> usize {
        self.heads.lock().unwrap().len()
    }

    pub(crate) fn last(&self) -> String {
        self.heads.lock().unwrap().last().cloned().unwrap_or_default()
    }

    pub(crate) async fn wait_given_up(&self, at_least: usize) {
        wait_for("the service is told", LIMIT, || async {
            let seen = self.given_up.load(SeqCst);
            if seen >= at_least { Ok(()) } else { Err(format!("{seen} of {at_least}")) }
        })
        .await
        .unwrap();
    }
}

/// An HTTP/1.1 service that answers as its paths say.
pub(crate) async fn service(ledger: Arc<Ledger>) -> SocketAddr {
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

pub(crate) async fn serve(mut stream: TcpStream, ledger: &Ledger) -> Option<()> {
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
pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) public: SocketAddr,
    pub(crate) rogue: Rogue,
    pub(crate) stranger: quinn::Endpoint,
    pub(crate) client: Client,
    pub(crate) cert: String,
    pub(crate) ledger: Arc<Ledger>,
}

/// Where a raw client stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// A member, at the mesh port of the service's node.
    Mesh,
    /// A stranger, at the edge's public port.
    Public,
}

pub(crate) const SIDES: [Side; 2] = [Side::Mesh, Side::Public];

impl Side {
    pub(crate) fn authority(self) -> &'static str {
        match self {
            Self::Mesh => "up.mesh.internal",
            Self::Public => HOST,
        }
    }

    /// The head of a GET, or of another method.
    pub(crate) fn fields<'a>(self, method: &'a str, path: &'a str) -> Vec<(&'a str, &'a str)> {
        vec![(":method", method), (":scheme", "https"), (":authority", self.authority()), (":path", path)]
    }

    pub(crate) fn get(self) -> Vec<u8> {
        head(&self.fields("GET", "/"))
    }

    pub(crate) fn post(self, path: &str) -> Vec<u8> {
        head(&self.fields("POST", path))
    }
}

impl Scene {
    pub(crate) async fn new() -> Self {
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

    pub(crate) fn address(&self, side: Side) -> SocketAddr {
        match side {
            Side::Mesh => self.cluster.node("a").mesh,
            Side::Public => self.public,
        }
    }

    pub(crate) fn config(&self, side: Side) -> quinn::ClientConfig {
        if side == Side::Mesh { self.rogue.calls_config() } else { raw_h3::client_config(None, b"h3").unwrap() }
    }

    pub(crate) async fn silent(&self, side: Side) -> RawClient {
        let endpoint = if side == Side::Mesh { self.rogue.calls() } else { &self.stranger };
        RawClient::silent(endpoint, self.address(side), HOST).await.unwrap()
    }

    pub(crate) async fn dial(&self, side: Side) -> RawClient {
        let endpoint = if side == Side::Mesh { self.rogue.calls() } else { &self.stranger };
        RawClient::dial(endpoint, self.address(side), HOST).await.unwrap()
    }

    /// The bystander: an ordinary client.
    pub(crate) async fn assert_served(&self) {
        let request = Request::get(format!("https://{HOST}/")).body(Bytes::new()).unwrap();
        let answer = self.client.send(Door::Http3, self.public, request).await.unwrap();
        assert_eq!((answer.status, answer.text()), (200, "hello".into()));
    }

    pub(crate) fn assert_calm(&self) {
        for node in ["a", "edge"] {
            let log = self.cluster.node(node).process.log();
            assert!(!log.contains("panicked"), "{node}: {log}");
        }
    }
}

pub(crate) const HELLO: Outcome = Outcome::Answer(200, 5);

impl Scene {
    /// Resident memory of the two nodes under attack.
    pub(crate) fn memory_kib(&self) -> u64 {
        ["a", "edge"].iter().map(|node| memory_kib(&self.cluster.node(node).process, "VmRSS:")).sum()
    }
}
