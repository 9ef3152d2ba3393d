//! Calls that end well: services with too much to do, slow instances, retries that are allowed and such that are not.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request};
use starling_chaos::{Client, Cluster, Door, NodeSpec, free_port, wait_for};
use starling_tests::{
    binary, is_known,
    service::{Service, Speaks, text},
};
use tokio::sync::Semaphore;

const LIMIT: Duration = Duration::from_secs(60);

/// A service that works on one request at a time, each for so long.
async fn one_at_a_time(work: Duration) -> Service {
    let turn = Arc::new(Semaphore::new(1));
    Service::start(Speaks::Http1, move |_, _| {
        let turn = turn.clone();
        async move {
            let _turn = turn.acquire().await;
            tokio::time::sleep(work).await;
            text(200, "done")
        }
    })
    .await
}

/// Hands that call again and again, until they are dropped: how many answers had which status.
struct Hands {
    good: Arc<AtomicUsize>,
    shed: Arc<AtomicUsize>,
    other: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Hands {
    fn start(door: SocketAddr, hands: usize) -> Self {
        let (good, shed, other): (Arc<AtomicUsize>, Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
        let tasks = (0..hands)
            .map(|_| {
                let (good, shed, other) = (good.clone(), shed.clone(), other.clone());
                tokio::spawn(async move {
                    loop {
                        // POST, so that nothing is repeated but what was not begun.
                        let request =
                            Request::post("http://slow.mesh.internal/").body(Bytes::from_static(b"work")).unwrap();
                        match Client::plain().send(Door::PlainHttp1, door, request).await {
                            Ok(answer) if answer.status == 200 => good.fetch_add(1, SeqCst),
                            Ok(answer) if answer.status == 503 && answer.header("retry-after") == "1" => {
                                tokio::time::sleep(Duration::from_millis(50)).await;
                                shed.fetch_add(1, SeqCst)
                            }
                            _ => other.fetch_add(1, SeqCst),
                        };
                    }
                })
            })
            .collect();
        Self { good, shed, other, tasks }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// What a service cannot answer in time is refused at once, those who ask little are served as before, and when it is over, all
/// is as it was.
#[tokio::test]
async fn too_much_is_refused_at_once_and_one_caller_cannot_take_all() {
    let service = one_at_a_time(Duration::from_millis(20)).await;
    let mut cluster = Cluster::start(binary()).await.unwrap();
    cluster.add(&NodeSpec::named("far").serving(format!("slow={}", service.addr))).await.unwrap();
    cluster.add(&NodeSpec::named("greedy")).await.unwrap();
    cluster.add(&NodeSpec::named("modest")).await.unwrap();
    for node in ["greedy", "modest"] {
        is_known(&cluster, node, "slow", 1).await;
    }
    // As long as it is not too much, nobody is refused.
    let few = Hands::start(cluster.node("modest").outbound, 2);
    wait_for("some are answered", LIMIT, || async {
        if few.good.load(SeqCst) > 50 { Ok(()) } else { Err(few.good.load(SeqCst).to_string()) }
    })
    .await
    .unwrap();
    assert_eq!((few.shed.load(SeqCst), few.other.load(SeqCst)), (0, 0));

    // Two hundred at a time would wait for four seconds each.
    let many = Hands::start(cluster.node("greedy").outbound, 200);
    wait_for("some are refused", LIMIT, || async {
        if many.shed.load(SeqCst) > 500 { Ok(()) } else { Err(many.shed.load(SeqCst).to_string()) }
    })
    .await
    .unwrap();
    assert_eq!(many.other.load(SeqCst), 0, "refused in order, or answered");
    assert!(many.good.load(SeqCst) > 0);
    let before = (few.good.load(SeqCst), few.shed.load(SeqCst));
    wait_for("who asks little is answered", LIMIT, || async {
        let good = few.good.load(SeqCst) - before.0;
        if good > 20 { Ok(()) } else { Err(good.to_string()) }
    })
    .await
    .unwrap();
    assert_eq!(few.shed.load(SeqCst), before.1, "who has less than its share is not refused");
    let admin = cluster.node("far").admin;
    let metrics = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
    assert!(metrics.contains("starling_shed_total{service=\"slow\"}"), "{metrics}");

    drop(many);
    let begun = Instant::now();
    wait_for("it is quick again", LIMIT, || async {
        let asked = Instant::now();
        let answer = Client::plain().get(cluster.node("greedy").outbound, "slow.mesh.internal", "/").await;
        match answer {
            Ok(answer) if answer.status == 200 && asked.elapsed() < Duration::from_millis(500) => Ok(()),
            other => Err(format!("{:?} after {:?}", other.map(|answer| answer.status), asked.elapsed())),
        }
    })
    .await
    .unwrap();
    assert!(begun.elapsed() < LIMIT);
}

/// A service of which every `nth` answer takes long, and the number of requests that it saw.
async fn sometimes_slow(nth: usize, time: Duration) -> (Service, Arc<AtomicUsize>) {
    let seen = Arc::<AtomicUsize>::default();
    let counted = seen.clone();
    let service = Service::start(Speaks::Http1, move |_, _| {
        let number = counted.fetch_add(1, SeqCst);
        async move {
            if number % nth == nth - 1 {
                tokio::time::sleep(time).await;
            }
            text(200, "done")
        }
    })
    .await;
    (service, seen)
}

/// A second copy goes where the first one takes long, if the operator says so; then nobody waits for the slow answers.
#[tokio::test]
async fn a_hedged_call_does_not_wait_for_the_slow_one() {
    let slow = Duration::from_secs(5);
    let (one, _) = sometimes_slow(10, slow).await;
    let (two, _) = sometimes_slow(usize::MAX, slow).await;
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for (name, service) in [("a", &one), ("b", &two)] {
        cluster.add(&NodeSpec::named(name).serving(format!("web={}", service.addr))).await.unwrap();
    }
    let (port, dir) = (free_port(), cluster.dir().to_path_buf());
    let file = dir.join("hedged.toml");
    let config = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{port}\"\nhedge = {{ after = \"100ms\" }}\nretry = {{ budget = 1.0, per_second \
         = 100 }}\n"
    );
    std::fs::write(&file, config).unwrap();
    cluster.add(&NodeSpec::named("near").flag("--config").flag(file.to_string_lossy())).await.unwrap();
    is_known(&cluster, "near", "web", 2).await;
    let mut longest = Duration::ZERO;
    for _ in 0..100 {
        let begun = Instant::now();
        let answer = Client::plain().get(port, "web", "/").await.unwrap();
        assert_eq!(answer.status, 200);
        longest = longest.max(begun.elapsed());
    }
    assert!(longest < slow, "{longest:?}");
    let admin = cluster.node("near").admin;
    let metrics = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
    let hedges = metrics.lines().find(|line| line.starts_with("starling_retries_total") && line.contains("hedge"));
    let hedges = hedges.and_then(|line| line.rsplit(' ').next()).and_then(|count| count.parse::<f64>().ok());
    assert!(hedges.is_some_and(|hedges| hedges >= 1.0), "{metrics}");
}

/// Where a service does not answer at all, a call is repeated as its upstream says, and no more.
#[tokio::test]
async fn retries_are_as_many_as_the_upstream_says() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen = Arc::<AtomicUsize>::default();
    let counted = seen.clone();
    // It takes the request, and closes.
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                use tokio::io::AsyncReadExt;
                if matches!(stream.read(&mut [0; 4096]).await, Ok(read) if read > 0) {
                    counted.fetch_add(1, SeqCst);
                }
            });
        }
    });
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for name in ["a", "b", "c", "d", "e"] {
        cluster.add(&NodeSpec::named(name).serving(format!("web={addr}"))).await.unwrap();
    }
    let [usual, none, five, posts] = [(); 4].map(|()| free_port());
    let file = cluster.dir().join("retries.toml");
    let upstream = |port: SocketAddr, retry: &str| {
        format!("[[upstream]]\nservice = \"web\"\nlisten = \"{port}\"\nretry = {{ {retry} }}\n")
    };
    let config = [
        upstream(usual, ""),
        upstream(none, "attempts = 1"),
        upstream(five, "attempts = 5, budget = 1.0, per_second = 100"),
        upstream(posts, "any_method = true"),
    ];
    std::fs::write(&file, config.concat()).unwrap();
    cluster.add(&NodeSpec::named("near").flag("--config").flag(file.to_string_lossy())).await.unwrap();
    is_known(&cluster, "near", "web", 5).await;
    for (port, method, attempts) in [
        (usual, Method::GET, 3),
        (usual, Method::POST, 1),
        (none, Method::GET, 1),
        (five, Method::GET, 5),
        (posts, Method::POST, 3),
        (posts, Method::PATCH, 3),
    ] {
        let before = seen.load(SeqCst);
        let request = Request::builder().method(&method).uri("http://web/").body(Bytes::from_static(b"x")).unwrap();
        let request = if method == Method::GET { request.map(|_| Bytes::new()) } else { request };
        let answer = Client::plain().send(Door::PlainHttp1, port, request).await.unwrap();
        assert_eq!(answer.status, 502, "{method}");
        assert_eq!(seen.load(SeqCst) - before, attempts, "{method} over {port}");
    }
}

