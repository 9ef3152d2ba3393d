//! Nobody can hurt anybody else: readers, writers and callers that stand still or go away, and instances that stumble.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use starling_chaos::{Client, Cluster, Door, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_tests::{
    binary, call, memory_kib,
    namespace::{self, nft, tcp_ports, udp_ports},
    sample,
    service::{self, Service, Speaks},
    stuck,
};

const HOST: &str = "api.example.com";
const ALL: [Door; 5] = [Door::PlainHttp1, Door::PlainHttp2, Door::Http1, Door::Http2, Door::Http3];

struct Scene {
    cluster: Cluster,
    public: SocketAddr,
    client: Client,
    _services: Vec<Process>,
}

impl Scene {
    /// The node `far` serves `sample` and what else is given; an edge leads there in public, and the node `near` has the door
    /// of an application.
    async fn start(services: &[(&str, SocketAddr, &str)]) -> Self {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let dir = cluster.dir().to_path_buf();
        let (process, addr) = sample(&dir, "sample").await;
        let mut far = NodeSpec::named("far").serving(format!("sample={addr}"));
        for (name, addr, more) in services {
            far = far.serving(format!("{name}={addr}{more}"));
        }
        cluster.add(&far).await.unwrap();
        cluster.add(&NodeSpec::named("near")).await.unwrap();
        let (cert, key) = (dir.join("edge.pem"), dir.join("edge.key"));
        self_signed(&[HOST], &cert, &key).unwrap();
        let public = free_port();
        let names = ["sample"].into_iter().chain(services.iter().map(|(name, ..)| *name));
        let routes: String = names
            .map(|name| {
                format!("[[route]]\npath = \"/{name}\"\nservice = \"{name}\"\nauth = []\nstrip_prefix = true\n")
            })
            .collect();
        let sections = format!(
            "[edge]\nlisten = \"{public}\"\n[[certificate]]\nhosts = [\"{HOST}\"]\ncert = {cert:?}\nkey = {key:?}\n{routes}"
        );
        cluster.add_edge("edge", &sections).await.unwrap();
        let client = Client::trusting(&cert).unwrap();
        Self { cluster, public, client, _services: vec![process] }
    }

    /// The address behind a door, and the host to ask for; a path in public begins with the service.
    fn way(&self, door: Door, service: &str, path: &str) -> (SocketAddr, String, String) {
        match door {
            Door::PlainHttp1 | Door::PlainHttp2 => {
                (self.cluster.node("near").outbound, format!("{service}.mesh.internal"), path.to_string())
            }
            _ => (self.public, HOST.to_string(), format!("/{service}{path}")),
        }
    }

    fn descriptors(&self, name: &str) -> usize {
        let pid = self.cluster.node(name).process.pid().unwrap();
        std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    }

    /// Waits until those who carry calls have none any more.
    async fn is_quiet(&self) {
        for name in ["edge", "near"] {
            wait_for("no call is open any more", Duration::from_secs(200), || async {
                let admin = self.cluster.node(name).admin;
                let metrics = Client::plain().get(admin, &admin.to_string(), "/metrics").await;
                let metrics = metrics.map_err(|e| e.to_string())?.text();
                match metrics.lines().find(|line| line.starts_with("starling_calls_in_flight ")) {
                    Some("starling_calls_in_flight 0") => Ok(()),
                    line => Err(format!("{name}: {line:?}")),
                }
            })
            .await
            .unwrap();
        }
    }

    async fn stuck(&self, door: Door, service: &str, path: &str, requests: usize) -> stuck::Stuck {
        let (addr, host, path) = self.way(door, service, path);
        stuck::readers(&self.client, door, addr, &host, &path, requests).await.unwrap()
    }

    async fn get(&self, door: Door, service: &str, path: &str) -> u16 {
        let (addr, host, path) = self.way(door, service, path);
        let scheme = if matches!(door, Door::PlainHttp1 | Door::PlainHttp2) { "http" } else { "https" };
        let request =
            http::Request::builder().uri(format!("{scheme}://{host}{path}")).body(bytes::Bytes::new()).unwrap();
        self.client.send(door, addr, request).await.map_or(0, |answer| answer.status)
    }
}

