//! Where requests go, by more than host and path, and what becomes of them on the way: the same over every protocol.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, free_port, wait_for};
use starling_protocol::admin::{Explanation, Route};
use starling_tests::{Front, binary, is_known, nginx_at, sample};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

const HOST: &str = "api.example.com";
const LIMIT: Duration = Duration::from_secs(60);

struct Stage {
    cluster: Cluster,
    listen: SocketAddr,
    cert: PathBuf,
    _services: Vec<Process>,
}

impl Stage {
    /// An edge with these routes, and `more` in its section, in front of nginx as `echo` and of samples. `None` without nginx.
    async fn set(more: &str, routes: &str) -> Option<Self> {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let addr = free_port();
        let echo =
            "$request_method $request_uri for=$http_x_forwarded_for fwd=$http_forwarded id=$http_x_request_id\\n";
        let (page, text) =
            (cluster.dir().join("page.html"), "All work and no play makes Jack a dull boy.\n".repeat(4000));
        std::fs::write(&page, text).unwrap();
        let server = format!(
            "listen {addr}; location / {{ return 200 '{echo}'; }} \
             location /page {{ default_type text/html; alias {}; }} \
             location /events {{ default_type text/event-stream; alias {0}; }}",
            page.display()
        );
        let nginx = nginx_at(cluster.dir(), addr, &server).await?;
        let (orders, orders_addr) = sample(cluster.dir(), "orders").await;
        let (next, next_addr) = sample(cluster.dir(), "next").await;
        let node = NodeSpec::named("a").serving(format!("echo={addr}")).serving(format!("orders={orders_addr}"));
        cluster.add(&node.serving(format!("next={next_addr}"))).await.unwrap();
        let Front { listen, cert, sections } = Front::new(cluster.dir(), HOST, more);
        cluster.add_edge("edge", &(sections + routes)).await.unwrap();
        for service in ["echo", "orders", "next"] {
            is_known(&cluster, "edge", service, 1).await;
        }
        Some(Self { cluster, listen, cert, _services: vec![nginx, orders, next] })
    }

    async fn send(&self, door: Door, method: Method, path: &str, fields: &[(&str, &str)]) -> Answer {
        let client = Client::trusting(&self.cert).unwrap();
        let mut request = Request::builder().method(method).uri(format!("https://{HOST}{path}"));
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        client.send(door, self.listen, request.body(Bytes::new()).unwrap()).await.unwrap()
    }

    async fn get(&self, door: Door, path: &str, fields: &[(&str, &str)]) -> Answer {
        self.send(door, Method::GET, path, fields).await
    }

    async fn explain(&self, args: &[&str]) -> Explanation {
        let admin = format!("http://{}", self.cluster.node("edge").admin);
        let args = [&["edge", "explain"], args, &["--admin", &admin, "-o", "json"]].concat();
        serde_json::from_str(&self.cluster.run(&args).await.unwrap()).unwrap()
    }
}

const ROUTES: &str = r#"
[[route]]
path = "/orders"
service = "orders"
auth = []
[[route]]
path = "/orders"
match = { headers = { x-beta = "1" } }
service = "next"
auth = []
[[route]]
path = "/orders"
match = { query = { "next version" = "*" }, methods = ["GET"] }
service = "next"
auth = []
[[route]]
path = "/write"
match = { methods = ["POST", "PUT"] }
service = "orders"
auth = []
cors = { origins = ["https://app.example.com"], methods = ["POST"] }
[[route]]
path = "/old"
redirect = { to = "https://new.example.com/api/*" }
auth = []
[[route]]
path = "/see"
redirect = { to = "/elsewhere", status = 303 }
auth = []
[[route]]
path = "/api"
service = "echo"
auth = []
rewrite = "/v2/internal"
[[route]]
path = "/down"
service = "orders"
auth = ["api-key"]
maintenance = { retry_after = "10m", detail = "back at noon" }
[[route]]
path = "/small"
service = "orders"
auth = []
strip_prefix = true
max_response_size = "1KiB"
[[route]]
path = "/pages"
service = "echo"
auth = []
strip_prefix = true
compress = true
[[route]]
path = "/few"
service = "orders"
auth = []
max_concurrency = 1
[[route]]
path = "/books"
service = "orders"
auth = []
[[route]]
path = "/books/old"
redirect = { to = "/books/new/*", status = 307 }
auth = []
[[version]]
route = "/books"
from = ["path"]
default = "v2"
versions = { v1 = {}, v2 = {} }
"#;

