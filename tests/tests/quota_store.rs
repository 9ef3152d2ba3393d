//! Quotas that edges count together in a Redis, and what becomes of them when it is not there.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_protocol::admin::QuotaUse;
use starling_tests::{Front, away_from_the_hour, binary, is_known, listening, program, run, sample};

const HOST: &str = "api.example.com";
/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);
const EDGES: [&str; 2] = ["edge", "edge-2"];
const PASSWORD: &str = "correct horse";

/// A redis-server, which keeps nothing.
struct Redis {
    program: PathBuf,
    dir: PathBuf,
    addr: SocketAddr,
    /// Where else it listens, with TLS.
    tls: SocketAddr,
    process: Process,
}

impl Redis {
    /// `None` if it is missing.
    async fn start() -> Option<Self> {
        let program = program("redis-server")?;
        let dir = tempfile::tempdir().unwrap().keep();
        self_signed(&["localhost"], &dir.join("cert.pem"), &dir.join("key.pem")).unwrap();
        let listens @ [addr, tls] = [free_port(), free_port()];
        let process = Self::run(&program, &dir, listens).await;
        Some(Self { program, dir, addr, tls, process })
    }

    async fn run(program: &Path, dir: &Path, [addr, tls]: [SocketAddr; 2]) -> Process {
        let file = |name| dir.join(name).display().to_string();
        let config = format!(
            "bind 127.0.0.1\nport {}\nrequirepass \"{PASSWORD}\"\nsave \"\"\ndir {}\n\
             tls-port {}\ntls-cert-file {cert}\ntls-key-file {}\ntls-ca-cert-file {cert}\ntls-auth-clients no\n\
             user edges on >secret ~starling:* -@all +select +evalsha +script|load +get +set +type +del +expire +@hash\n",
            addr.port(),
            dir.display(),
            tls.port(),
            file("key.pem"),
            cert = file("cert.pem"),
        );
        std::fs::write(dir.join("redis.conf"), config).unwrap();
        let process = Process::start(program, [file("redis.conf")], &dir.join("redis.log")).unwrap();
        listening(addr).await;
        process
    }

    async fn kill(&mut self) {
        self.process.kill().await.unwrap();
    }

    async fn back(&mut self) {
        self.process = Self::run(&self.program, &self.dir, [self.addr, self.tls]).await;
    }

