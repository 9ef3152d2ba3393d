//! What the edge makes of messages, over HTTP/1.1, 2 and 3: what services and clients of other gateways stumbled over.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::BodyExt;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, free_port, self_signed, wait_for};
use starling_tests::{
    binary, raw_h3,
    service::{self, Service, Speaks},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const HOST: &str = "api.example.com";

struct Public {
    cluster: Cluster,
    addr: SocketAddr,
    client: Client,
    _service: Service,
}

/// An edge in front of `web`, which tells in its body what it was asked, and of `raw`, which answers what `answer` says.
async fn start(answer: &'static str) -> Public {
    let service = Service::start(Speaks::Http1, |request, _| async move {
        let (head, body) = request.into_parts();
        // It answers once it has all of it, or never.
        let Ok(body) = body.collect().await else { std::future::pending().await };
        let mut seen = format!("{} {}\nbody: {}\n", head.method, head.uri, body.to_bytes().len());
        for (name, value) in &head.headers {
            seen += &format!("{name}: {}\n", value.to_str().unwrap_or("?"));
        }
        let mut answer = service::text(200, seen);
        answer.headers_mut().insert(header::ALT_SVC, "h3=\":1\"".parse().unwrap());
        answer.headers_mut().insert(header::SERVER, "service/1.0".parse().unwrap());
        answer
    })
    .await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let raw = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = vec![0; 4096];
                let _ = stream.read(&mut head).await;
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let nobody = free_port();
    let node = NodeSpec::named("web-1").serving(format!("web={}", service.addr)).serving(format!("raw={raw}"));
    cluster.add(&node.serving(format!("down={nobody}"))).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let (cert, key) = (dir.join("edge.pem"), dir.join("edge.key"));
    self_signed(&[HOST], &cert, &key).unwrap();
    let addr = free_port();
    let sections = format!(
        r#"[edge]
listen = "{addr}"
[[certificate]]
hosts = ["{HOST}"]
cert = {cert:?}
key = {key:?}
[[route]]
path = "/web"
service = "web"
auth = []
[[route]]
path = "/inner"
service = "web"
auth = []
forward_host = "service"
[[route]]
path = "/named"
service = "web"
auth = []
forward_host = "shop.example.org"
[[route]]
path = "/app"
service = "web"
auth = ["api-key"]
cors = {{ origins = ["https://app.example.com"], credentials = true }}
[[route]]
path = "/passes"
service = "web"
auth = ["api-key"]
preflight = "pass"
[[route]]
path = "/files"
service = "web"
auth = []
raw_path = true
[[route]]
path = "/files/private"
service = "web"
auth = ["api-key"]
[[route]]
path = "/below"
service = "web"
auth = []
raw_path = true
strip_prefix = true
[[route]]
path = "/raw"
service = "raw"
auth = []
[[route]]
path = "/small"
service = "web"
auth = []
max_request_size = "1KiB"
[[route]]
path = "/edited"
service = "web"
auth = []
request_headers = {{ set = {{ x-env = "prod" }}, add = {{ x-seen = "edge" }}, remove = ["cookie", "user-agent"] }}
response_headers = {{ set = {{ x-frame-options = "DENY" }}, remove = ["server"] }}
[[route]]
path = "/edited/secret"
service = "web"
auth = ["api-key"]
response_headers = {{ set = {{ x-frame-options = "DENY" }} }}
[[route]]
path = "/inside"
service = "web"
auth = []
allow = ["10.0.0.0/8", "2001:db8::/32"]
[[route]]
path = "/outside"
service = "web"
auth = []
allow = ["127.0.0.0/8"]
deny = ["127.0.0.0/31"]
[[route]]
path = "/loopback"
service = "web"
auth = []
allow = ["127.0.0.1"]
deny = ["10.0.0.0/8"]
[[route]]
path = "/down"
service = "down"
auth = []
"#
    );
    cluster.add_edge("edge", &sections).await.unwrap();
    let public = Public { cluster, addr, client: Client::trusting(&cert).unwrap(), _service: service };
    wait_for("the service is known", Duration::from_secs(30), || async {
        let answer = public.ask(Door::Http2, Method::GET, "/web", &[]).await;
        if answer.status == 200 { Ok(()) } else { Err(answer.text()) }
    })
    .await
    .unwrap();
    public
}

impl Public {
    async fn ask(&self, door: Door, method: Method, path: &str, fields: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder().method(method).uri(format!("https://{HOST}{path}"));
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        self.client.send(door, self.addr, request.body(Bytes::new()).unwrap()).await.unwrap()
    }
}

#[tokio::test]
async fn the_service_sees_the_public_host_or_what_the_route_says() {
    let public = start("").await;
    for door in Door::PUBLIC {
        for (path, host) in [("/web", HOST), ("/inner", "web.mesh.internal"), ("/named", "shop.example.org")] {
            let answer = public.ask(door, Method::GET, path, &[("starling-host", "evil.example")]).await;
            assert!(answer.text().contains(&format!("host: {host}\n")), "{door:?} {path}: {}", answer.text());
            assert!(!answer.text().contains("starling-host"), "{door:?} {path}: {}", answer.text());
            assert!(!answer.header("alt-svc").contains("\":1\""), "{door:?}: the service's own Alt-Svc");
        }
    }
}

/// Of a route that says so, and never past the policy of another one.
#[tokio::test]
async fn a_path_is_passed_on_as_it_came() {
    let public = start("").await;
    for door in Door::PUBLIC {
        for (path, seen) in [
            ("/files/a%2Fb//c/http://y?q=%2f", Some("/files/a%2Fb//c/http://y?q=%2f")),
            ("/files/%61%2fb", Some("/files/%61%2fb")),
            ("/below/a%2Fb//c", Some("/a%2Fb//c")),
            ("/below", Some("/")),
            ("/web/a//b", Some("/web/a/b")),
            ("/web/a%2Fb", None),
            ("/files%2Fprivate/x", None),
            ("/files/private%2Fx", None),
            ("/files//private%2Fx", None),
            ("/files%5Cprivate", None),
            ("/files/a%2F..%2Fprivate", None),
            ("/files/a%2F%2e%2E%2F..%2Fweb", None),
        ] {
            let answer = public.ask(door, Method::GET, path, &[]).await;
            match seen {
                Some(seen) => {
                    let first = answer.text().lines().next().unwrap_or_default().to_owned();
                    assert_eq!(first, format!("GET {seen}"), "{door:?} {path}");
                }
                None => assert_eq!(answer.status, 400, "{door:?} {path}: {}", answer.text()),
            }
        }
        assert_eq!(public.ask(door, Method::GET, "/files//private/x", &[]).await.status, 401, "{door:?}");
        assert_eq!(public.ask(door, Method::GET, "/files/priv%61te/x", &[]).await.status, 401, "{door:?}");
    }
}

/// Where the client's protocol can carry them, and nothing in them that is between neighbours.
#[tokio::test]
async fn early_hints_arrive_before_the_answer() {
    const ANSWER: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: x-mine\r\nX-Mine: secret\r\n\
                          Starling-Load: 7\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n\
                          HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let public = start(ANSWER).await;

    let stream = public.client.connect_tls(public.addr, HOST, b"h2").await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let driving = tokio::spawn(connection);
    let request = Request::get(format!("https://{HOST}/raw")).body(()).unwrap();
    let (mut answer, _) = sender.ready().await.unwrap().send_request(request, true).unwrap();
    let mut early = Vec::new();
    while early.len() < 2 {
        early.push(std::future::poll_fn(|cx| answer.poll_informational(cx)).await.unwrap().unwrap());
    }
    let statuses: Vec<u16> = early.iter().map(|head| head.status().as_u16()).collect();
    assert_eq!(statuses, [103, 102]);
    assert_eq!(early[0].headers().get("link").unwrap(), "</a.css>; rel=preload");
    assert_eq!(early[0].headers().len(), 1, "{:?}", early[0]);
    assert_eq!(answer.await.unwrap().status(), 200);
    driving.abort();

    let (connection, _endpoint) = public.client.connect_quic(public.addr, HOST).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let head = [(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/raw")];
    send.write_all(&raw_h3::head(&head)).await.unwrap();
    send.finish().unwrap();
    let heads = raw_h3::heads(&receive.read_to_end(1 << 20).await.unwrap()).unwrap();
    assert_eq!(heads.iter().map(|(status, _)| *status).collect::<Vec<_>>(), [103, 102, 200]);
    let has = |text: &str| heads[0].1.windows(text.len()).any(|part| part == text.as_bytes());
    assert!(has("</a.css>; rel=preload") && !has("secret"), "{:?}", heads[0]);

    // Over HTTP/1.1 there is the answer alone, and nothing is the worse for it.
    for door in [Door::Http1, Door::Http2] {
        let answer = public.ask(door, Method::GET, "/raw", &[]).await;
        assert_eq!((answer.status, answer.text()), (200, "ok".into()), "{door:?}");
    }
}

#[tokio::test]
async fn browsers_can_call_a_route_that_asks_for_credentials() {
    let public = start("").await;
    let asks = [("origin", "https://app.example.com"), ("access-control-request-method", "PUT")];
    for door in Door::PUBLIC {
        let answer = public.ask(door, Method::OPTIONS, "/app", &asks).await;
        assert_eq!(answer.status, 204, "{door:?}");
        assert_eq!(answer.header("access-control-allow-origin"), "https://app.example.com", "{door:?}");
        assert!(answer.header("access-control-allow-methods").contains("PUT"), "{door:?}");
        let answer = public.ask(door, Method::GET, "/app", &asks[..1]).await;
        assert_eq!(answer.status, 401, "{door:?}");
        assert_eq!(
            answer.header("access-control-allow-origin"),
            "https://app.example.com",
            "{door:?}: pages may read why"
        );
        let answer = public.ask(door, Method::GET, "/app", &[("origin", "https://evil.example")]).await;
        assert_eq!((answer.status, answer.header("access-control-allow-origin")), (401, ""), "{door:?}");
        let answer = public.ask(door, Method::OPTIONS, "/passes", &asks).await;
        assert!(answer.status == 200 && answer.text().starts_with("OPTIONS /passes"), "{door:?}: {}", answer.text());
        assert_eq!(public.ask(door, Method::GET, "/passes", &asks).await.status, 401, "{door:?}");
    }
}

#[tokio::test]
async fn answers_are_made_valid_for_the_side_they_leave_on() {
    for (raw, status, why) in [
        ("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, "a length where there is no content"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 502, "a coding that would be lost"),
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", 502, "an answer to nothing"),
        ("nonsense\r\n\r\n", 502, "no HTTP"),
    ] {
        let public = start(raw).await;
        for door in Door::PUBLIC {
            let answer = public.ask(door, Method::GET, "/raw", &[]).await;
            assert_eq!(answer.status, status, "{door:?}: {why}");
            assert_eq!(answer.header("content-length").is_empty(), status == 204, "{door:?}: {why}");
        }
    }
}

#[tokio::test]
async fn the_public_learns_nothing_of_the_mesh() {
    let public = start("").await;
    for door in Door::PUBLIC {
        let answer = public.ask(door, Method::GET, "/down", &[]).await;
        assert_eq!(answer.status, 502, "{door:?}");
        let told = format!("{:?} {}", answer.headers, answer.text());
        for secret in ["web-1", "os error", "127.0.0.1", "starling-sent"] {
            assert!(!told.contains(secret), "{door:?}: {secret} in {told}");
        }
        let answer = public.ask(door, Method::HEAD, "/down", &[]).await;
        assert_eq!((answer.status, answer.body.len()), (502, 0), "{door:?}");
    }
}

/// What a client of HTTP/1.0 asks that knows no Host, as health checks do.
#[tokio::test]
async fn a_client_of_http_1_0_without_a_host_is_answered() {
    let public = start("").await;
    let mut stream = public.client.connect_tls(public.addr, HOST, b"http/1.1").await.unwrap();
    stream.write_all(b"GET /nowhere HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    assert!(answer.contains(" 404 ") || answer.contains(" 421 "), "{answer}");
    let _ = public.cluster.members("edge").await.unwrap();
}

/// All that comes until the end, however it ends.
async fn said(stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin), head: &str) -> String {
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut said = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut said)).await.expect("it ends");
    String::from_utf8_lossy(&said).into_owned()
}

/// Who ends a line at LF alone sees other fields than who does not; and a target that is a name is none.
#[tokio::test]
async fn heads_that_two_could_read_differently_are_refused() {
    let public = start("").await;
    let door = public.cluster.node("edge").outbound;
    for (head, status) in [
        ("GET /web HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 "),
        ("\r\nGET /web HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 "),
        ("GET /web HTTP/1.1\nHost: {}\n\n", "HTTP/1.1 400 "),
        ("GET /web HTTP/1.1\r\nHost: {}\r\nX: a\nContent-Length: 40\r\n\r\n", "HTTP/1.1 400 "),
        // The head does not end with that: refused at once, or when nothing else has come for long.
        ("GET /web HTTP/1.1\r\nHost: {}\r\n\n", ""),
        ("GET /web HTTP/1.1\r\nHost: {}\r\n\nGET / HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "),
        ("GET web HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 "),
    ] {
        let is_right = |answer: &str| match status {
            "" => answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
            status => answer.starts_with(status),
        };
        let mut stream = public.client.connect_tls(public.addr, HOST, b"http/1.1").await.unwrap();
        let answer = said(&mut stream, &head.replace("{}", HOST)).await;
        assert!(is_right(&answer), "{head:?}: {answer}");
        let mut stream = tokio::net::TcpStream::connect(door).await.unwrap();
        let answer = said(&mut stream, &head.replace("{}", "web.mesh.internal")).await;
        assert!(is_right(&answer), "{head:?}: {answer}");
    }
    // In a body it is a byte like others.
    let mut stream = public.client.connect_tls(public.addr, HOST, b"http/1.1").await.unwrap();
    let post = format!("POST /web HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 4\r\nConnection: close\r\n\r\na\nb\n");
    assert!(said(&mut stream, &post).await.starts_with("HTTP/1.1 200 "));
}

/// Consent to change protocols is the service's alone to give, however its refusal would be put.
#[tokio::test]
async fn a_refused_upgrade_is_no_consent_to_grpc_either() {
    let public = start("").await;
    for kind in ["application/grpc", "application/grpc-web", "text/plain"] {
        for (path, status) in [("/down", "502"), ("/nowhere", "404")] {
            let mut stream = public.client.connect_tls(public.addr, HOST, b"http/1.1").await.unwrap();
            let head = format!(
                "GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nContent-Type: {kind}\r\n\r\n"
            );
            let answer = said(&mut stream, &head).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{kind} {path}: {answer}");
        }
    }
}

/// Where the end of the answer is that of the connection, half of it must not look whole.
#[tokio::test]
async fn half_an_answer_to_http_1_0_ends_with_a_reset() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = vec![0; 4096];
                let length = stream.read(&mut head).await.unwrap_or_default();
                let is_whole = String::from_utf8_lossy(&head[..length]).contains("/whole");
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").await;
                // Until that has arrived.
                tokio::time::sleep(Duration::from_millis(500)).await;
                if is_whole {
                    let _ = stream.write_all(b"0\r\n\r\n").await;
                }
            });
        }
    });
    let mut cluster = Cluster::start(binary()).await.unwrap();
    cluster.add(&NodeSpec::named("a").serving(format!("web={addr}"))).await.unwrap();
    starling_tests::is_known(&cluster, "seed", "web", 1).await;
    for (path, is_whole) in [("/whole", true), ("/half", false)] {
        let mut stream = tokio::net::TcpStream::connect(cluster.node("seed").outbound).await.unwrap();
        let head = format!("GET {path} HTTP/1.0\r\nHost: web.mesh.internal\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut said = Vec::new();
        let ended = stream.read_to_end(&mut said).await;
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains(" 200 ") && said.ends_with("hello"), "{path}: {said}");
        assert_eq!(ended.is_ok(), is_whole, "{path}: {ended:?}");
    }
}

