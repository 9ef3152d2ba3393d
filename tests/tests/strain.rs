//! An edge that has not what more requests would take: it refuses them, over every protocol, says so once, and takes them again.

use std::{net::SocketAddr, sync::Mutex, time::Duration};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, wait_for};
use starling_tests::{
    Front, binary, is_known, memory_kib, program, run,
    service::{Service, Speaks, text},
};

/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);
const HOST: &str = "api.example.com";
/// More than an edge takes.
const PLENTY: &str = "memory = \"64GiB\"";

struct Stage {
    cluster: Cluster,
    client: Client,
    listen: SocketAddr,
    _orders: Service,
}

impl Stage {
    async fn set() -> Self {
        Self::set_with(PLENTY).await
    }

    /// With that in `[edge]`.
    async fn set_with(settings: &str) -> Self {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let orders = Service::start(Speaks::Http1, |_, _| async { text(200, "done") }).await;
        cluster.add(&NodeSpec::named("a").serving(format!("orders={}", orders.addr))).await.unwrap();
        let Front { listen, cert, sections } = Front::new(cluster.dir(), HOST, settings);
        cluster.add_edge("edge", &(sections + "[[route]]\nservice = \"orders\"\nauth = []\n")).await.unwrap();
        is_known(&cluster, "edge", "orders", 1).await;
        Self { client: Client::trusting(&cert).unwrap(), cluster, listen, _orders: orders }
    }

    /// Over a connection of its own.
    async fn ask(&self, door: Door) -> anyhow::Result<Answer> {
        let request = Request::get(format!("https://{HOST}/")).body(Bytes::new()).unwrap();
        self.client.send(door, self.listen, request).await
    }

    async fn answers(&self, door: Door, status: u16) -> Answer {
        let last = Mutex::default();
        wait_for(&format!("{status} over {door:?}"), LIMIT, || async {
            let answer = self.ask(door).await.map_err(|e| format!("{e:#}"))?;
            let is = answer.status;
            *last.lock().unwrap() = Some(answer);
            if is == status { Ok(()) } else { Err(is.to_string()) }
        })
        .await
        .unwrap_or_else(|e| panic!("{e:#} {}", self.log()));
        last.into_inner().unwrap().unwrap()
    }

    /// What the process has, in KiB.
    fn has(&self) -> u64 {
        memory_kib(&self.cluster.node("edge").process, "VmRSS:")
    }

