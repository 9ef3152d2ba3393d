//! A service of the mesh that decides whether requests may pass, over every protocol.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Uri};
use http_body_util::BodyExt;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, wait_for};
use starling_protocol::admin::QuotaUse;
use starling_tests::{
    Front, binary, is_known,
    service::{self, Service, Speaks, text},
};

/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);
const HOST: &str = "api.example.com";

/// What the gatekeeper was asked.
struct Question {
    method: Method,
    uri: Uri,
    fields: HeaderMap,
    body: usize,
}

struct Stage {
    cluster: Cluster,
    questions: Arc<Mutex<Vec<Question>>>,
    gatekeeper: Service,
    listen: SocketAddr,
    cert: PathBuf,
    _orders: Service,
}

/// Decides by a cookie.
async fn gatekeeper(questions: Arc<Mutex<Vec<Question>>>) -> Service {
    Service::start(Speaks::Http1, move |request, open| {
        let questions = questions.clone();
        async move {
            let (head, body) = request.into_parts();
            let cookie = head.headers.get("cookie").map_or("", |v| v.to_str().unwrap()).to_owned();
            let body = body.collect().await.unwrap().to_bytes().len();
            questions.lock().unwrap().push(Question { method: head.method, uri: head.uri, fields: head.headers, body });
            let mut answer = match cookie.as_str() {
                "alice" => text(200, "welcome"),
                "nobody" => text(204, ""),
                "wordy" => text(200, vec![b'x'; 1 << 20]),
                "login" => text(302, ""),
                "bad" => text(403, "not you"),
                "broken" => text(500, "stack trace"),
                "endless" => text(403, vec![b'x'; 1 << 20]),
                "silent" => std::future::pending().await,
                "trickling" => return service::watch(open),
                "misnamed" => text(200, ""),
                _ => text(401, "who are you?"),
            };
            let fields = answer.headers_mut();
            match cookie.as_str() {
                "alice" => {
                    fields.insert("x-user", "alice".parse().unwrap());
                    fields.append("x-role", "admin".parse().unwrap());
                    fields.append("x-role", "staff".parse().unwrap());
                    fields.insert("x-secret", "of the gatekeeper".parse().unwrap());
                }
                "misnamed" => drop(fields.insert("x-user", "a b".parse().unwrap())),
                "login" => {
                    fields.insert("location", "https://id.example.com/login".parse().unwrap());
                    fields.insert("set-cookie", "state=1".parse().unwrap());
                }
                "" => drop(fields.insert("www-authenticate", "Cookie realm=\"orders\"".parse().unwrap())),
                _ => {}
            }
            answer
        }
    })
    .await
}

impl Stage {
    async fn set() -> Self {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let questions: Arc<Mutex<Vec<Question>>> = Arc::default();
        let gatekeeper = gatekeeper(questions.clone()).await;
        let orders = Service::start(Speaks::Http1, |request, _| async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let all = |name: &str| {
                let values = head.headers.get_all(name).iter().map(|v| v.to_str().unwrap());
                values.collect::<Vec<_>>().join("+")
            };
            let told = ["x-user", "x-role", "x-secret", "starling-consumer", "x-forwarded-uri"].map(all).join("|");
            text(200, format!("{told} {}", String::from_utf8_lossy(&body)))
        })
        .await;
        cluster.add(&NodeSpec::named("a").serving(format!("gatekeeper={}", gatekeeper.addr))).await.unwrap();
        cluster.add(&NodeSpec::named("b").serving(format!("orders={}", orders.addr))).await.unwrap();
        let Front { listen, cert, sections } = Front::new(cluster.dir(), HOST, "");
        let rules = r#"
[[route]]
service = "orders"
auth = []
plan = "few"
forward = { service = "gatekeeper", path = "/verify?for=orders", timeout = "2s", headers = ["x-user", "x-role"], consumer = "x-user" }
[[route]]
path = "/keyed"
service = "orders"
auth = ["api-key"]
forward = "gatekeeper"
[[plan]]
name = "few"
quota = "1000/day"
"#;
        cluster.add_edge("edge", &(sections + rules)).await.unwrap();
        is_known(&cluster, "edge", "orders", 1).await;
        is_known(&cluster, "edge", "gatekeeper", 1).await;
        Self { cluster, questions, gatekeeper, listen, cert, _orders: orders }
    }

    async fn ask(&self, door: Door, path: &str, cookie: &str, key: Option<&str>) -> Answer {
        let mut request = Request::post(format!("https://{HOST}{path}"))
            .header("x-user", "root")
            .header("x-role", "root")
            .header("x-forwarded-uri", "/elsewhere")
            .header("x-original-url", "/elsewhere")
            .header("x-original-method", "HEAD")
            .header("if-none-match", "\"1\"")
            .header("content-type", "text/plain")
            .header("content-length", "5");
        if !cookie.is_empty() {
            request = request.header("cookie", cookie);
        }
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        let client = Client::trusting(&self.cert).unwrap();
        client.send(door, self.listen, request.body(Bytes::from_static(b"hello")).unwrap()).await.unwrap()
    }
}