/// Twelve readers of 100 MB that read nothing were once enough to stop everybody.
#[tokio::test]
async fn readers_that_stand_still_hold_nobody_up() {
    let scene = Scene::start(&[]).await;
    for door in ALL {
        assert_eq!(scene.get(door, "sample", "/").await, 200, "{door:?}: before");
    }
    let before = ["edge", "near", "far"].map(|name| (name, memory_kib(&scene.cluster.node(name).process, "VmRSS:")));
    let mut stuck = Vec::new();
    for door in ALL {
        let connections = if matches!(door, Door::PlainHttp1 | Door::Http1) { 60 } else { 3 };
        for _ in 0..connections {
            stuck.push(scene.stuck(door, "sample", "/bytes/100000000", 20).await);
        }
    }
    // As long as they are stuck, and more of them than a connection between nodes has room for.
    let until = Instant::now() + Duration::from_secs(10);
    let mut took = Vec::new();
    while Instant::now() < until {
        for door in ALL {
            let begun = Instant::now();
            assert_eq!(scene.get(door, "sample", "/").await, 200, "{door:?}: beside stuck readers");
            took.push(begun.elapsed());
        }
    }
    took.sort();
    let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
    eprintln!(
        "{} calls beside stuck readers: median {median:?}, p99 {:?}, worst {worst:?}",
        took.len(),
        took[took.len() * 99 / 100]
    );
    assert!(worst < Duration::from_secs(5), "a call took {worst:?}");
    for name in ["edge", "near", "far"] {
        let kib = memory_kib(&scene.cluster.node(name).process, "VmRSS:");
        eprintln!("{name}: {} MiB", kib >> 10);
        assert!(kib < 160 << 10, "{name} holds {kib} KiB");
    }
    // And they do not stay: each is ended after the time that a reader may stand still.
    let begun = Instant::now();
    scene.is_quiet().await;
    eprintln!("no call is open any more after {:?}", begun.elapsed());
    drop(stuck);
    for (name, kib) in before {
        wait_for("memory goes back", Duration::from_secs(120), || async {
            let now = memory_kib(&scene.cluster.node(name).process, "VmRSS:");
            if now < kib + (16 << 10) { Ok(()) } else { Err(format!("{name}: {now} KiB, and {kib} before")) }
        })
        .await
        .unwrap();
        eprintln!("{name}: its memory is back after {:?}", begun.elapsed());
    }
}

/// Without a FIN or a word: readers that stood still, and watches, to whom nothing is to be sent.
#[test]
fn clients_that_vanish_are_noticed() {
    if namespace::is_inside("clients_that_vanish_are_noticed") {
        tokio::runtime::Runtime::new().unwrap().block_on(clients_vanish());
    }
}

