//! WebSocket, and other protocols that a connection changes to.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use http::{Method, Request, StatusCode};
use serde_json::Value;
use starling_chaos::{Cluster, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_tests::{
    binary, client_script, is_known, listening, program, python,
    raw_h3::{self, RawClient, endpoint, frame, head, heads},
    run,
    service::{Service, Speaks, text},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::LIMIT;

const HOST: &str = "api.example.com";

struct Stage {
    cluster: Cluster,
    python: PathBuf,
    script: String,
    _server: Process,
    public: SocketAddr,
    ca: PathBuf,
}

/// A mesh with a WebSocket server behind one node, and an edge that leads to it.
async fn stage() -> Option<Stage> {
    let python = python()?;
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (script, addr) = (client_script("websocket.py"), free_port());
    let args = [&script, "serve", "--port", &addr.port().to_string()];
    let server = Process::start(&python, args, &cluster.dir().join("websocket.log")).unwrap();
    listening(addr).await;
    cluster.add(&NodeSpec::named("far").serving(format!("chat={addr}"))).await.unwrap();
    let (ca, key) = (cluster.dir().join("edge.pem"), cluster.dir().join("edge.key"));
    self_signed(&[HOST], &ca, &key).unwrap();
    let public = free_port();
    let sections = format!(
        "[edge]\nlisten = \"{public}\"\n[[certificate]]\nhosts = [\"{HOST}\"]\ncert = {ca:?}\nkey = {key:?}\n[[route]]\npath = \
         \"/chat\"\nservice = \"chat\"\nauth = []\n[[route]]\npath = \"/members\"\nservice = \"chat\"\nauth = [\"api-key\"]\n"
    );
    cluster.add_edge("edge", &sections).await.unwrap();
    is_known(&cluster, "edge", "chat", 1).await;
    Some(Stage { cluster, python, script, _server: server, public, ca })
}

impl Stage {
    fn call(&self, url: &str, to: SocketAddr, connections: usize) -> Result<Value, String> {
        let (to, connections, ca) = (to.to_string(), connections.to_string(), self.ca.to_string_lossy());
        let args = [&self.script, "call", url, "--connect", &to, "--connections", &connections, "--ca", &ca];
        let (ok, out, err) = run(&self.python, &args);
        if ok { Ok(serde_json::from_str(&out).unwrap()) } else { Err(err) }
    }
}

#[tokio::test]
async fn websockets_talk_over_http1_doors() {
    let Some(stage) = stage().await else { return };
    let door = stage.cluster.node("edge").outbound;
    let public = format!("wss://{HOST}/chat");
    for (url, to) in [("ws://chat.mesh.internal/room?a=b", door), (&public, stage.public)] {
        let said = stage.call(url, to, 5).unwrap_or_else(|error| panic!("{url}: {error}"));
        let wanted = serde_json::json!({"connections": 5, "messages": 45, "pongs": 5, "closed": [4321]});
        assert_eq!(said, wanted, "{url}");
    }
    // The edge's checks hold for them as for any request.
    let refused = stage.call(&format!("wss://{HOST}/members"), stage.public, 1).unwrap_err();
    assert!(refused.contains("401"), "{refused}");
}

#[tokio::test]
async fn a_thousand_websockets_are_open_at_once() {
    let Some(stage) = stage().await else { return };
    let said = stage.call(&format!("wss://{HOST}/chat"), stage.public, 1000).unwrap();
    assert_eq!((&said["connections"], &said["messages"]), (&1000.into(), &9000.into()));
}

/// A page that has an HTTP/2 connection there opens them on it, as many as the edge takes requests at once.
#[tokio::test]
async fn a_page_in_chromium_talks_over_many_at_once() {
    let (Some(stage), Some(_)) = (stage().await, program("chromium")) else { return };
    let (url, cert) = (format!("wss://{HOST}:{}/chat", stage.public.port()), stage.ca.to_string_lossy());
    let to = stage.public.to_string();
    let args =
        [&*client_script("chromium_websocket.py"), &url, "--connect", &to, "--cert", &cert, "--connections", "100"];
    let (fine, out, err) = run(&stage.python, &args);
    assert!(fine, "{out} {err}");
    let told: Value = serde_json::from_str(&out).unwrap();
    let wanted = serde_json::json!({"page": "h2", "opened": 100, "texts": 100, "bytes": 100, "codes": [4321]});
    assert_eq!(told, wanted);
}

/// A text of a client, masked as clients must.
fn text_frame(text: &str) -> Vec<u8> {
    let mut frame = vec![0x81, 0x80 | text.len() as u8, 0, 0, 0, 0];
    frame.extend_from_slice(text.as_bytes());
    frame
}

fn echoed(text: &str) -> Vec<u8> {
    [&[0x81, text.len() as u8], text.as_bytes()].concat()
}

/// Extended CONNECT on HTTP/2 (RFC 8441), at the edge and at the outbound port.
#[tokio::test]
async fn websockets_talk_over_http2() {
    let Some(stage) = stage().await else { return };
    let plain = TcpStream::connect(stage.cluster.node("edge").outbound).await.unwrap();
    talk_over_http2(plain, "http://chat.mesh.internal/room").await;
    let tls = tokio_rustls::TlsConnector::from(Arc::new(raw_h3::tls_config(None, b"h2").unwrap()));
    let tcp = TcpStream::connect(stage.public).await.unwrap();
    let tls = tls.connect(HOST.try_into().unwrap(), tcp).await.unwrap();
    talk_over_http2(tls, &format!("https://{HOST}/chat")).await;
}

/// A client of a server that takes extended CONNECT.
async fn http2(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
) -> h2::client::SendRequest<bytes::Bytes> {
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let send = send.ready().await.unwrap();
    wait_for("the server takes extended CONNECT", LIMIT, || {
        let takes = send.is_extended_connect_protocol_enabled();
        async move { if takes { Ok(()) } else { Err("no setting".into()) } }
    })
    .await
    .unwrap();
    send
}

async fn talk_over_http2(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    uri: &str,
) {
    let mut send = http2(stream).await;
    let request = Request::builder().method(Method::CONNECT).uri(uri).header("sec-websocket-version", "13");
    let request = request
        .header("sec-websocket-protocol", "echo")
        .extension(h2::ext::Protocol::from_static("websocket"))
        .body(())
        .unwrap();
    let (answer, mut upload) = send.send_request(request, false).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!(
        (answer.status(), &answer.headers()["sec-websocket-protocol"]),
        (StatusCode::OK, &"echo".parse().unwrap())
    );
    assert!(!answer.headers().contains_key("sec-websocket-accept"));
    upload.send_data(text_frame("over h2").into(), false).unwrap();
    let mut body = answer.into_body();
    let mut seen = Vec::new();
    while seen.len() < echoed("over h2").len() {
        let data = body.data().await.unwrap().unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        seen.extend_from_slice(&data);
    }
    assert_eq!(seen, echoed("over h2"));
}

/// Extended CONNECT on HTTP/3 (RFC 9220).
#[tokio::test]
async fn websockets_talk_over_http3() {
    let Some(stage) = stage().await else { return };
    let endpoint = endpoint(None, b"h3").unwrap();
    let client = RawClient::dial(&endpoint, stage.public, HOST).await.unwrap();
    let connect = head(&[
        (":method", "CONNECT"),
        (":protocol", "websocket"),
        (":scheme", "https"),
        (":authority", HOST),
        (":path", "/chat"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-protocol", "echo"),
    ]);
    // What comes before the answer waits for it.
    let (mut send, mut receive) = client.open(&[connect, frame(0, text_frame("over h3"))].concat()).await.unwrap();
    let (mut seen, wanted) = (Vec::new(), echoed("over h3"));
    while !seen.ends_with(&wanted) {
        let chunk = tokio::time::timeout(LIMIT, receive.read_chunk(4096, true)).await.unwrap().unwrap();
        let chunk = chunk.unwrap_or_else(|| panic!("it ended: {}", String::from_utf8_lossy(&seen)));
        seen.extend_from_slice(&chunk.bytes);
    }
    assert_eq!(heads(&seen).unwrap()[0].0, 200);
    // A close by the client, and the service's answer to it, then the end.
    send.write_all(&frame(0, [0x88, 0x80, 0, 0, 0, 0])).await.unwrap();
    send.finish().unwrap();
    let rest = tokio::time::timeout(LIMIT, receive.read_to_end(4096)).await.unwrap().unwrap();
    assert!(rest.ends_with(&[0x88, 0x00]), "{rest:x?}");
}

/// Protocols that nobody has heard of, services that do not change, and such that lie about it.
#[tokio::test]
async fn other_upgrades_and_services_that_refuse_them() {
    let polite = Service::start(Speaks::Http1, |request, _| async move {
        let upgrade = request.headers().get("upgrade").map(|u| u.to_str().unwrap().to_owned());
        text(200, format!("as before, asked for {upgrade:?}"))
    })
    .await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let changes = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = vec![0; 4096];
                let length = stream.read(&mut head).await.unwrap();
                let head = String::from_utf8_lossy(&head[..length]).into_owned();
                let to = if head.contains("/lies") { "other" } else { "shouting" };
                let answer = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {to}\r\ncontent-length: 0\r\n\r\nAT ONCE "
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
                let (mut read, mut write) = stream.split();
                let mut byte = [0];
                while matches!(read.read(&mut byte).await, Ok(1)) {
                    write.write_all(&byte.map(|byte| byte.to_ascii_uppercase())).await.unwrap();
                }
            });
        }
    });
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let node = NodeSpec::named("far").serving(format!("polite={}", polite.addr)).serving(format!("changes={changes}"));
    cluster.add(&node).await.unwrap();
    for service in ["polite", "changes"] {
        is_known(&cluster, "seed", service, 1).await;
    }
    let door = cluster.node("seed").outbound;
    let ask = |host: &'static str, path: &'static str, upgrade: &'static str| async move {
        let mut stream = TcpStream::connect(door).await.unwrap();
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: {host}.mesh.internal\r\nconnection: keep-alive, Upgrade\r\nupgrade: {upgrade}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tokio::time::timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap());
        }
        (String::from_utf8(head).unwrap().to_lowercase(), stream)
    };

    let (head, mut stream) = ask("changes", "/", "shouting").await;
    assert!(head.starts_with("http/1.1 101 ") && head.contains("upgrade: shouting"), "{head}");
    stream.write_all(b"hello").await.unwrap();
    let mut said = [0; 13];
    stream.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"AT ONCE HELLO");

    // It may answer as if it had not been asked; and nobody passes on that another version of HTTP was asked for.
    for (upgrade, seen) in [("shouting", "some(\"shouting\")"), ("h2c", "none")] {
        let (head, mut stream) = ask("polite", "/", upgrade).await;
        assert!(head.starts_with("http/1.1 200 ") && !head.contains("starling-"), "{head}");
        let mut body = vec![0; "as before, asked for ".len() + seen.len()];
        stream.read_exact(&mut body).await.unwrap();
        assert!(String::from_utf8_lossy(&body).to_lowercase().ends_with(seen), "{}", String::from_utf8_lossy(&body));
    }
    let (head, _) = ask("changes", "/lies", "shouting").await;
    assert!(head.starts_with("http/1.1 502 ") && head.contains("http_upgrade_failed"), "{head}");
}

