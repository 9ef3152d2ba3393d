//! Quotas by the day and longer: the same over every protocol, over whatever happens to the process, and over several edges.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, wait_for};
use starling_protocol::admin::QuotaUse;
use starling_tests::{
    Front, away_from_the_hour, binary, is_known, sample,
    service::{self, Service, Speaks},
};

const HOST: &str = "api.example.com";
/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);

struct Stage {
    cluster: Cluster,
    /// Of each edge.
    listen: Vec<SocketAddr>,
    cert: PathBuf,
    _service: Process,
}

impl Stage {
    async fn set() -> Self {
        Self::with_edges(&["edge"]).await
    }

    async fn with_edges(names: &[&str]) -> Self {
        away_from_the_hour().await;
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let (service, addr) = sample(cluster.dir(), "orders").await;
        cluster.add(&NodeSpec::named("a").serving(format!("orders={addr}"))).await.unwrap();
        let rules = r#"
[[plan]]
name = "free"
rate = "100/s"
burst = 1000
quota = ["10/day", "100/7d"]
[[plan]]
name = "public"
quota = "6/month"
time_zone = "Europe/Berlin"
[[plan]]
name = "shared"
quota = ["60/day", "1000/7d"]
[[plan]]
name = "looks"
quota = "1/day"
shadow = true
[[route]]
path = "/orders"
service = "orders"
auth = ["api-key"]
plan = "free"
[[route]]
path = "/orders/report"
service = "orders"
auth = ["api-key"]
plan = "free"
cost = 5
[[route]]
path = "/public"
service = "orders"
auth = []
plan = "public"
[[route]]
path = "/shared"
service = "orders"
auth = []
plan = "shared"
[[route]]
path = "/looks"
service = "orders"
auth = []
plan = "looks"
"#;
        let (mut listen, mut cert) = (Vec::new(), PathBuf::new());
        for name in names {
            let front = Front::new(cluster.dir(), HOST, "");
            cluster.add_edge(name, &(front.sections + rules)).await.unwrap();
            listen.push(front.listen);
            cert = front.cert;
        }
        for name in names {
            is_known(&cluster, name, "orders", 1).await;
        }
        Self { cluster, listen, cert, _service: service }
    }

    async fn key(&self, consumer: &str) -> String {
        self.run(&["keys", "create", "--consumer", consumer]).await.trim().to_owned()
    }

    async fn run(&self, args: &[&str]) -> String {
        self.run_at("edge", args).await
    }

    async fn run_at(&self, edge: &str, args: &[&str]) -> String {
        let admin = format!("http://{}", self.cluster.node(edge).admin);
        self.cluster.run(&[args, &["--admin", &admin]].concat()).await.unwrap()
    }

    async fn used(&self, consumer: &str, plan: &str, period: &str) -> u64 {
        let told = self.run(&["quota", "show", consumer, "-o", "json"]).await;
        let quotas: Vec<QuotaUse> = serde_json::from_str(&told).unwrap();
        quotas.iter().find(|quota| quota.plan == plan && quota.period == period).unwrap().used
    }

    async fn ask(&self, door: Door, path: &str, key: &str) -> Answer {
        self.ask_at(0, door, path, key).await
    }

    async fn ask_at(&self, edge: usize, door: Door, path: &str, key: &str) -> Answer {
        let client = Client::trusting(&self.cert).unwrap();
        let request = Request::get(format!("https://{HOST}{path}")).header("x-api-key", key);
        client.send(door, self.listen[edge], request.body(Bytes::new()).unwrap()).await.unwrap()
    }

    async fn restart(&mut self) {
        self.cluster.kill("edge").await.unwrap();
        self.cluster.restart("edge").await.unwrap();
        is_known(&self.cluster, "edge", "orders", 1).await;
    }
}