async fn clients_vanish() {
    let quiet = Service::start(Speaks::Http1, |_, open| async move { service::watch(open) }).await;
    let scene = Scene::start(&[("quiet", quiet.addr, "")]).await;
    for door in ALL {
        assert_eq!(scene.get(door, "sample", "/").await, 200, "{door:?}: before");
    }
    let before = ["edge", "near", "far"]
        .map(|name| (name, scene.descriptors(name), memory_kib(&scene.cluster.node(name).process, "VmRSS:")));
    let mut clients = Vec::new();
    for door in ALL {
        let (connections, requests) = if matches!(door, Door::PlainHttp1 | Door::Http1) { (20, 1) } else { (2, 10) };
        for _ in 0..connections {
            clients.push(scene.stuck(door, "sample", "/bytes/100000000", requests).await);
            clients.push(scene.stuck(door, "quiet", "/", requests).await);
        }
    }
    wait_for("all watch", Duration::from_secs(60), || async {
        if quiet.open() == 100 { Ok(()) } else { Err(format!("{}", quiet.open())) }
    })
    .await
    .unwrap();
    let doors = [scene.public.port(), scene.cluster.node("near").outbound.port()];
    let pid = std::process::id();
    nft("add table ip gone");
    nft("add chain ip gone out { type filter hook output priority 0; }");
    for door in doors {
        for (kind, ports) in [("tcp", tcp_ports(pid, &[door])), ("udp", udp_ports(pid))] {
            assert!(!ports.is_empty(), "{kind}");
            // Both ends, and of each connection by itself: one to another door may have the same port at its own end.
            let clients = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
            nft(&format!("add rule ip gone out {kind} sport {{ {clients} }} {kind} dport {door} drop"));
            nft(&format!("add rule ip gone out {kind} sport {door} {kind} dport {{ {clients} }} drop"));
        }
    }
    let begun = Instant::now();
    for door in ALL {
        assert_eq!(scene.get(door, "sample", "/").await, 200, "{door:?}: beside those who have vanished");
    }
    scene.is_quiet().await;
    wait_for("the service was told", Duration::from_secs(60), || async {
        if quiet.open() == 0 { Ok(()) } else { Err(format!("{}", quiet.open())) }
    })
    .await
    .unwrap();
    eprintln!("the last call of those who vanished ended after {:?}", begun.elapsed());
    for (name, descriptors, kib) in before {
        wait_for("all goes back", Duration::from_secs(120), || async {
            let now = (scene.descriptors(name), memory_kib(&scene.cluster.node(name).process, "VmRSS:"));
            let back = now.0 <= descriptors + 8 && now.1 < kib + (16 << 10);
            if back { Ok(()) } else { Err(format!("{name}: {now:?}, and {descriptors}, {kib} before")) }
        })
        .await
        .unwrap();
    }
    drop(clients);
}

/// Where a line is slow, and loses what is too much for it, everybody gets on: downloads beside each other, and small calls
/// beside them.
#[test]
fn downloads_over_a_slow_line_leave_room() {
    if namespace::is_inside("downloads_over_a_slow_line_leave_room") {
        tokio::runtime::Runtime::new().unwrap().block_on(share_a_slow_line());
    }
}

async fn share_a_slow_line() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let scene = Scene::start(&[]).await;
    assert_eq!(scene.get(Door::PlainHttp1, "sample", "/").await, 200);
    nft("add table ip slow");
    nft("add chain ip slow out { type filter hook output priority 0; }");
    nft("add rule ip slow out meta l4proto udp limit rate over 2 mbytes/second burst 48 kbytes drop");
    let got: Vec<Arc<AtomicUsize>> = (0..6).map(|_| Arc::default()).collect();
    let mut downloads = tokio::task::JoinSet::new();
    for got in &got {
        let got = got.clone();
        let (addr, host, path) = scene.way(Door::PlainHttp1, "sample", "/bytes/1000000000");
        downloads.spawn(async move {
            let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
            let mut buffer = vec![0; 64 << 10];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                got.fetch_add(read, Relaxed);
            }
        });
    }
    let (begun, mut took) = (Instant::now(), Vec::new());
    // Each gets on again and again, not only at first.
    for round in 0..3 {
        let before: Vec<usize> = got.iter().map(|got| got.load(Relaxed)).collect();
        wait_for("each download gets on", Duration::from_secs(60), || async {
            // Within the time to the head of an answer, or it were 504.
            assert_eq!(scene.get(Door::PlainHttp1, "sample", "/").await, 200, "beside downloads");
            let more: Vec<usize> = got.iter().zip(&before).map(|(got, before)| got.load(Relaxed) - before).collect();
            if more.iter().all(|more| *more >= 512 << 10) { Ok(()) } else { Err(format!("in round {round}: {more:?}")) }
        })
        .await
        .unwrap();
        let asked = Instant::now();
        assert_eq!(scene.get(Door::PlainHttp1, "sample", "/").await, 200, "beside downloads");
        took.push(asked.elapsed());
    }
    let got: Vec<usize> = got.iter().map(|got| got.load(Relaxed) >> 10).collect();
    eprintln!("after {:?} six downloads have {got:?} KiB, small calls took {took:?}", begun.elapsed());
}