#[tokio::test]
async fn a_request_that_is_too_large_is_refused_whether_it_says_so_or_not() {
    let public = start("").await;
    let send = async |door: Door, size: usize| {
        let request = Request::post(format!("https://{HOST}/small")).body(Bytes::from(vec![b'x'; size])).unwrap();
        public.client.send(door, public.addr, request).await.unwrap()
    };
    for door in Door::PUBLIC {
        let answer = send(door, 1024).await;
        assert!(answer.status == 200 && answer.text().contains("body: 1024\n"), "{door:?} {}", answer.text());
        let answer = send(door, 1025).await;
        assert_eq!((answer.status, answer.header("content-type")), (413, "application/problem+json"), "{door:?}");
    }

    // Without a length it is found out on the way.
    let chunk = format!("400\r\n{}\r\n", "x".repeat(1024));
    let head = format!("POST /small HTTP/1.1\r\nhost: {HOST}\r\ntransfer-encoding: chunked\r\n\r\n");
    for (chunks, status) in [(1, "200"), (2, "413")] {
        let mut stream = public.client.connect_tls(public.addr, HOST, b"http/1.1").await.unwrap();
        let sent = format!("{head}{}{}", chunk.repeat(chunks), if chunks == 1 { "0\r\n\r\n" } else { "" });
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut line = vec![0; 12];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&line), format!("HTTP/1.1 {status}"));
    }

    let stream = public.client.connect_tls(public.addr, HOST, b"h2").await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let driving = tokio::spawn(connection);
    let request = Request::post(format!("https://{HOST}/small")).body(()).unwrap();
    let (answer, mut body) = sender.ready().await.unwrap().send_request(request, false).unwrap();
    body.send_data(vec![b'x'; 2048].into(), false).unwrap();
    assert_eq!(answer.await.unwrap().status(), 413);
    driving.abort();

    let (connection, _endpoint) = public.client.connect_quic(public.addr, HOST).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let head = [(":method", "POST"), (":scheme", "https"), (":authority", HOST), (":path", "/small")];
    send.write_all(&[raw_h3::head(&head), raw_h3::frame(0, [b'x'; 2048])].concat()).await.unwrap();
    let heads = raw_h3::heads(&receive.read_to_end(1 << 20).await.unwrap()).unwrap();
    assert_eq!(heads.iter().map(|(status, _)| *status).collect::<Vec<_>>(), [413]);
}