#[tokio::test]
async fn a_quota_holds_over_every_protocol_and_says_how_it_stands() {
    let stage = Stage::set().await;
    let key = stage.key("alice").await;
    // One that costs five, and five that cost one, over all of them in turn.
    assert_eq!(stage.ask(Door::Http2, "/orders/report", &key).await.status, 200);
    for (nth, door) in Door::PUBLIC.into_iter().cycle().take(5).enumerate() {
        let answer = stage.ask(door, "/orders", &key).await;
        let left = answer.header("ratelimit").split("\"free-day\";r=").nth(1).unwrap_or_default().split(';').next();
        assert_eq!((answer.status, left), (200, Some((4 - nth).to_string().as_str())), "{door:?} {answer:?}");
        let policies = "\"free\";q=1000;w=10, \"free-day\";q=10;w=86400, \"free-7d\";q=100;w=604800";
        assert_eq!(answer.header("ratelimit-policy"), policies);
    }
    for door in Door::PUBLIC {
        let answer = stage.ask(door, "/orders", &key).await;
        assert_eq!((answer.status, answer.header("content-type")), (429, "application/problem+json"), "{door:?}");
        let problem: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(problem["violated-policies"], serde_json::json!(["free-day"]), "{problem}");
        let until: u64 = answer.header("retry-after").parse().unwrap();
        assert!((1..=86_461).contains(&until), "{until}");
    }
    // Others have their own, and what was refused took nothing of the longer one.
    assert_eq!(stage.ask(Door::Http1, "/orders", &stage.key("bob").await).await.status, 200);
    assert_eq!(stage.used("alice", "free", "7d").await, 10);
    // Callers without a name are their addresses.
    for door in Door::PUBLIC.into_iter().cycle().take(6) {
        assert_eq!(stage.ask(door, "/public", "").await.status, 200);
    }
    assert_eq!(stage.ask(Door::Http3, "/public", "").await.status, 429);
    assert_eq!(stage.used("--address=127.0.0.1", "public", "month").await, 6);
    // One that only counts.
    for door in Door::PUBLIC {
        assert_eq!(stage.ask(door, "/looks", "").await.status, 200);
    }
    stage.run(&["quota", "reset", "alice"]).await;
    assert_eq!(stage.used("alice", "free", "day").await, 0);
    assert_eq!(stage.ask(Door::Http3, "/orders", &key).await.status, 200);
    assert!(stage.run(&["quota", "show", "alice"]).await.contains("RESETS IN"));
}

#[tokio::test]
async fn counts_survive_kills_upgrades_and_a_damaged_file() {
    let mut stage = Stage::set().await;
    let key = stage.key("alice").await;
    let take = async |stage: &Stage, count: usize| {
        for door in Door::PUBLIC.into_iter().cycle().take(count) {
            assert_eq!(stage.ask(door, "/orders", &key).await.status, 200, "{door:?}");
        }
    };
    take(&stage, 4).await;
    wait_for("they are on disk", LIMIT, || async {
        let admin = stage.cluster.node("edge").admin;
        let metrics = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
        metrics.contains("starling_quota_unsaved 0\n").then_some(()).ok_or(metrics)
    })
    .await
    .unwrap();
    stage.restart().await;
    assert_eq!(stage.used("alice", "free", "day").await, 4);
    take(&stage, 2).await;
    // The new process gets what the old one had counted to the last call.
    let mut old = stage.cluster.take_over("edge").await.unwrap();
    take(&stage, 2).await;
    assert!(old.wait(LIMIT).await.unwrap().success());
    wait_for("it has what the old one had counted", LIMIT, || async {
        let used = stage.used("alice", "free", "day").await;
        (used == 8).then_some(()).ok_or_else(|| used.to_string())
    })
    .await
    .unwrap();
    take(&stage, 2).await;
    assert_eq!(stage.ask(Door::Http2, "/orders", &key).await.status, 429);
    assert_eq!(stage.used("alice", "free", "day").await, 10);
    // A process that ends in order loses nothing either.
    stage.cluster.terminate("edge").await.unwrap();
    stage.cluster.restart("edge").await.unwrap();
    is_known(&stage.cluster, "edge", "orders", 1).await;
    assert_eq!(stage.used("alice", "free", "day").await, 10);

    // Half a file is worth an error in the log, and no more than what was counted.
    stage.cluster.kill("edge").await.unwrap();
    let file = stage.cluster.node("edge").state.join("quota.redb");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 3]).unwrap();
    stage.cluster.restart("edge").await.unwrap();
    is_known(&stage.cluster, "edge", "orders", 1).await;
    assert_eq!(stage.ask(Door::Http1, "/orders", &key).await.status, 200);
    assert!(stage.cluster.node("edge").process.log().contains("the counts of quotas are damaged"));
    assert!(file.with_extension("redb.damaged").exists());
}