/// A service that reads nothing holds its own callers up, for so long, and nobody else.
#[tokio::test]
async fn uploads_that_nobody_takes_hold_nobody_up() {
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = deaf.local_addr().unwrap();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = deaf.accept().await {
            kept.push(stream);
        }
    });
    let scene = Scene::start(&[("deaf", addr, "")]).await;
    let upload = bytes::Bytes::from(vec![0; 32 << 20]);
    let mut stuck = tokio::task::JoinSet::new();
    for door in ALL {
        for _ in 0..20 {
            let (addr, host, path) = scene.way(door, "deaf", "/");
            let scheme = if matches!(door, Door::PlainHttp1 | Door::PlainHttp2) { "http" } else { "https" };
            let request = http::Request::post(format!("{scheme}://{host}{path}")).body(upload.clone()).unwrap();
            let client = scene.client.clone();
            stuck.spawn(async move { (door, client.send(door, addr, request).await) });
        }
    }
    while !stuck.is_empty() {
        tokio::select! {
            ended = stuck.join_next() => {
                let (door, answer) = ended.unwrap().unwrap();
                if let Ok(answer) = answer {
                    assert_eq!(answer.status, 504, "{door:?}: {}", answer.text());
                } else {
                    // Ended with the stream is as good; not at the client's own limit of a minute.
                    let why = format!("{:?}", answer.unwrap_err());
                    assert!(!why.contains("no answer in time"), "{door:?}: {why}");
                }
            }
            () = async {
                for door in ALL {
                    assert_eq!(scene.get(door, "sample", "/").await, 200, "{door:?}: beside stuck uploads");
                }
            } => {}
        }
    }
}

/// An answer counts though the service, or the edge, reads no more of the request.
#[tokio::test]
async fn an_early_answer_arrives() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = [0; 512];
                let _ = stream.read(&mut head).await;
                let answer =
                    "HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo large";
                let _ = stream.write_all(answer.as_bytes()).await;
                // Closed with the request unread: a reset follows the answer.
            });
        }
    });
    let scene = Scene::start(&[("strict", addr, "")]).await;
    let upload = bytes::Bytes::from(vec![0; 4 << 20]);
    for (service, path, status) in [("strict", "/", 413), ("nothing", "/", 404)] {
        for door in ALL {
            for round in 0..12 {
                let (addr, host, path) = scene.way(door, service, path);
                let scheme = if matches!(door, Door::PlainHttp1 | Door::PlainHttp2) { "http" } else { "https" };
                let request = http::Request::post(format!("{scheme}://{host}{path}")).body(upload.clone()).unwrap();
                let answer = scene.client.send(door, addr, request).await;
                let answer = answer.unwrap_or_else(|e| panic!("{service} over {door:?}, round {round}: {e:?}"));
                assert_eq!(answer.status, status, "{service} over {door:?}, round {round}: {}", answer.text());
            }
        }
    }
}