/// Where all have too much to do, a call is refused after as many attempts as any other, and has not asked everybody.
#[tokio::test]
async fn a_call_that_nobody_has_room_for_does_not_ask_everybody() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let names = ["a", "b", "c", "d", "e", "f"];
    for name in names {
        // No call gets its answer's head; so each that waits has the only place.
        let file = cluster.dir().join(format!("{name}.toml"));
        let hang = free_port();
        let listener = tokio::net::TcpListener::bind(hang).await.unwrap();
        tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                kept.push(stream);
            }
        });
        let service =
            format!("[[service]]\nname = \"web\"\naddr = \"{hang}\"\nlimits = {{ calls = 1, adaptive = false }}\n");
        std::fs::write(&file, service).unwrap();
        let token = cluster.token(&["--service", "web"]).await.unwrap();
        let node = NodeSpec::named(name).flag("--config").flag(file.to_string_lossy());
        cluster.add_with_token(&node, &token).await.unwrap();
    }
    is_known(&cluster, "seed", "web", names.len()).await;
    let door = cluster.node("seed").outbound;
    let mut waiting = tokio::task::JoinSet::new();
    // Enough that each instance has got one, whoever is asked.
    for _ in 0..60 {
        waiting.spawn(async move { Client::plain().get(door, "web", "/").await.map(|answer| answer.status) });
    }
    let shed = || async {
        let mut all = 0.0;
        for name in names {
            let admin = cluster.node(name).admin;
            let text = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
            let line = text.lines().find(|line| line.starts_with("starling_shed_total")).unwrap().to_string();
            all += line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
        }
        all
    };
    // All but those who wait have been refused.
    for _ in 0..60 - names.len() {
        let refused = tokio::time::timeout(LIMIT, waiting.join_next()).await.unwrap().unwrap().unwrap().unwrap();
        assert_eq!(refused, 503);
    }
    let before = shed().await;
    let answer = Client::plain().get(door, "web", "/").await.unwrap();
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"), "{}", answer.text());
    let asked = shed().await - before;
    assert!((1.0..=3.0).contains(&asked), "{asked} were asked");
}