    /// Lets it have so much.
    fn allow(&self, kib: u64) {
        let file = self.cluster.dir().join("edge.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        let line = text.lines().find(|line| line.starts_with("memory = ")).unwrap();
        std::fs::write(&file, text.replace(line, &format!("memory = \"{kib}KiB\""))).unwrap();
    }

    fn log(&self) -> String {
        self.cluster.node("edge").process.log()
    }

    async fn metric(&self, of: &str) -> String {
        let admin = self.cluster.node("edge").admin;
        let answer = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
        let line = answer
            .lines()
            .find(|line| line.starts_with("starling_edge_refuses") && line.contains(&format!("short_of=\"{of}\"")));
        line.unwrap_or_else(|| panic!("{answer}")).rsplit_once(' ').unwrap().1.to_owned()
    }
}

fn is_a_refusal(answer: &Answer, why: &str) {
    assert_eq!(answer.header("retry-after"), "2");
    assert_eq!(answer.header("content-type"), "application/problem+json");
    assert!(answer.text().contains(why), "{}", answer.text());
}

#[tokio::test]
async fn without_memory_requests_are_refused_and_then_connections() {
    let stage = Stage::set().await;
    for door in Door::PUBLIC {
        stage.answers(door, 200).await;
    }
    assert_eq!(stage.metric("memory").await, "0");
    // What it has is nine tenths and a bit of what it may have.
    stage.allow(stage.has() * 100 / 92);
    for door in Door::PUBLIC {
        is_a_refusal(&stage.answers(door, 503).await, "no memory");
    }
    assert_eq!(stage.metric("memory").await, "1");
    // Less than it has.
    stage.allow(stage.has() * 9 / 10);
    for door in Door::PUBLIC {
        wait_for(&format!("nobody gets in over {door:?}"), LIMIT, || async {
            match stage.ask(door).await {
                Ok(answer) => Err(answer.status.to_string()),
                Err(_) => Ok(()),
            }
        })
        .await
        .unwrap();
    }
    stage.allow(stage.has() * 4);
    for door in Door::PUBLIC {
        stage.answers(door, 200).await;
    }
    assert_eq!(stage.metric("memory").await, "0");
    let log = stage.log();
    assert_eq!(log.matches("short of memory").count(), 1, "{log}");
    assert_eq!(log.matches("there is memory again").count(), 1, "{log}");
}

/// Connections that say nothing take memory until nobody else is let in, and give it back.
#[tokio::test]
async fn what_clients_take_comes_back_when_they_go() {
    let stage = Stage::set().await;
    stage.answers(Door::Http2, 200).await;
    stage.allow(stage.has() * 100 / 90 + (24 << 10));
    let mut held = Vec::new();
    while stage.ask(Door::Http2).await.is_ok_and(|answer| answer.status == 200) {
        assert!(held.len() < 2400, "{} KiB with {} connections", stage.has(), held.len());
        for _ in 0..20 {
            // The last ones may be refused.
            held.extend(stage.client.connect_tls(stage.listen, HOST, b"h2").await);
        }
    }
    let most = held.len();
    drop(held);
    for door in Door::PUBLIC {
        stage.answers(door, 200).await;
    }
    assert!(stage.log().contains("there is memory again"), "{most} connections: {}", stage.log());
}

/// A process that gets a twentieth of the time that it would take.
#[tokio::test]
async fn a_worker_that_is_behind_refuses_requests_until_it_has_caught_up() {
    let stage = Stage::set().await;
    stage.answers(Door::Http1, 200).await;
    let starve = async {
        loop {
            stage.cluster.node("edge").process.signal("STOP").await.unwrap();
            tokio::time::sleep(Duration::from_millis(1300)).await;
            stage.cluster.node("edge").process.signal("CONT").await.unwrap();
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    };
    let refused = async {
        wait_for("it says so", LIMIT, || async {
            if stage.log().contains("behind with its work") { Ok(()) } else { Err(stage.log()) }
        })
        .await
        .unwrap();
        for door in Door::PUBLIC {
            is_a_refusal(&stage.answers(door, 503).await, "answered in time");
        }
    };
    tokio::select! {
        () = refused => {}
        () = starve => unreachable!("it does not end"),
    }
    stage.cluster.node("edge").process.signal("CONT").await.unwrap();
    for door in Door::PUBLIC {
        stage.answers(door, 200).await;
    }
    // Each worker says so for itself, once.
    let log = stage.log();
    let who = |what| {
        let lines = log.lines().filter(move |line| line.contains(what));
        let workers = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["worker"].to_string());
        workers.collect::<Vec<_>>()
    };
    let (mut behind, mut back) = (who("behind with its work"), who("new requests are taken again"));
    behind.sort();
    back.sort();
    assert!(!behind.is_empty() && behind.windows(2).all(|two| two[0] != two[1]), "{log}");
    assert_eq!(behind, back, "{log}");
}

// curl is waited for, and the service runs here.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_begins_so_many_handshakes() {
    let stage = Stage::set_with("handshakes = \"6/h\"").await;
    for nth in 0..3 {
        for door in [Door::Http1, Door::Http2] {
            assert!(stage.ask(door).await.is_ok_and(|answer| answer.status == 200), "{nth} {door:?} {}", stage.log());
        }
    }
    for door in [Door::Http1, Door::Http2] {
        assert!(stage.ask(door).await.is_err(), "{door:?}");
    }
    // Over QUIC an address is not proven at first: it is asked to prove itself when so many have come in its name.
    for nth in 0..6 {
        assert!(stage.ask(Door::Http3).await.is_ok_and(|answer| answer.status == 200), "{nth} {}", stage.log());
    }
    let error = stage.ask(Door::Http3).await.unwrap_err();
    assert!(format!("{error:#}").contains("refused"), "{error:#}");
    assert_eq!(stage.log().matches("begins more connections than it may").count(), 1, "{}", stage.log());
    // Another address is another client.
    let Some(curl) = program("curl") else { return };
    let resolve = format!("{HOST}:{}:{}", stage.listen.port(), stage.listen.ip());
    let url = format!("https://{HOST}:{}/", stage.listen.port());
    for version in ["--http1.1", "--http2"] {
        let args = ["-ks", version, "--interface", "127.0.0.2", "--resolve", &resolve, &url];
        assert_eq!(run(&curl, &args), (true, "done".into(), String::new()), "{version}");
    }
}