/// Whoever says nothing, or a byte a second, is not waited for for ever.
#[tokio::test]
async fn the_silent_and_the_slow_are_ended() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let scene = Scene::start(&[]).await;
    /// Whether a head, a body or nothing at all comes a byte a second.
    #[derive(Debug, Clone, Copy)]
    enum Slow {
        Silent,
        Head,
        Body,
    }
    let mut ends = tokio::task::JoinSet::new();
    for (protocol, slow) in
        [("h2", Slow::Silent), ("http/1.1", Slow::Silent), ("http/1.1", Slow::Head), ("http/1.1", Slow::Body)]
    {
        let (client, addr) = (scene.client.clone(), scene.public);
        ends.spawn(async move {
            let stream = client.connect_tls(addr, HOST, protocol.as_bytes()).await.unwrap();
            let (mut read, mut write) = tokio::io::split(stream);
            let writing = tokio::spawn(async move {
                let head = format!("POST /sample/ HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 100000\r\n\r\n");
                if let Slow::Body = slow {
                    write.write_all(head.as_bytes()).await.unwrap();
                }
                let bytes = if let Slow::Head = slow { head.into_bytes() } else { vec![b'x'; 600] };
                for byte in bytes {
                    if !matches!(slow, Slow::Silent)
                        && (write.write_all(&[byte]).await.is_err() || write.flush().await.is_err())
                    {
                        return;
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(120), read.read_to_end(&mut answer)).await;
            assert!(ended.is_ok(), "{protocol}, {slow:?}: still open");
            if let Slow::Body = slow {
                let answer = String::from_utf8_lossy(&answer).into_owned();
                assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
            }
            writing.abort();
        });
    }
    // A body of a byte a second, over the other protocols.
    for door in [Door::PlainHttp1, Door::PlainHttp2, Door::Http2] {
        let (addr, host, path) = scene.way(door, "sample", "/");
        let client = scene.client.clone();
        ends.spawn(async move {
            let scheme = if door == Door::Http2 { "https" } else { "http" };
            let request = http::Request::post(format!("{scheme}://{host}{path}"));
            let (bytes, body) = tokio::sync::mpsc::channel(1);
            tokio::spawn(async move {
                while bytes.send(bytes::Bytes::from_static(b"x")).await.is_ok() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
            let status = stuck::trickle(&client, door, addr, request.body(body).unwrap()).await.unwrap();
            assert_eq!(status, 408, "{door:?}");
        });
    }
    {
        let (client, addr) = (scene.client.clone(), scene.public);
        ends.spawn(async move {
            let (connection, _endpoint) = client.connect_quic(addr, HOST).await.unwrap();
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            let head = [(":method", "POST"), (":scheme", "https"), (":authority", HOST), (":path", "/sample/")];
            send.write_all(&starling_tests::raw_h3::head(&head)).await.unwrap();
            let byte = starling_tests::raw_h3::frame(starling_tests::raw_h3::DATA, b"x");
            let answered = receive.read_chunk(usize::MAX, true);
            let trickling = async {
                while send.write_all(&byte).await.is_ok() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                answered = tokio::time::timeout(Duration::from_secs(120), answered) => {
                    let chunk = answered.expect("it ends").unwrap().expect("with an answer");
                    assert!(!chunk.bytes.is_empty());
                }
                () = trickling => {}
            }
        });
    }
    while let Some(ended) = ends.join_next().await {
        ended.unwrap();
    }
}

/// Whoever leaves is told to the service, before and after the head of its answer, whichever way the call came.
#[tokio::test]
async fn a_call_that_is_given_up_ends_at_the_service() {
    let headless = Service::start(Speaks::Http1, |_, open| async move {
        let _open = open;
        std::future::pending().await
    })
    .await;
    let quiet = Service::start(Speaks::Http1, |_, open| async move { service::watch(open) }).await;
    let quiet2 = Service::start(Speaks::H2c(5000), |_, open| async move { service::watch(open) }).await;
    let scene = Scene::start(&[
        ("headless", headless.addr, ""),
        ("quiet", quiet.addr, ""),
        ("quiet2", quiet2.addr, ",protocol=h2c"),
    ])
    .await;
    for (name, service) in [("headless", &headless), ("quiet", &quiet), ("quiet2", &quiet2)] {
        for door in ALL {
            let stuck = scene.stuck(door, name, "/", 10).await;
            let wanted = if matches!(door, Door::PlainHttp1 | Door::Http1) { 1 } else { 10 };
            wait_for("the calls arrive", Duration::from_secs(30), || async {
                if service.open() == wanted { Ok(()) } else { Err(format!("{} of {wanted}", service.open())) }
            })
            .await
            .unwrap_or_else(|e| panic!("{name} over {door:?}: {e}"));
            drop(stuck);
            wait_for("the service is told", Duration::from_secs(10), || async {
                if service.open() == 0 { Ok(()) } else { Err(format!("{} are open", service.open())) }
            })
            .await
            .unwrap_or_else(|e| panic!("{name} over {door:?}: {e}"));
        }
    }
}

/// One bad answer, or a slow one, is no reason to starve an instance; and equals get equal shares.
#[tokio::test]
async fn an_instance_that_stumbles_comes_back() {
    tokio::join!(stumbles_among(2), stumbles_among(3));
}

async fn stumbles_among(instances: usize) {
    let (bad, slow) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let stumbling = {
        let (bad, slow) = (bad.clone(), slow.clone());
        move |_: http::Request<hyper::body::Incoming>, _open| {
            let fails = bad.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)).is_ok();
            let lags = slow.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)).is_ok();
            async move {
                if lags {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                service::text(if fails { 500 } else { 200 }, "stumbling")
            }
        }
    };
    let mut services = vec![Service::start(Speaks::Http1, stumbling).await];
    while services.len() < instances {
        services.push(Service::start(Speaks::Http1, |_, _| async { service::text(200, "steady") }).await);
    }
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for (n, service) in services.iter().enumerate() {
        let node = NodeSpec::named(&format!("web-{n}"));
        cluster.add(&node.serving(format!("web={}", service.addr))).await.unwrap();
    }
    let outbound = cluster.node("seed").outbound;
    wait_for("all are there", Duration::from_secs(30), || async {
        for _ in 0..50 {
            call(outbound, "web", "/").await;
        }
        if services.iter().all(|s| s.begun.load(Relaxed) > 0) { Ok(()) } else { Err("not yet".into()) }
    })
    .await
    .unwrap();
    // Of 300 calls, one after the other, in percent.
    let shares = || async {
        let before: Vec<usize> = services.iter().map(|s| s.begun.load(Relaxed)).collect();
        for _ in 0..300 {
            call(outbound, "web", "/").await;
        }
        services.iter().zip(before).map(|(s, before)| (s.begun.load(Relaxed) - before) / 3).collect::<Vec<_>>()
    };
    let fair = 60 / instances..=140 / instances;
    for (what, stumbles) in [("nothing", None), ("one 500", Some(&bad)), ("one slow answer", Some(&slow))] {
        if let Some(stumbles) = stumbles {
            stumbles.store(1, Relaxed);
            while stumbles.load(Relaxed) > 0 {
                call(outbound, "web", "/").await;
            }
        }
        let begun = Instant::now();
        wait_for("fair shares", Duration::from_secs(30), || async {
            let shares = shares().await;
            eprintln!("{instances} instances, {:?} after {what}: {shares:?} %", begun.elapsed());
            if shares.iter().all(|share| fair.contains(share)) { Ok(()) } else { Err(format!("{shares:?}")) }
        })
        .await
        .unwrap_or_else(|e| panic!("{instances} instances, after {what}: {e}"));
    }
}

/// A service's limit of streams is no queue: there is another connection, or a prompt word.
#[tokio::test]
async fn a_full_connection_to_a_service_is_no_queue() {
    let service = Service::start(Speaks::H2c(4), |request, open| async move {
        if request.uri().path() == "/watch" { service::watch(open) } else { service::text(200, "here") }
    })
    .await;
    let scene = Scene::start(&[("narrow", service.addr, ",protocol=h2c")]).await;
    let _watches = scene.stuck(Door::PlainHttp2, "narrow", "/watch", 12).await;
    wait_for("all watch", Duration::from_secs(30), || async {
        if service.open() == 12 { Ok(()) } else { Err(format!("{}", service.open())) }
    })
    .await
    .unwrap();
    for door in ALL {
        assert_eq!(scene.get(door, "narrow", "/").await, 200, "{door:?}");
    }
    assert!(service.connections.load(Relaxed) <= 6, "no more connections than it takes");
}

/// A gRPC stream that the mesh ends says so in gRPC's words, which clients take for a reason to try again.
#[tokio::test]
async fn a_grpc_stream_that_breaks_off_is_unavailable() {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let quiet = Service::start(Speaks::H2c(100), |_, open| async move {
        let mut answer = service::watch(open);
        answer.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        answer
    })
    .await;
    let mut scene = Scene::start(&[("quiet", quiet.addr, ",protocol=h2c")]).await;
    let mut ends = Vec::new();
    for door in [Door::PlainHttp2, Door::Http2] {
        let (addr, host, path) = scene.way(door, "quiet", "/");
        let scheme = if door == Door::Http2 { "https" } else { "http" };
        let request = http::Request::post(format!("{scheme}://{host}{path}"))
            .header("content-type", "application/grpc")
            .body(Full::new(bytes::Bytes::from_static(&[0; 5])))
            .unwrap();
        let stream: Box<dyn Stream> = match door {
            Door::Http2 => Box::new(scene.client.connect_tls(addr, &host, b"h2").await.unwrap()),
            _ => Box::new(tokio::net::TcpStream::connect(addr).await.unwrap()),
        };
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        ends.push((door, sender, answer.into_body()));
    }
    scene.cluster.kill("far").await.unwrap();
    for (door, _sender, mut body) in ends {
        let frame = tokio::time::timeout(Duration::from_secs(60), body.frame()).await.expect("it ends");
        let trailers = frame.expect("with trailers").expect("and not with a reset").into_trailers().expect("trailers");
        assert_eq!(trailers["grpc-status"], "14", "{door:?}: {trailers:?}");
    }
}

trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send> Stream for T {}

/// A call under way may need the application's door to be answered: it stays open as long as that.
#[tokio::test]
async fn a_drain_leaves_the_door_open_for_calls_under_way() {
    let door: Arc<std::sync::OnceLock<SocketAddr>> = Arc::default();
    let of = door.clone();
    let asking = Service::start(Speaks::Http1, move |_, _| {
        let door = of.clone();
        async move {
            tokio::time::sleep(Duration::from_secs(2)).await;
            let Some(door) = door.get() else { return service::text(500, "too early") };
            let answer = Client::plain().get(*door, "needed.mesh.internal", "/").await;
            answer.map_or_else(
                |e| service::text(500, format!("{e:?}")),
                |answer| service::text(answer.status, answer.body),
            )
        }
    })
    .await;
    let needed = Service::start(Speaks::Http1, |_, _| async { service::text(200, "needed") }).await;
    let mut scene = Scene::start(&[("asking", asking.addr, "")]).await;
    scene.cluster.add(&NodeSpec::named("other").serving(format!("needed={}", needed.addr))).await.unwrap();
    wait_for("the other service is known", Duration::from_secs(30), || async {
        let answer = call(scene.cluster.node("far").outbound, "needed", "/").await;
        if answer.status == 200 { Ok(()) } else { Err(answer.text()) }
    })
    .await
    .unwrap();
    let outbound = scene.cluster.node("far").outbound;
    door.set(outbound).unwrap();
    let near = scene.cluster.node("near").outbound;
    let calling = tokio::spawn(async move { call(near, "asking", "/").await });
    wait_for("the call arrives", Duration::from_secs(30), || async {
        if asking.begun.load(Relaxed) > 0 { Ok(()) } else { Err("not yet".into()) }
    })
    .await
    .unwrap();
    assert!(scene.cluster.terminate("far").await.unwrap().success());
    let answer = calling.await.unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "needed"));
}