#[tokio::test]
async fn requests_go_where_their_method_fields_and_query_lead() {
    let Some(stage) = Stage::set("", ROUTES).await else { return };
    for door in Door::PUBLIC {
        for (path, fields, want) in [
            ("/orders/1", &[][..], "orders"),
            ("/orders/1", &[("x-beta", "1")], "next"),
            ("/orders/1", &[("x-beta", "2")], "orders"),
            // Whichever of two the service would take.
            ("/orders/1", &[("x-beta", "1"), ("x-beta", "2")], "orders"),
            ("/orders/1?next+version=7", &[], "next"),
            ("/orders/1?a=b&next%20version", &[], "next"),
            // Of two that ask for different things, the one that asks for more.
            ("/orders/1?next+version=7", &[("x-beta", "2")], "next"),
        ] {
            let answer = stage.get(door, path, fields).await;
            let hello = format!("hello from {want}");
            assert_eq!((answer.status, answer.text().trim()), (200, hello.as_str()), "{door:?} {path} {fields:?}");
        }
        assert!(stage.get(door, "/orders/1", &[]).await.header("vary").contains("x-beta"), "{door:?}");
        let spelled = stage.send(door, Method::from_bytes(b"delete").unwrap(), "/orders/1", &[]).await;
        assert_eq!(spelled.status, 400, "{door:?} {spelled:?}");
        let refused = stage.get(door, "/write/1", &[]).await;
        assert_eq!((refused.status, refused.header("allow")), (405, "POST, PUT"), "{door:?} {refused:?}");
        assert_eq!(refused.header("content-type"), "application/problem+json");
        assert_eq!(stage.send(door, Method::POST, "/write/1", &[]).await.status, 200);
        // A preflight asks for the method to come.
        let asks = [("origin", "https://app.example.com"), ("access-control-request-method", "POST")];
        let preflight = stage.send(door, Method::OPTIONS, "/write/1", &asks).await;
        assert_eq!(
            (preflight.status, preflight.header("access-control-allow-methods")),
            (204, "POST"),
            "{preflight:?}"
        );

        for (path, status, to) in [
            ("/old/a/b?c=d", 308, "https://new.example.com/api/a/b?c=d"),
            ("/old", 308, "https://new.example.com/api/"),
            ("/old//evil.example/x", 308, "https://new.example.com/api/evil.example/x"),
            ("/see/1", 303, "/elsewhere"),
            // The version that a path names is in the other one, too.
            ("/books/old/7?c=d", 307, "/books/new/7?c=d"),
            ("/v1/books/old/7?c=/d", 307, "/v1/books/new/7?c=/d"),
            ("/books/v1/old/7", 307, "/books/v1/new/7"),
        ] {
            let answer = stage.get(door, path, &[]).await;
            assert_eq!((answer.status, answer.header("location")), (status, to), "{door:?} {path}");
        }
        let rewritten = stage.get(door, "/api/x/1?q=1", &[]).await.text();
        assert!(rewritten.starts_with("GET /v2/internal/x/1?q=1 "), "{door:?} {rewritten}");
        assert!(stage.get(door, "/api", &[]).await.text().starts_with("GET /v2/internal "), "{door:?}");

        let down = stage.get(door, "/down/1", &[]).await;
        assert_eq!((down.status, down.header("retry-after")), (503, "600"), "{door:?} {down:?}");
        assert!(down.text().contains("back at noon") && down.text().contains("maintenance"), "{down:?}");

        assert_eq!(stage.get(door, "/small/bytes/1024", &[]).await.body.len(), 1024);
        let large = stage.get(door, "/small/bytes/1025", &[]).await;
        assert_eq!(large.status, 502, "{door:?} {large:?}");
        assert!(large.header("proxy-status").contains("http_response_body_size"), "{large:?}");
    }
    let url = |path: &str| format!("https://{HOST}{path}");
    let told = stage.explain(&["GET", &url("/orders/1"), "-H", "x-beta: 1"]).await;
    assert_eq!(told.route.unwrap().service.unwrap().as_str(), "next");
    assert!(told.because.contains("x-beta: 1"), "{}", told.because);
    let told = stage.explain(&["GET", &url("/old/1")]).await;
    assert_eq!((told.redirected.as_deref(), told.path), (Some("308 https://new.example.com/api/1"), None));
    assert_eq!(stage.explain(&["GET", &url("/down")]).await.refused.unwrap().status, 503);
    assert_eq!(stage.explain(&["GET", &url("/write")]).await.refused.unwrap().status, 405);
    let routes: Vec<Route> = stage.cluster.admin("edge", "/v1/routes").await.unwrap();
    assert!(routes.iter().any(|route| route.conditions == ["GET", "?next version=*"]), "{routes:?}");
}