/// What went through a tunnel of HTTP nobody would see: neither whose it is, nor where it goes.
#[tokio::test]
async fn no_tunnel_is_opened_for_http_within_http() {
    let Some(stage) = stage().await else { return };
    let tls = tokio_rustls::TlsConnector::from(Arc::new(raw_h3::tls_config(None, b"h2").unwrap()));
    let public = TcpStream::connect(stage.public).await.unwrap();
    let public = tls.connect(HOST.try_into().unwrap(), public).await.unwrap();
    let mut send = http2(public).await;
    let endpoint = endpoint(None, b"h3").unwrap();
    for protocol in ["h2c", "H2C", "h2", "http/1.1", "TLS/1.2"] {
        let request = Request::builder().method(Method::CONNECT).uri(format!("https://{HOST}/chat"));
        let request = request.extension(h2::ext::Protocol::from(protocol)).body(()).unwrap();
        let (answer, _upload) = send.send_request(request, false).unwrap();
        assert_eq!(answer.await.unwrap().status(), StatusCode::NOT_IMPLEMENTED, "{protocol} over h2");
        let client = RawClient::dial(&endpoint, stage.public, HOST).await.unwrap();
        let (scheme, path) = ((":scheme", "https"), (":path", "/chat"));
        let connect = head(&[(":method", "CONNECT"), (":protocol", protocol), scheme, (":authority", HOST), path]);
        let (mut send, mut receive) = client.open(&connect).await.unwrap();
        send.finish().unwrap();
        let seen = tokio::time::timeout(LIMIT, receive.read_to_end(4096)).await.unwrap().unwrap();
        assert_eq!(heads(&seen).unwrap()[0].0, 501, "{protocol} over h3");
    }
}

