//! Tokens of an issuer whose keys the edge fetches: nginx has them, a library from PyPI makes them.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_tests::{Front, binary, client_script, is_known, nginx_at, python, run, sample};
use tokio::task::JoinSet;

/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);
const HOST: &str = "api.example.com";

/// Who signs tokens, and publishes the keys.
struct Issuer {
    python: PathBuf,
    dir: PathBuf,
    addr: SocketAddr,
    server: Process,
}

impl Issuer {
    /// `None` if a part is missing.
    async fn start(dir: &Path) -> Option<Self> {
        let (python, dir, addr) = (python()?, dir.join("issuer"), free_port());
        std::fs::create_dir(&dir).unwrap();
        self_signed(&["localhost"], &dir.join("issuer.pem"), &dir.join("issuer.key")).unwrap();
        let server = serve(&dir, addr).await?;
        Some(Self { python, dir, addr, server })
    }

    /// Makes a key; its public part.
    fn key(&self, id: &str, algorithm: &str) -> String {
        let (script, file) = (client_script("tokens.py"), self.dir.join(id).display().to_string());
        let (made, out, err) = run(&self.python, &[&script, "key", id, algorithm, &file]);
        assert!(made, "{err}");
        out.trim().to_owned()
    }

    fn publish(&self, keys: &[&str]) {
        self.publish_as_it_is(&format!("{{\"keys\": [{}]}}", keys.join(",")));
    }

    fn publish_as_it_is(&self, text: &str) {
        let file = self.dir.join("new");
        std::fs::write(&file, text).unwrap();
        std::fs::rename(file, self.dir.join("jwks.json")).unwrap();
    }

    /// A token that is good for some minutes.
    fn token(&self, key: &str, subject: &str) -> String {
        self.token_that_says(key, serde_json::json!({"sub": subject}))
    }

    /// The same with more claims.
    fn token_that_says(&self, key: &str, more: serde_json::Value) -> String {
        let until = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 600;
        let mut claims = serde_json::json!({"iss": "https://id.example.com/", "aud": "api", "exp": until});
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (script, file) = (client_script("tokens.py"), self.dir.join(key).display().to_string());
        let (signed, out, err) = run(&self.python, &[&script, "sign", &file, &claims.to_string()]);
        assert!(signed, "{err}");
        out.trim().to_owned()
    }

    /// How often it was asked.
    fn asked(&self) -> usize {
        std::fs::read_to_string(self.dir.join("access.log")).unwrap_or_default().lines().count()
    }

    async fn back(&mut self) {
        self.server = serve(&self.dir, self.addr).await.unwrap();
    }
}

/// nginx with what is in a directory, over TLS.
async fn serve(dir: &Path, addr: SocketAddr) -> Option<Process> {
    let own = dir.display();
    let tls = format!("ssl_certificate {own}/issuer.pem; ssl_certificate_key {own}/issuer.key");
    nginx_at(dir, addr, &format!("listen {addr} ssl; {tls}; root {own};")).await
}

/// An edge that takes such tokens.
struct Stage {
    cluster: Cluster,
    issuer: Issuer,
    listen: SocketAddr,
    cert: PathBuf,
    _services: [Process; 2],
}

impl Stage {
    /// `publish` makes the first keys.
    async fn set(publish: impl FnOnce(&Issuer)) -> Option<Self> {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let issuer = Issuer::start(cluster.dir()).await?;
        publish(&issuer);
        let (service, addr) = sample(cluster.dir(), "orders").await;
        cluster.add(&NodeSpec::named("a").serving(format!("orders={addr}"))).await.unwrap();
        let told = free_port();
        // It answers with what it was told of a token.
        let answer = "$http_starling_consumer tenant=$http_x_tenant roles=$http_x_roles absent=$http_x_absent";
        let server = format!("listen {told}; location / {{ return 200 \"{answer}\"; }}");
        let telling = nginx_at(&cluster.dir().join("told"), told, &server).await?;
        cluster.add(&NodeSpec::named("b").serving(format!("told={told}"))).await.unwrap();
        let Front { listen, cert, sections } = Front::new(cluster.dir(), HOST, "");
        let rules = format!(
            r#"
[[route]]
service = "orders"
auth = ["jwt"]
[[route]]
path = "/told"
service = "told"
auth = ["jwt"]
scopes = ["orders:read", "orders:write"]
claims = {{ tenant = ["acme", "umbrella"], "realm.roles" = "admin" }}
claim_headers = {{ x-tenant = "tenant", x-roles = "realm.roles", x-absent = "absent" }}
[jwt]
issuer = "https://id.example.com/"
audience = ["api"]
jwks = "https://localhost:{port}/jwks.json"
ca = {ca:?}
algorithms = ["ES256", "RS256", "EdDSA"]
"#,
            port = issuer.addr.port(),
            ca = issuer.dir.join("issuer.pem"),
        );
        cluster.add_edge("edge", &(sections + &rules)).await.unwrap();
        is_known(&cluster, "edge", "orders", 1).await;
        Some(Self { cluster, issuer, listen, cert, _services: [service, telling] })
    }