#[tokio::test]
async fn a_service_decides_who_may_pass() {
    let stage = Stage::set().await;
    let admin = format!("http://{}", stage.cluster.node("edge").admin);
    let made = stage.cluster.run(&["keys", "create", "--consumer", "acme", "--admin", &admin]).await.unwrap();
    let key = Some(made.trim());
    for door in Door::PUBLIC {
        let answer = stage.ask(door, "/orders/1?q=2", "alice", None).await;
        // What the client says in these fields is gone, and of the gatekeeper's only what was listed goes on.
        assert_eq!(answer.text(), "alice|admin+staff||forward:alice| hello", "{door:?}");
        {
            let questions = stage.questions.lock().unwrap();
            let Question { method, uri, fields, body } = questions.last().unwrap();
            assert_eq!((method, uri.to_string().as_str(), *body), (&Method::GET, "/verify?for=orders", 0));
            let field = |name: &str| fields.get(name).map(|v| v.to_str().unwrap().to_owned());
            for (name, want) in [
                ("x-forwarded-method", Some("POST")),
                ("x-forwarded-uri", Some("/orders/1?q=2")),
                ("x-forwarded-host", Some(HOST)),
                ("x-forwarded-proto", Some("https")),
                ("x-forwarded-for", Some("127.0.0.1")),
                ("x-request-id", Some(answer.header("x-request-id"))),
                ("x-user", None),
                ("x-original-url", None),
                ("x-original-method", None),
                ("content-type", None),
                ("if-none-match", None),
            ] {
                assert_eq!(field(name).as_deref(), want, "{door:?} {name}");
            }
            assert!(field("content-length").is_none_or(|length| length == "0"), "{fields:?}");
        }
        // It decides about what the service gets.
        assert_eq!(stage.ask(door, "/public/%2e./%61dmin/./1?q=2", "alice", None).await.status, 200);
        assert_eq!(stage.questions.lock().unwrap().last().unwrap().fields["x-forwarded-uri"], "/admin/1?q=2");
        for (cookie, status, what) in [
            ("nobody", 200, "|||| hello"),
            ("wordy", 200, "|||| hello"),
            ("login", 302, ""),
            ("bad", 403, "not you"),
            ("", 401, "who are you?"),
            ("broken", 503, "cannot be told now"),
            ("endless", 503, "cannot be told now"),
            ("misnamed", 503, "cannot be told now"),
        ] {
            let answer = stage.ask(door, "/", cookie, None).await;
            assert!(
                answer.status == status && answer.text().contains(what),
                "{door:?} {cookie}: {} {}",
                answer.status,
                answer.text()
            );
            assert!(!answer.text().contains("stack trace"));
            match cookie {
                "login" => {
                    assert_eq!(answer.header("location"), "https://id.example.com/login");
                    assert_eq!(answer.header("set-cookie"), "state=1");
                }
                "" => assert_eq!(answer.header("www-authenticate"), "Cookie realm=\"orders\""),
                _ => {}
            }
            assert_eq!(answer.header("retry-after").is_empty(), status != 503, "{cookie}");
        }
        // It is one more condition: whoever has no key is not even asked about.
        let before = stage.questions.lock().unwrap().len();
        assert_eq!(stage.ask(door, "/keyed", "alice", None).await.status, 401);
        assert_eq!(stage.questions.lock().unwrap().len(), before);
        assert_eq!(stage.ask(door, "/keyed", "bad", key).await.status, 403);
        assert_eq!(stage.ask(door, "/keyed", "alice", key).await.text(), "root|root||acme| hello");
        let questions = stage.questions.lock().unwrap();
        let fields = &questions.last().unwrap().fields;
        assert_eq!((&fields["starling-consumer"], fields.get("x-api-key")), (&"acme".parse().unwrap(), None));
    }
    // Nobody was sent away from its connection for an answer that was left where it was.
    let connections = stage.gatekeeper.connections.load(std::sync::atomic::Ordering::Relaxed);
    assert!(connections < 12, "{connections} connections for {} questions", stage.questions.lock().unwrap().len());
    let used = stage.cluster.run(&["quota", "show", "forward:alice", "-o", "json", "--admin", &admin]).await.unwrap();
    let used: Vec<QuotaUse> = serde_json::from_str(&used).unwrap();
    assert_eq!(used[0].used, 6, "two calls over each protocol");
    let routes: Vec<serde_json::Value> = stage.cluster.admin("edge", "/v1/routes").await.unwrap();
    assert!(routes.iter().any(|route| route["forward"] == "gatekeeper"), "{routes:?}");
}