/// Who stays open beyond a drain's deadline is told that its node goes away, at both ends: first the caller's node, then the
/// service's.
#[tokio::test]
async fn a_drain_closes_websockets_with_1001_at_its_deadline() {
    let (tell, mut told) = tokio::sync::mpsc::channel(4);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let tell = tell.clone();
            tokio::spawn(async move {
                let mut head = vec![0; 4096];
                let length = stream.read(&mut head).await.unwrap();
                let head = String::from_utf8_lossy(&head[..length]).into_owned();
                let key = head.lines().find_map(|line| line.strip_prefix("sec-websocket-key: ")).unwrap();
                let accept = starling_http::tunnel::accept_of(key.as_bytes());
                let answer = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: \
                     {}\r\n\r\n",
                    accept.to_str().unwrap()
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
                // A frame of which the rest is still to come must not be broken into.
                stream.write_all(&[0x82, 4, 1, 2]).await.unwrap();
                let mut all = Vec::new();
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
                stream.write_all(&[3, 4]).await.unwrap();
                let _ = stream.read_to_end(&mut all).await;
                let _ = tell.send(all).await;
            });
        }
    });
    for drained in ["near", "far"] {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        cluster.add(&NodeSpec::named("far").serving(format!("chat={addr}"))).await.unwrap();
        cluster.add(&NodeSpec::named("near")).await.unwrap();
        is_known(&cluster, "near", "chat", 1).await;
        let mut stream = TcpStream::connect(cluster.node("near").outbound).await.unwrap();
        let head = "GET / HTTP/1.1\r\nhost: chat\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: \
                    13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tokio::time::timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap());
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        assert!(head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
        cluster.node(drained).process.signal("TERM").await.unwrap();
        let mut seen = Vec::new();
        let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut seen)).await.unwrap();
        assert_eq!(seen, [0x82, 4, 1, 2, 3, 4, 0x88, 2, 0x03, 0xe9], "the client, when {drained} drains");
        let service = tokio::time::timeout(LIMIT, told.recv()).await.unwrap().unwrap();
        assert_eq!(service, [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9], "the service, when {drained} drains");
        assert!(cluster.terminate(drained).await.is_ok());
    }
}