    async fn ask(&self, door: Door, token: &str) -> Answer {
        self.ask_for(door, "/", token).await
    }

    async fn ask_for(&self, door: Door, path: &str, token: &str) -> Answer {
        let client = Client::trusting(&self.cert).unwrap();
        let request = Request::get(format!("https://{HOST}{path}"))
            .header("authorization", format!("Bearer {token}"))
            .header("x-absent", "what a client says");
        client.send(door, self.listen, request.body(Bytes::new()).unwrap()).await.unwrap()
    }

    /// Asks with each token over each protocol, all at once.
    async fn ask_all(&self, tokens: &[String]) -> Vec<Answer> {
        let client = Client::trusting(&self.cert).unwrap();
        let mut asking = JoinSet::new();
        for door in Door::PUBLIC {
            for token in tokens {
                let (client, listen) = (client.clone(), self.listen);
                let request =
                    Request::get(format!("https://{HOST}/")).header("authorization", format!("Bearer {token}"));
                let request = request.body(Bytes::new()).unwrap();
                asking.spawn(async move { client.send(door, listen, request).await.unwrap() });
            }
        }
        asking.join_all().await
    }

    /// What the edge says to a token, which has to be the same over every protocol.
    async fn says(&self, token: &str) -> u16 {
        let mut said = Vec::new();
        for door in Door::PUBLIC {
            said.push(self.ask(door, token).await.status);
        }
        assert!(said.iter().all(|status| *status == said[0]), "{said:?}");
        said[0]
    }

    async fn metric(&self, name: &str) -> Option<f64> {
        let admin = self.cluster.node("edge").admin;
        let text = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }
}