/// Five thousand watches that are given up, by hundreds, over each door: prints how long the service waits to be told, and what
/// is left.
#[tokio::test]
async fn watches_by_the_thousand() {
    let quiet = Service::start(Speaks::Http1, |_, open| async move { service::watch(open) }).await;
    let scene = Scene::start(&[("quiet", quiet.addr, "")]).await;
    let before = ["edge", "near", "far"].map(|name| (name, scene.descriptors(name)));
    for door in [Door::PlainHttp2, Door::Http2, Door::Http3] {
        let mut worst = Duration::ZERO;
        for _ in 0..50 {
            let stuck = scene.stuck(door, "quiet", "/", 100).await;
            wait_for("all watch", Duration::from_secs(60), || async {
                if quiet.open() == 100 { Ok(()) } else { Err(format!("{}", quiet.open())) }
            })
            .await
            .unwrap();
            let begun = Instant::now();
            drop(stuck);
            while quiet.open() > 0 {
                assert!(begun.elapsed() < Duration::from_secs(30), "{door:?}: {} are open", quiet.open());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            worst = worst.max(begun.elapsed());
        }
        eprintln!("{door:?}: 5,000 watches, the slowest hundred ended at the service after {worst:?}");
    }
    for (name, count) in before {
        wait_for("descriptors go back", Duration::from_secs(120), || async {
            let now = scene.descriptors(name);
            if now <= count + 8 { Ok(()) } else { Err(format!("{name}: {now}, and {count} before")) }
        })
        .await
        .unwrap();
        eprintln!("{name}: {count} descriptors before, {} after", scene.descriptors(name));
    }
}