/// A mesh with `near`, whose file has these sections.
async fn near(sections: &str) -> Cluster {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let file = cluster.dir().join("near.toml");
    std::fs::write(&file, sections).unwrap();
    cluster.add(&NodeSpec::named("near").flag("--config").flag(file.to_string_lossy())).await.unwrap();
    cluster
}

/// A call of gRPC with an empty message.
fn grpc(fields: &[(&str, &str)]) -> Request<Bytes> {
    let mut request = Request::post("http://web.mesh.internal/x.Y/Z").header("content-type", "application/grpc");
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(Bytes::from_static(&[0; 5])).unwrap()
}

/// What a node says in place of its service counts by its status, also where the caller speaks gRPC.
#[tokio::test]
async fn a_grpc_call_that_one_instance_refuses_goes_to_the_other() {
    let works = Service::start(Speaks::H2c(100), |_, _| async { text(200, "done") }).await;
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for (name, addr) in [("works", works.addr), ("down", free_port())] {
        cluster.add(&NodeSpec::named(name).serving(format!("web={addr},protocol=h2c"))).await.unwrap();
    }
    is_known(&cluster, "seed", "web", 2).await;
    let door = cluster.node("seed").outbound;
    for _ in 0..50 {
        let answer = Client::plain().send(Door::PlainHttp2, door, grpc(&[])).await.unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (200, "done"), "{:?}", answer.headers);
    }
    let services: Vec<starling_protocol::admin::Service> = cluster.admin("seed", "/v1/services").await.unwrap();
    assert!(services[0].retries > 0, "it was asked, and another one then: {services:?}");
    // Where nobody else is, gRPC is told so as it has it.
    cluster.run(&["leave", "--admin", &format!("http://{}", cluster.node("works").admin)]).await.unwrap();
    is_known(&cluster, "seed", "web", 1).await;
    let answer = Client::plain().send(Door::PlainHttp2, door, grpc(&[])).await.unwrap();
    assert_eq!((answer.status, answer.header("grpc-status")), (200, "14"), "{:?}", answer.headers);
    assert!(answer.header("proxy-status").contains("connection_refused"), "{:?}", answer.headers);
    assert!(!answer.header("grpc-message").is_empty() && answer.body.is_empty(), "{:?}", answer.headers);
}