#[tokio::test]
async fn a_route_takes_so_many_requests_at_once() {
    let Some(stage) = Stage::set("", ROUTES).await else { return };
    let client = Client::trusting(&stage.cert).unwrap();
    for door in Door::PUBLIC {
        // One whose body does not come.
        let mut under_way = client.connect_tls(stage.listen, HOST, b"http/1.1").await.unwrap();
        let head = format!("POST /few/1 HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 10\r\n\r\n");
        under_way.write_all(head.as_bytes()).await.unwrap();
        wait_for("the place is taken", LIMIT, || async {
            let answer = stage.get(door, "/few/2", &[]).await;
            let is_full = answer.status == 503 && answer.text().contains("too-many-requests-at-once");
            is_full.then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
        assert_eq!(stage.get(door, "/orders/1", &[]).await.status, 200, "others are not held up");
        // It goes, and gives its place back.
        drop(under_way);
        wait_for("the place is free", LIMIT, || async {
            let answer = stage.get(door, "/few/2", &[]).await;
            (answer.status == 200).then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn answers_are_compressed_for_those_who_can_read_them() {
    let Some(stage) = Stage::set("", ROUTES).await else { return };
    let whole = stage.get(Door::Http1, "/pages/page", &[]).await;
    assert_eq!(
        (whole.header("content-encoding"), whole.header("vary")),
        ("", "accept-encoding"),
        "{:?}",
        whole.headers
    );
    for door in Door::PUBLIC {
        for coding in ["gzip", "br", "zstd"] {
            let answer = stage.get(door, "/pages/page", &[("accept-encoding", coding)]).await;
            assert_eq!((answer.status, answer.header("content-encoding")), (200, coding), "{door:?}");
            assert!(answer.body.len() < whole.body.len() / 20, "{door:?} {coding}: {}", answer.body.len());
            assert!(answer.header("etag").starts_with("W/") && answer.header("content-length").is_empty(), "{door:?}");
            // Events wait for nothing, and a part is a part of what was there.
            let events = stage.get(door, "/pages/events", &[("accept-encoding", coding)]).await;
            assert_eq!((events.header("content-encoding"), events.body.len()), ("", whole.body.len()));
            let part = stage.get(door, "/pages/page", &[("accept-encoding", coding), ("range", "bytes=10-19")]).await;
            assert_eq!((part.status, part.body.len(), part.header("content-encoding")), (206, 10, ""), "{door:?}");
        }
        let head = stage.send(door, Method::HEAD, "/pages/page", &[("accept-encoding", "gzip")]).await;
        assert_eq!((head.status, head.header("content-encoding"), head.body.len()), (200, "", 0), "{door:?}");
    }
    let Some(curl) = starling_tests::program("curl") else { return };
    for version in ["--http1.1", "--http2"] {
        let resolve = format!("{HOST}:{}:127.0.0.1", stage.listen.port());
        let url = format!("https://{HOST}:{}/pages/page", stage.listen.port());
        let mut command = tokio::process::Command::new(&curl);
        command.args(["-s", "--compressed", version, "--resolve", &resolve, &url, "--cacert"]).arg(&stage.cert);
        assert_eq!(command.output().await.unwrap().stdout, whole.body, "{version}");
    }
}

/// Who the client is, by the word of trusted proxies, by fields and in front of a connection.
#[tokio::test]
async fn a_proxy_in_front_says_who_the_client_is_if_it_is_trusted() {
    let routes = r#"
[[route]]
path = "/"
service = "echo"
auth = []
[[route]]
path = "/inside"
service = "echo"
auth = []
allow = ["203.0.113.0/24"]
"#;
    let id = [("x-request-id", "from-the-front"), ("x-forwarded-for", "198.51.100.9, 203.0.113.7")];
    let Some(trusting) = Stage::set("trusted_hops = [\"127.0.0.0/8\"]", routes).await else { return };
    for door in Door::PUBLIC {
        let told = trusting.get(door, "/", &id).await;
        let want = "for=203.0.113.7 fwd=for=203.0.113.7;host=\"api.example.com\";proto=https id=from-the-front";
        assert!(told.text().contains(want), "{door:?} {told:?}");
        assert_eq!(told.header("x-request-id"), "from-the-front");
        assert_eq!(trusting.get(door, "/inside", &id).await.status, 200, "{door:?}");
        assert_eq!(trusting.get(door, "/inside", &[]).await.status, 403, "{door:?}");
    }
    drop(trusting);
    let stage = Stage::set("proxy_protocol = [\"127.0.0.1\"]", routes).await.unwrap();
    // Nobody else's word counts, nor does that of a field.
    let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (through, to) = (front.local_addr().unwrap(), stage.listen);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = front.accept().await {
            tokio::spawn(async move {
                let mut edge = TcpStream::connect(to).await.unwrap();
                let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\x00\x71\x07\x7f\0\0\x01\x12\x34\x01\xbb";
                edge.write_all(header).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut edge).await;
            });
        }
    });
    let client = Client::trusting(&stage.cert).unwrap();
    for door in [Door::Http1, Door::Http2] {
        let request = || Request::get(format!("https://{HOST}/inside")).header("x-forwarded-for", "198.51.100.9");
        let told = client.send(door, through, request().body(Bytes::new()).unwrap()).await.unwrap();
        assert!(told.status == 200 && told.text().contains("for=203.0.113.7 "), "{door:?} {told:?}");
        // Without the header there is no connection.
        assert!(client.send(door, stage.listen, request().body(Bytes::new()).unwrap()).await.is_err());
    }
    // Over QUIC there is no such header.
    assert_eq!(stage.get(Door::Http3, "/inside", &id).await.status, 403);
}