#[tokio::test]
async fn keys_are_fetched_and_rotated_while_requests_run() {
    let Some(stage) = Stage::set(|issuer| issuer.publish(&[&issuer.key("one", "ES256")])).await else { return };
    let issuer = &stage.issuer;
    // From the first request on.
    let first = issuer.token("one", "alice");
    assert_eq!(stage.says(&first).await, 200);
    assert!(stage.metric("starling_jwks_age_seconds").await.is_some_and(|age| age < 60.0));

    // The issuer publishes new keys, and signs with them at once: nobody is turned away, and it is asked once for all of them.
    let (two, three) = (issuer.key("two", "RS256"), issuer.key("three", "EdDSA"));
    issuer.publish(&["{\"kty\": \"unheard of\"}", &two, &three]);
    let before = issuer.asked();
    let tokens = [issuer.token("two", "bob"), issuer.token("three", "carol")];
    for answer in stage.ask_all(&tokens).await {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert!(issuer.asked() - before <= 2, "asked {} times", issuer.asked() - before);
    // What the old key has signed is good no more, though it was.
    assert_eq!(stage.says(&first).await, 401);
}

#[tokio::test]
async fn an_issuer_that_is_down_or_out_of_its_mind_changes_nothing() {
    let Some(mut stage) = Stage::set(|issuer| issuer.publish(&[&issuer.key("one", "ES256")])).await else { return };
    let good = stage.issuer.token("one", "alice");
    assert_eq!(stage.says(&good).await, 200);
    stage.issuer.key("other", "ES256");
    let other = stage.issuer.token("other", "mallory");
    let failures = async |stage: &Stage, at_least: f64| {
        wait_for("it is noticed", LIMIT, || async {
            // A token of a key that is not known makes it look.
            assert_eq!(stage.ask(Door::Http2, &other).await.status, 401);
            let failures = stage.metric("starling_jwks_failures ").await.unwrap_or_default();
            (failures >= at_least).then_some(()).ok_or_else(|| failures.to_string())
        })
        .await
        .unwrap();
    };
    let huge = format!("{{\"keys\": [\"{}\"]}}", "x".repeat(1 << 20));
    for nonsense in ["<html>", "{\"keys\": []}", &huge] {
        stage.issuer.publish_as_it_is(nonsense);
        let before = stage.metric("starling_jwks_failures ").await.unwrap_or_default();
        failures(&stage, before + 1.0).await;
        assert_eq!(stage.says(&good).await, 200);
    }
    // Also over a restart of the edge, while nobody is there to be asked.
    stage.issuer.server.kill().await.unwrap();
    stage.cluster.kill("edge").await.unwrap();
    stage.cluster.restart("edge").await.unwrap();
    is_known(&stage.cluster, "edge", "orders", 1).await;
    assert_eq!(stage.says(&good).await, 200);
    failures(&stage, 1.0).await;
    // One that takes connections, and never answers, holds up those alone whose key is not known.
    stage.issuer.back().await;
    stage.issuer.server.signal("STOP").await.unwrap();
    let before = stage.metric("starling_jwks_failures ").await.unwrap_or_default();
    failures(&stage, before + 1.0).await;
    assert_eq!(stage.says(&good).await, 200);
    stage.issuer.server.signal("CONT").await.unwrap();
}

#[tokio::test]
async fn whoever_makes_up_keys_does_not_have_the_issuer_asked_each_time() {
    let Some(stage) = Stage::set(|issuer| issuer.publish(&[&issuer.key("one", "ES256")])).await else { return };
    let (issuer, begun) = (&stage.issuer, std::time::Instant::now());
    let made_up: Vec<String> = (0..8).map(|n| format!("made-up-{n}")).collect();
    for key in &made_up {
        issuer.key(key, "ES256");
    }
    let tokens: Vec<String> = made_up.iter().map(|key| issuer.token(key, "mallory")).collect();
    let good = issuer.token("one", "alice");
    assert_eq!(stage.says(&good).await, 200);
    let before = issuer.asked();
    let asked = std::time::Instant::now();
    for _ in 0..3 {
        for answer in stage.ask_all(&tokens).await {
            assert!([401, 429].contains(&answer.status), "{}", answer.text());
            assert!(answer.status == 429 || answer.header("www-authenticate").contains("invalid_token"));
        }
    }
    // One every three seconds, and one that may be due by itself each minute.
    let most = asked.elapsed().as_secs() / 3 + begun.elapsed().as_secs() / 60 + 2;
    let times = issuer.asked() - before;
    assert!(times as u64 <= most, "asked {times} times in {:?}", asked.elapsed());
    // Who comes from the same address with what was good before is none of them.
    assert_eq!(stage.says(&good).await, 200);
}

#[tokio::test]
async fn a_route_may_ask_for_scopes_and_claims_and_tell_the_service() {
    let Some(stage) = Stage::set(|issuer| issuer.publish(&[&issuer.key("one", "ES256")])).await else { return };
    let says = |scope: &str, tenant: &str, roles: &[&str]| {
        let realm = serde_json::json!({"roles": roles});
        let claims = serde_json::json!({"sub": "alice", "scope": scope, "tenant": tenant, "realm": realm});
        stage.issuer.token_that_says("one", claims)
    };
    let good = says("orders:write other orders:read", "acme", &["reader", "admin"]);
    let poor = says("orders:read", "acme", &["admin"]);
    let strangers =
        [says("orders:read orders:write", "evil", &["admin"]), says("orders:read orders:write", "acme", &[])];
    for door in Door::PUBLIC {
        let answer = stage.ask_for(door, "/told", &good).await;
        let told = "jwt:alice tenant=acme roles=reader,admin absent=";
        assert_eq!((answer.status, answer.text().as_str()), (200, told), "{door:?}");
        let answer = stage.ask_for(door, "/told", &poor).await;
        let challenge = "Bearer error=\"insufficient_scope\", scope=\"orders:read orders:write\"";
        assert_eq!((answer.status, answer.header("www-authenticate")), (403, challenge), "{door:?}");
        for stranger in &strangers {
            let answer = stage.ask_for(door, "/told", stranger).await;
            assert_eq!((answer.status, answer.header("content-type")), (403, "application/problem+json"), "{door:?}");
            assert_eq!(stage.ask(door, stranger).await.status, 200, "another route asks for less");
        }
    }
}