#[tokio::test]
async fn without_a_decision_nothing_passes() {
    let mut stage = Stage::set().await;
    for door in Door::PUBLIC {
        let begun = std::time::Instant::now();
        let answer = stage.ask(door, "/", "silent", None).await;
        assert_eq!(answer.status, 503, "{door:?}: {}", answer.text());
        assert!(begun.elapsed() >= Duration::from_secs(2), "as long as the route says");
        // Its head decides, whatever becomes of the body.
        for cookie in ["alice", "trickling"] {
            assert_eq!(stage.ask(door, "/", cookie, None).await.status, 200);
        }
    }
    stage.cluster.kill("a").await.unwrap();
    wait_for("it is gone", LIMIT, || async {
        let answer = stage.ask(Door::Http1, "/", "alice", None).await;
        (answer.status == 503 && answer.text().contains("undecided")).then_some(()).ok_or_else(|| answer.text())
    })
    .await
    .unwrap();
    for door in Door::PUBLIC {
        let answer = stage.ask(door, "/", "alice", None).await;
        assert!(answer.status == 503 && answer.text().contains("undecided"), "{door:?}: {}", answer.text());
        assert!(!answer.text().contains("gatekeeper"), "{}", answer.text());
    }
}

#[tokio::test]
async fn wrong_settings_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let Front { sections, .. } = Front::new(dir.path(), HOST, "");
    let file = dir.path().join("edge.toml");
    for (forward, want) in [
        ("\"Gate Keeper\"", "names no service"),
        ("5", "the name of a service, or a table such as"),
        ("{ path = \"/\" }", "missing field `service`"),
        ("{ service = \"a\", headres = [] }", "unknown field `headres`"),
        ("{ service = \"a\", path = \"verify\" }", "is no path"),
        ("{ service = \"a\", timeout = \"1h\" }", "30 s at most"),
        ("{ service = \"a\", headers = [\"host\"] }", "may have a meaning of its own"),
        ("{ service = \"a\", headers = [\"x-a\", \"X-A\"] }", "route[0].forward: x-a is told twice"),
    ] {
        let route = format!("[[route]]\nservice = \"s\"\nauth = []\nforward = {forward}\n");
        std::fs::write(&file, format!("{sections}{route}")).unwrap();
        let (fine, out, err) = starling_tests::run(binary(), &["check", &file.to_string_lossy()]);
        assert!(!fine && format!("{out}{err}").contains(want), "{forward}: {out}{err}");
    }
}