#[tokio::test]
async fn a_route_edits_fields_both_ways_and_of_its_own_answers() {
    let public = start("").await;
    for door in Door::PUBLIC {
        let fields = [("x-env", "test"), ("x-seen", "client"), ("cookie", "a=b"), ("user-agent", "me")];
        let answer = public.ask(door, Method::GET, "/edited", &fields).await;
        let seen = answer.text();
        assert!(seen.contains("x-env: prod\n") && !seen.contains("x-env: test"), "{door:?}: {seen}");
        assert!(seen.contains("x-seen: client\n") && seen.contains("x-seen: edge\n"), "{door:?}: {seen}");
        assert!(!seen.contains("cookie") && !seen.contains("user-agent"), "{door:?}: {seen}");
        assert_eq!((answer.header("server"), answer.header("x-frame-options")), ("", "DENY"), "{door:?}");
        assert_eq!(public.ask(door, Method::GET, "/web", &[]).await.header("server"), "service/1.0", "{door:?}");
        let refused = public.ask(door, Method::GET, "/edited/secret", &[]).await;
        assert_eq!((refused.status, refused.header("x-frame-options")), (401, "DENY"), "{door:?}");
        assert_eq!(refused.header("cache-control"), "no-store", "{door:?}: what is said of answers is not of refusals");
    }
}

#[tokio::test]
async fn a_route_is_for_the_addresses_that_it_names() {
    let public = start("").await;
    for door in Door::PUBLIC {
        for (path, status) in [("/inside", 403), ("/outside", 403), ("/loopback", 200)] {
            let answer = public.ask(door, Method::GET, path, &[("x-forwarded-for", "10.0.0.1")]).await;
            assert_eq!(answer.status, status, "{door:?} {path}");
        }
    }
}