#[tokio::test]
async fn several_edges_let_pass_what_one_would() {
    const EDGES: [&str; 3] = ["edge", "edge-2", "edge-3"];
    let mut stage = Stage::with_edges(&EDGES).await;
    // What an edge holds in a lease counts until it has lain for some seconds.
    let all_tell = async |stage: &Stage, day: u64, week: u64| {
        wait_for("all edges tell the same", LIMIT, || async {
            let mut all = Vec::new();
            for edge in EDGES {
                let told = stage.run_at(edge, &["quota", "show", "--address=127.0.0.1", "-o", "json"]).await;
                let quotas: Vec<QuotaUse> = serde_json::from_str(&told).unwrap();
                all.extend(quotas.iter().filter(|q| q.plan == "shared").map(|q| q.used));
            }
            (all == [day, week].repeat(EDGES.len())).then_some(()).ok_or(format!("{all:?}"))
        })
        .await
        .unwrap();
    };
    let passed = async |stage: &Stage, edges: &[usize], calls: usize| {
        let mut passed = 0;
        for (edge, door) in edges.iter().cycle().zip(Door::PUBLIC.into_iter().cycle().skip(1)).take(calls) {
            let answer = stage.ask_at(*edge, door, "/shared", "").await;
            assert!(matches!(answer.status, 200 | 429), "{answer:?}");
            assert!(answer.header("ratelimit").contains("\"shared-7d\";r="), "{answer:?}");
            passed += u64::from(answer.status == 200);
        }
        passed
    };
    assert_eq!(passed(&stage, &[0, 1, 2], 45).await, 45);
    all_tell(&stage, 45, 45).await;
    // One dies without a word. The others know what it has let through, and go on.
    let dies = "edge-2";
    // A second is what may be lost with it.
    tokio::time::sleep(Duration::from_secs(2)).await;
    stage.cluster.kill(dies).await.unwrap();
    assert_eq!(passed(&stage, &[0, 2], 10).await, 10);
    // It comes again, and knows what the others have let through meanwhile.
    stage.cluster.restart(dies).await.unwrap();
    is_known(&stage.cluster, dies, "orders", 1).await;
    all_tell(&stage, 55, 55).await;
    assert_eq!(passed(&stage, &[1, 0, 2], 20).await, 5);
    // What the day forbids takes nothing of the week.
    all_tell(&stage, 60, 60).await;
    // Whoever resets it does so for all.
    stage.run_at("edge-3", &["quota", "reset", "--address=127.0.0.1"]).await;
    all_tell(&stage, 0, 0).await;
    assert_eq!(passed(&stage, &[0, 1, 2], 3).await, 3);
}

/// Where a service says what a call has cost, that is what it costs.
#[tokio::test]
async fn a_service_says_what_a_call_has_cost() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let service = Service::start(Speaks::Http1, |request, _| async move {
        let mut answer = service::text(200, "");
        let cost = request.uri().path().trim_start_matches("/priced/").parse().unwrap();
        answer.headers_mut().insert("x-cost", cost);
        answer
    })
    .await;
    cluster.add(&NodeSpec::named("a").serving(format!("priced={}", service.addr))).await.unwrap();
    let Front { listen, cert, sections } = Front::new(cluster.dir(), HOST, "");
    let rules = r#"
[[plan]]
name = "priced"
rate = "1/h"
burst = 1000
quota = "100/7d"
[[route]]
path = "/priced"
service = "priced"
auth = []
plan = "priced"
cost_from = "x-cost"
"#;
    cluster.add_edge("edge", &(sections + rules)).await.unwrap();
    is_known(&cluster, "edge", "priced", 1).await;
    let ask = async |door: Door, cost: &str| {
        let client = Client::trusting(&cert).unwrap();
        let request = Request::get(format!("https://{HOST}/priced/{cost}")).body(Bytes::new()).unwrap();
        client.send(door, listen, request).await.unwrap()
    };
    let mut left = [1000, 100];
    for door in Door::PUBLIC {
        // What makes no sense costs what it would without.
        for (cost, takes) in [("9", 9), ("0", 1), ("nonsense", 1), ("-5", 1), ("18", 18)] {
            left = left.map(|left| left - takes);
            let answer = ask(door, cost).await;
            let told = answer.header("ratelimit");
            assert_eq!((answer.status, answer.header("x-cost")), (200, ""), "{door:?} {cost}");
            let want = [format!("\"priced\";r={};", left[0]), format!("\"priced-7d\";r={};", left[1])];
            assert!(want.iter().all(|want| told.contains(want)), "{door:?} {cost}: {told}, not {left:?}");
        }
    }
    // The last call may cost more than there is; the next one may not.
    assert_eq!(ask(Door::Http2, "4294967295").await.status, 200);
    for door in Door::PUBLIC {
        let answer = ask(door, "1").await;
        assert_eq!(answer.status, 429, "{door:?}");
        assert!(answer.text().contains("[\"priced\",\"priced-7d\"]"), "{}", answer.text());
    }
}