/// A client that breaks off in the middle of the handshake leaves nothing behind. It used to leave its task, its place and its
/// descriptor, for ever.
#[tokio::test]
async fn a_handshake_that_breaks_off_leaves_nothing() {
    let Some(stage) = stage().await else { return };
    let edge = stage.cluster.node("edge");
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", edge.process.pid().unwrap())).unwrap().count();
    let before = descriptors();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(edge.outbound).await.unwrap();
        let head = "GET / HTTP/1.1\r\nhost: chat\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: \
                    13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x01";
        stream.write_all(head.as_bytes()).await.unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
    super::figure_becomes(&stage.cluster, "edge", "starling_calls_in_flight", &[], |calls| calls == 0.0).await;
    wait_for("all is closed", LIMIT, || async {
        let now = descriptors();
        if now <= before + 3 { Ok(()) } else { Err(format!("{now}, {before} before")) }
    })
    .await
    .unwrap();
}

/// A service that shouts where it is asked to, and otherwise says its name.
async fn named(name: &'static str) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = vec![0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut head).await {
                    let asked = String::from_utf8_lossy(&head[..length]).contains("upgrade: shouting");
                    let answer = match asked {
                        true => "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: shouting\r\n\r\n"
                            .into(),
                        false => format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len()),
                    };
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

/// Tunnels that are open beside calls say nothing about how busy an instance is: one that has just started, and has none, must
/// not get all calls.
#[tokio::test]
async fn idle_tunnels_drive_no_calls_away() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    cluster.add(&NodeSpec::named("old").serving(format!("web={}", named("old").await))).await.unwrap();
    is_known(&cluster, "seed", "web", 1).await;
    let door = cluster.node("seed").outbound;
    let mut open = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(door).await.unwrap();
        let head = "GET / HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: shouting\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 101");
        open.push(stream);
    }
    cluster.add(&NodeSpec::named("new").serving(format!("web={}", named("new").await))).await.unwrap();
    is_known(&cluster, "seed", "web", 2).await;
    let mut by_old = 0;
    for _ in 0..200 {
        let answer = starling_chaos::Client::plain().get(door, "web", "/").await.unwrap();
        by_old += usize::from(answer.text() == "old");
    }
    assert!((20..=180).contains(&by_old), "{by_old} of 200");
}