    fn says(&self, args: &[&str]) -> Option<String> {
        let (port, client) = (self.addr.port().to_string(), program("redis-cli")?);
        let all = [&["-p", &port, "--no-auth-warning", "-a", PASSWORD], args].concat();
        let (fine, out, err) = run(&client, &all);
        assert!(fine, "{err}");
        Some(out)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

struct Stage {
    cluster: Cluster,
    listen: Vec<SocketAddr>,
    cert: PathBuf,
    _service: Process,
}

impl Stage {
    /// With the password of the one user that there is without names.
    async fn set(redis: &Redis, password: &str, more: &str) -> Self {
        Self::set_at(&format!("redis://{}/0", redis.addr), password, more).await
    }

    async fn set_at(url: &str, password: &str, more: &str) -> Self {
        away_from_the_hour().await;
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let (service, addr) = sample(cluster.dir(), "orders").await;
        cluster.add(&NodeSpec::named("a").serving(format!("orders={addr}"))).await.unwrap();
        let file = cluster.dir().join("redis.password");
        std::fs::write(&file, format!("{password}\n")).unwrap();
        let rules = format!(
            r#"
[quota_store]
url = "{url}"
password_file = {file:?}
{more}
[[plan]]
name = "shared"
quota = "60/day"
[[plan]]
name = "looks"
quota = "1/day"
shadow = true
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
[[route]]
path = "/free"
service = "orders"
auth = []
"#
        );
        let (mut listen, mut cert) = (Vec::new(), PathBuf::new());
        for name in EDGES {
            let front = Front::new(cluster.dir(), HOST, "");
            cluster.add_edge(name, &(front.sections + &rules)).await.unwrap();
            listen.push(front.listen);
            cert = front.cert;
        }
        for name in EDGES {
            is_known(&cluster, name, "orders", 1).await;
        }
        Self { cluster, listen, cert, _service: service }
    }

    async fn ask(&self, edge: usize, door: Door, path: &str) -> Answer {
        let client = Client::trusting(&self.cert).unwrap();
        let request = Request::get(format!("https://{HOST}{path}")).body(Bytes::new()).unwrap();
        client.send(door, self.listen[edge], request).await.unwrap()
    }

    /// How many of so many calls pass, over all edges and protocols in turn.
    async fn passed(&self, calls: usize) -> u64 {
        let mut passed = 0;
        for (edge, door) in (0..EDGES.len()).cycle().zip(Door::PUBLIC.into_iter().cycle()).take(calls) {
            let answer = self.ask(edge, door, "/shared").await;
            assert!(matches!(answer.status, 200 | 429), "{answer:?}");
            passed += u64::from(answer.status == 200);
        }
        passed
    }

    async fn used(&self, edge: &str) -> u64 {
        let admin = format!("http://{}", self.cluster.node(edge).admin);
        let args = ["quota", "show", "--address=127.0.0.1", "-o", "json", "--admin", &admin];
        let quotas: Vec<QuotaUse> = serde_json::from_str(&self.cluster.run(&args).await.unwrap()).unwrap();
        quotas.iter().find(|quota| quota.plan == "shared").unwrap().used
    }

    /// What an edge holds in a lease counts until it has lain for some seconds.
    async fn all_tell(&self, used: u64) {
        wait_for("all edges tell the same", LIMIT, || async {
            let all = [self.used(EDGES[0]).await, self.used(EDGES[1]).await];
            (all == [used; 2]).then_some(()).ok_or(format!("{all:?}, not {used}"))
        })
        .await
        .unwrap();
    }

    async fn store_is(&self, silent: bool) {
        for edge in EDGES {
            wait_for("the store is noticed", LIMIT, || async {
                let admin = self.cluster.node(edge).admin;
                let metrics = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
                let line = format!("starling_quota_store_silent {}\n", u8::from(silent));
                metrics.contains(&line).then_some(()).ok_or_else(|| format!("{edge}: {metrics}"))
            })
            .await
            .unwrap();
        }
    }
}

#[tokio::test]
async fn edges_count_in_a_store_and_without_it_when_it_is_gone() {
    let Some(mut redis) = Redis::start().await else { return };
    let stage = Stage::set(&redis, PASSWORD, "").await;
    assert_eq!(stage.passed(30).await, 30);
    stage.all_tell(30).await;
    // It is there that it is counted, and under the edges' own names.
    if let Some(keys) = redis.says(&["KEYS", "*"]) {
        assert!(keys.contains("starling:quota:shared day address 127.0.0.1"), "{keys}");
        let ttl = redis.says(&["TTL", "starling:quota:shared day address 127.0.0.1"]).unwrap();
        assert!(ttl.trim().parse::<i64>().unwrap() > 60 * 24 * 60 * 60, "{ttl}");
        // What is no counter makes way for one, and harms nobody else's.
        const LOOKS: &str = "starling:quota:looks day address 127.0.0.1";
        redis.says(&["SET", LOOKS, "nonsense"]);
        wait_for("it is a counter", LIMIT, || async {
            assert_eq!(stage.ask(0, Door::Http2, "/looks").await.status, 200);
            let kind = redis.says(&["TYPE", LOOKS]).unwrap();
            (kind.trim() == "hash").then_some(()).ok_or(kind)
        })
        .await
        .unwrap();
        let log = stage.cluster.node("edge").process.log();
        assert!(!log.contains("does not answer"), "{log}");
    }
    // Gone: the edges count by themselves, from where it stood.
    redis.kill().await;
    assert_eq!(stage.passed(10).await, 10);
    stage.store_is(true).await;
    assert_eq!(stage.passed(6).await, 6);
    // Back, and it has forgotten everything: what edges know is known to it again, and nothing passes twice.
    redis.back().await;
    stage.store_is(false).await;
    assert_eq!(stage.passed(40).await, 14);
    stage.all_tell(60).await;
    // One that forgets while nobody looks is told again, too.
    if redis.says(&["FLUSHALL"]).is_some() {
        wait_for("it is told", LIMIT, || async {
            let known = redis.says(&["KEYS", "*"]).unwrap();
            known.contains("starling:quota:shared day address 127.0.0.1").then_some(()).ok_or(known)
        })
        .await
        .unwrap();
        stage.store_is(false).await;
        assert_eq!(stage.passed(20).await, 0);
    }
    assert_eq!(stage.ask(0, Door::Http3, "/free").await.status, 200);
}

#[tokio::test]
async fn without_its_store_nothing_passes_that_is_to_be_counted_there() {
    let Some(mut redis) = Redis::start().await else { return };
    let stage = Stage::set(&redis, PASSWORD, "on_store_down = \"deny\"").await;
    assert_eq!(stage.passed(12).await, 12);
    redis.process.signal("STOP").await.unwrap();
    // What is held in leases may pass yet; the rest waits a moment, and not for ever.
    let begun = Instant::now();
    while stage.ask(0, Door::Http2, "/shared").await.status != 503 {
        assert!(begun.elapsed() < LIMIT);
    }
    stage.store_is(true).await;
    for door in Door::PUBLIC {
        for edge in 0..EDGES.len() {
            let answer = stage.ask(edge, door, "/shared").await;
            assert_eq!((answer.status, answer.header("retry-after")), (503, "1"), "{door:?}: {}", answer.text());
            assert!(answer.text().contains("quota-unknown"), "{}", answer.text());
            // Plans that only look, and routes without one, are not held up.
            for path in ["/looks", "/free"] {
                assert_eq!(stage.ask(edge, door, path).await.status, 200, "{door:?} {path}");
            }
        }
    }
    redis.process.signal("CONT").await.unwrap();
    stage.store_is(false).await;
    assert!(stage.passed(60).await >= 40);
    redis.kill().await;
    redis.back().await;
    stage.store_is(false).await;
    assert_eq!(stage.passed(4).await, 0, "it knows what was counted before");
}

/// As a user of its own, who may do what the edges need and no more.
#[tokio::test]
async fn a_store_is_reached_over_tls() {
    let Some(redis) = Redis::start().await else { return };
    let url = format!("rediss://edges@localhost:{}/0", redis.tls.port());
    let ca = redis.dir.join("cert.pem");
    let stage = Stage::set_at(&url, "secret", &format!("ca = {ca:?}")).await;
    stage.store_is(false).await;
    assert_eq!(stage.passed(70).await, 60);
    stage.all_tell(60).await;
    if let Some(keys) = redis.says(&["KEYS", "*"]) {
        assert!(keys.contains("starling:quota:shared day address 127.0.0.1"), "{keys}");
    }
    let log = stage.cluster.node("edge").process.log();
    assert!(!log.contains("does not answer"), "{log}");
}

#[tokio::test]
async fn a_wrong_password_is_told_and_a_right_one_is_taken_without_a_restart() {
    let Some(redis) = Redis::start().await else { return };
    let stage = Stage::set(&redis, "battery staple", "").await;
    assert_eq!(stage.passed(10).await, 10);
    stage.store_is(true).await;
    let log = stage.cluster.node("edge").process.log();
    assert!(
        log.contains("the store of quotas does not answer") && log.contains("Password authentication failed"),
        "{log}"
    );
    std::fs::write(stage.cluster.dir().join("redis.password"), PASSWORD).unwrap();
    stage.store_is(false).await;
    assert_eq!(stage.passed(60).await, 50);
    let log = stage.cluster.node("edge").process.log();
    assert!(["battery staple", PASSWORD].iter().all(|password| !log.contains(password)), "{log}");
}

#[tokio::test]
async fn wrong_settings_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let Front { sections, .. } = Front::new(dir.path(), HOST, "");
    let file = dir.path().join("edge.toml");
    for (store, want) in [
        ("url = \"http://10.0.0.7\"", "is no URL of a store"),
        ("", "missing field `url`"),
        ("url = \"redis://a\"\non_store_down = \"allow\"", "expected `local` or `deny`"),
        ("url = \"redis://a\"\nprefix = \"a b\"", "is no prefix"),
        ("url = \"rediss://a\"\nca = \"/nowhere.pem\"", "quota_store.ca: /nowhere.pem"),
        ("url = \"redis://a\"\npassword_file = \"/nowhere\"", "quota_store.password_file: /nowhere: it cannot be read"),
    ] {
        let route = "[[route]]\nservice = \"s\"\nauth = []\n";
        std::fs::write(&file, format!("{sections}{route}[quota_store]\n{store}\n")).unwrap();
        let (fine, out, err) = run(binary(), &["check", &file.to_string_lossy()]);
        assert!(!fine && format!("{out}{err}").contains(want), "{store}: {out}{err}");
    }
}