/// The time to the head of an answer is not told to the service as that of the whole call.
#[tokio::test]
async fn a_grpc_service_is_told_the_time_of_the_whole_call() {
    let port = free_port();
    let mut cluster = near(&format!("[[upstream]]\nservice = \"web\"\nlisten = \"{port}\"\ntimeout = \"5s\"\n")).await;
    let service = Service::start(Speaks::H2c(100), |request, _| async move {
        let told = request.headers().get("grpc-timeout").map_or("none", |told| told.to_str().unwrap());
        text(200, told.to_string())
    })
    .await;
    cluster.add(&NodeSpec::named("a").serving(format!("web={},protocol=h2c", service.addr))).await.unwrap();
    is_known(&cluster, "near", "web", 1).await;
    let told = Client::plain().send(Door::PlainHttp2, port, grpc(&[("grpc-timeout", "1H")])).await.unwrap().text();
    let ms: u64 = told.strip_suffix('m').and_then(|ms| ms.parse().ok()).unwrap_or_else(|| panic!("{told}"));
    assert!((3_500_000..=3_600_000).contains(&ms), "{told}");
    assert_eq!(Client::plain().send(Door::PlainHttp2, port, grpc(&[])).await.unwrap().text(), "none");
}

/// Who waits for no more than a moment gets no answer, and spoils nothing for the others.
#[tokio::test]
async fn callers_without_time_eject_nobody() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for name in ["a", "b", "c"] {
        let service = Service::start(Speaks::H2c(100), |_, _| async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            text(200, "done")
        })
        .await;
        cluster.add(&NodeSpec::named(name).serving(format!("web={},protocol=h2c", service.addr))).await.unwrap();
    }
    is_known(&cluster, "seed", "web", 3).await;
    let door = cluster.node("seed").outbound;
    for _ in 0..60 {
        let answer = Client::plain().send(Door::PlainHttp2, door, grpc(&[("grpc-timeout", "10m")])).await.unwrap();
        assert_eq!(answer.header("grpc-status"), "4", "{:?}", answer.headers);
    }
    let services: Vec<starling_protocol::admin::Service> = cluster.admin("seed", "/v1/services").await.unwrap();
    assert!(services[0].instances.iter().all(|instance| !instance.ejected), "{services:?}");
    // To others than gRPC's callers the field says nothing.
    let request = Request::get("http://web.mesh.internal/").header("grpc-timeout", "1n").body(Bytes::new()).unwrap();
    assert_eq!(Client::plain().send(Door::PlainHttp2, door, request).await.unwrap().status, 200);
}

/// A download that is read slowly, so that there is always something of it, has no more time than any other.
#[tokio::test]
async fn the_time_of_the_whole_holds_for_slow_readers() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let port = free_port();
    let mut cluster =
        near(&format!("[[upstream]]\nservice = \"web\"\nlisten = \"{port}\"\ntotal_timeout = \"2s\"\n")).await;
    let (_service, addr) = starling_tests::sample(cluster.dir(), "web").await;
    cluster.add(&NodeSpec::named("a").serving(format!("web={addr}"))).await.unwrap();
    is_known(&cluster, "near", "web", 1).await;
    let mut stream = tokio::net::TcpStream::connect(port).await.unwrap();
    stream.write_all(b"GET /bytes/1000000000 HTTP/1.1\r\nHost: web\r\n\r\n").await.unwrap();
    let (begun, mut buffer) = (Instant::now(), vec![0; 64 << 10]);
    while let Ok(1..) = stream.read(&mut buffer).await {
        assert!(begun.elapsed() < LIMIT, "it goes on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
}

/// Whoever waits for a connection to the service shares in it that there is none.
#[tokio::test]
async fn calls_do_not_stand_in_line_for_a_service_that_takes_no_connection() {
    // Its line for new connections is full: what comes beyond gets no answer at all.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let addr = socket.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_millis(500), tokio::net::TcpStream::connect(addr)).await
    {
        waiting.push(stream);
    }
    let mut cluster = Cluster::start(binary()).await.unwrap();
    cluster.add(&NodeSpec::named("a").serving(format!("web={addr},protocol=h2c"))).await.unwrap();
    is_known(&cluster, "seed", "web", 1).await;
    let (door, begun) = (cluster.node("seed").outbound, Instant::now());
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..30 {
        calls.spawn(async move { Client::plain().send(Door::PlainHttp2, door, grpc(&[])).await.unwrap() });
    }
    while let Some(answer) = calls.join_next().await {
        assert_eq!(answer.unwrap().header("grpc-status"), "14");
    }
    // Each with its attempts; one after the other they would take a minute and a half and more.
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
}

/// A stream of HTTP/2 that the service resets has not ended, whatever reason it names.
#[tokio::test]
async fn half_an_answer_over_http2_is_not_a_whole_one() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let whole = request.uri().path() == "/whole";
                    let mut body = respond.send_response(http::Response::new(()), false).unwrap();
                    body.send_data(Bytes::from_static(b"half"), whole).unwrap();
                    tokio::spawn(async move {
                        // Once the data is out.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        body.send_reset(h2::Reason::NO_ERROR);
                    });
                }
            });
        }
    });
    let mut cluster = Cluster::start(binary()).await.unwrap();
    cluster.add(&NodeSpec::named("a").serving(format!("web={addr},protocol=h2c"))).await.unwrap();
    is_known(&cluster, "seed", "web", 1).await;
    let door = cluster.node("seed").outbound;
    let ask = async |at, path: &str| {
        let request = Request::get(format!("http://web.mesh.internal{path}")).body(Bytes::new()).unwrap();
        Client::plain().send(at, door, request).await
    };
    for at in [Door::PlainHttp1, Door::PlainHttp2] {
        assert_eq!(ask(at, "/whole").await.unwrap().text(), "half", "{at:?}");
        let cut = ask(at, "/cut").await;
        assert!(cut.is_err(), "{at:?}: {cut:?}");
    }
}

/// That a request looks like gRPC is no reason to wait for ever for a service that cannot speak it.
#[tokio::test]
async fn a_content_type_lifts_no_limit() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            kept.push(stream);
        }
    });
    let mut cluster = Cluster::start(binary()).await.unwrap();
    cluster.add(&NodeSpec::named("a").serving(format!("web={addr}"))).await.unwrap();
    is_known(&cluster, "seed", "web", 1).await;
    let answer = Client::plain().send(Door::PlainHttp2, cluster.node("seed").outbound, grpc(&[])).await.unwrap();
    assert_eq!(answer.header("grpc-status"), "4", "{:?}", answer.headers);
}
