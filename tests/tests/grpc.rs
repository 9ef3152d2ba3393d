//! gRPC through the mesh: a server and a client from PyPI, in all four kinds, with what its users rely on.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::Request;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_tests::{binary, client_script, grpc_web_package, is_known, listening, program, python, run};

/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn grpc_works_in_all_kinds_with_deadlines_and_cancellation() {
    let Some(python) = python() else { return };
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (script, addr) = (client_script("grpc_echo.py"), free_port());
    // It ends each connection after half a second, as servers behind balancers do.
    let port = addr.port().to_string();
    let args = [&script, "serve", "--port", &port, "--connection-age-ms", "500"];
    let server = Process::start(&python, args, &cluster.dir().join("grpc.log")).unwrap();
    listening(addr).await;
    cluster.add(&NodeSpec::named("a").serving(format!("grpc={addr},protocol=h2c"))).await.unwrap();
    is_known(&cluster, "seed", "grpc", 1).await;

    let door = cluster.node("seed").outbound.to_string();
    let (ok, out, err) = run(&python, &[&script, "call", "--target", &door, "--authority", "grpc.mesh.internal"]);
    assert!(ok, "{out} {err}");
    let results: serde_json::Value = serde_json::from_str(&out).unwrap();
    for call in ["unary", "server-stream", "client-stream", "bidi", "fail", "deadline", "cancel", "many"] {
        assert_eq!(results[call]["ok"], true, "{results}");
    }
    // What was given up, by its deadline and by its caller, has ended at the service, too.
    wait_for("the service is told", LIMIT, || async {
        match server.log().matches("ended Hang").count() {
            2 => Ok(()),
            ended => Err(format!("{ended} of 2")),
        }
    })
    .await
    .unwrap();

    // A fault of the mesh reaches a gRPC caller as a gRPC status.
    let args = [&script, "call", "--target", &door, "--authority", "nothing.mesh.internal", "--only", "unary"];
    let (ok, out, err) = run(&python, &args);
    assert!(!ok && format!("{out}{err}").contains("UNIMPLEMENTED"), "{out} {err}");
}

/// As grpcurl does it: what there is, and how to speak to it, is asked of the service itself.
#[tokio::test]
async fn a_client_that_knows_nothing_finds_its_way_by_reflection() {
    let Some(python) = python() else { return };
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (script, addr) = (client_script("grpc_by_reflection.py"), free_port());
    let args = [&script, "serve", "--port", &addr.port().to_string()];
    let _server = Process::start(&python, args, &cluster.dir().join("grpc.log")).unwrap();
    listening(addr).await;
    cluster.add(&NodeSpec::named("a").serving(format!("clock={addr},protocol=h2c"))).await.unwrap();
    is_known(&cluster, "seed", "clock", 1).await;
    let door = cluster.node("seed").outbound.to_string();
    let (ok, out, err) = run(&python, &[&script, "call", "--target", &door, "--authority", "clock.mesh.internal"]);
    assert!(ok, "{out} {err}");
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    let services = ["grpc.reflection.v1alpha.ServerReflection", "time.Clock"];
    assert_eq!(told, serde_json::json!({"services": services, "methods": ["time.Clock.Add"], "sum": 42}));
}

const HOST: &str = "api.example.com";

/// An edge where pages may call the echo service.
struct Pages {
    cluster: Cluster,
    addr: SocketAddr,
    cert: PathBuf,
    service: Process,
}

async fn pages() -> Option<Pages> {
    let python = python()?;
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (script, service) = (client_script("grpc_echo.py"), free_port());
    let args = [&script, "serve", "--port", &service.port().to_string()];
    let process = Process::start(&python, args, &cluster.dir().join("grpc.log")).unwrap();
    listening(service).await;
    cluster.add(&NodeSpec::named("a").serving(format!("grpc={service},protocol=h2c"))).await.unwrap();
    let (cert, key) = (cluster.dir().join("edge.pem"), cluster.dir().join("edge.key"));
    self_signed(&[HOST, &format!("page.{HOST}")], &cert, &key).unwrap();
    let addr = free_port();
    let sections = format!(
        r#"[edge]
listen = "{addr}"
[[certificate]]
hosts = ["{HOST}", "page.{HOST}"]
cert = {cert:?}
key = {key:?}
[[route]]
path = "/echo.Echo"
service = "grpc"
auth = []
grpc_web = true
cors = {{ origins = ["https://page.{HOST}:{port}"] }}
[[route]]
path = "/plain"
service = "grpc"
auth = []
strip_prefix = true
[[route]]
path = "/down"
service = "down"
auth = []
grpc_web = true
"#,
        port = addr.port()
    );
    cluster.add_edge("edge", &sections).await.unwrap();
    is_known(&cluster, "edge", "grpc", 1).await;
    Some(Pages { cluster, addr, cert, service: process })
}

/// A message of gRPC: not compressed, its length, itself.
fn message(text: &[u8]) -> Vec<u8> {
    [&[0][..], &(text.len() as u32).to_be_bytes(), text].concat()
}

/// The messages of an answer, and its trailers.
fn messages(mut body: &[u8]) -> (Vec<String>, Option<String>) {
    let mut told = Vec::new();
    while let Some((head, rest)) = body.split_first_chunk::<5>() {
        let (text, rest) = rest.split_at(u32::from_be_bytes(head[1..].try_into().unwrap()) as usize);
        let text = String::from_utf8(text.to_vec()).unwrap();
        if head[0] == 0x80 {
            assert!(rest.is_empty(), "something comes behind the trailers");
            return (told, Some(text));
        }
        told.push(text);
        body = rest;
    }
    (told, None)
}

impl Pages {
    async fn ask(&self, door: Door, path: &str, kind: &str, body: Vec<u8>) -> Answer {
        let client = Client::trusting(&self.cert).unwrap();
        let request = Request::post(format!("https://{HOST}{path}")).header("content-type", kind);
        client.send(door, self.addr, request.body(Bytes::from(body)).unwrap()).await.unwrap()
    }
}

#[tokio::test]
async fn pages_call_by_grpc_web_over_every_protocol() {
    let Some(pages) = pages().await else { return };
    for door in Door::PUBLIC {
        for text in [false, true] {
            let kind = if text { "application/grpc-web-text+proto" } else { "application/grpc-web+proto" };
            let ask = async |path: &str, sent: &str| {
                // As text, in two parts with padding of their own.
                let [length, rest] = [&message(sent.as_bytes())[..5], sent.as_bytes()];
                let coded = STANDARD.encode(length) + &STANDARD.encode(rest);
                let body = if text { coded.into_bytes() } else { [length, rest].concat() };
                let answer = pages.ask(door, path, kind, body).await;
                let (came, _) = kind.split_once('+').unwrap();
                assert_eq!((answer.status, answer.header("content-type")), (200, came), "{door:?} {path}");
                assert_eq!(answer.header("grpc-status"), "", "{door:?} {path}: in the head, where pages may not look");
                let fours = |body: &[u8]| {
                    // Padded wherever a piece ended.
                    let text = std::str::from_utf8(body).unwrap();
                    let fours = (0..text.len()).step_by(4).map(|at| STANDARD.decode(&text[at..at + 4]).unwrap());
                    fours.flatten().collect::<Vec<u8>>()
                };
                messages(&if text { fours(&answer.body) } else { answer.body.to_vec() })
            };
            let (told, trailers) = ask("/echo.Echo/Unary", "hello").await;
            let trailers = trailers.unwrap();
            assert_eq!(told, ["hello"], "{door:?}");
            assert!(trailers.contains("grpc-status:0\r\n") && trailers.contains("x-trailer:served\r\n"), "{trailers}");
            let (told, trailers) = ask("/echo.Echo/ServerStream", "3").await;
            assert_eq!(told, ["msg-0", "msg-1", "msg-2"], "{door:?}");
            assert!(trailers.unwrap().contains("grpc-status:0\r\n"), "{door:?}");
            let (told, trailers) = ask("/echo.Echo/Fail", "x").await;
            assert!(told.is_empty() && trailers.unwrap().contains("grpc-status:8\r\n"), "{door:?}");
            // Faults of the edge and of the mesh, too: no route, no instance.
            for (path, status) in [("/nowhere", 12), ("/down/x.Y/Z", 12)] {
                let (told, trailers) = ask(path, "x").await;
                let trailers = trailers.unwrap();
                assert!(
                    told.is_empty() && trailers.contains(&format!("grpc-status:{status}\r\n")),
                    "{path} {trailers}"
                );
            }
        }
        // What is not base64 ends the call, and nothing else.
        let answer = pages.ask(door, "/echo.Echo/Unary", "application/grpc-web-text", b"!!!!".to_vec()).await;
        assert_eq!(answer.header("content-type"), "application/grpc-web-text", "{door:?}");
        let told = messages(&STANDARD.decode(&answer.body).unwrap()).1.unwrap();
        assert!(told.contains("grpc-status:13\r\n") && told.contains("broke off"), "{door:?}: {told:?}");
        // A service behind another route gets what was sent: it may speak gRPC-Web itself. This one does not.
        let answer = pages.ask(door, "/plain/echo.Echo/Unary", "application/grpc-web", message(b"x")).await;
        assert!(!answer.text().contains("grpc-status:0"), "{door:?}: {}", answer.text());
    }
}

/// The page is told in the last frame, and the log says so, too: the body has come to its end as HTTP sees it.
#[tokio::test]
async fn a_stream_of_a_page_that_broke_off_is_cut() {
    let (Some(mut pages), Some(curl)) = (pages().await, program("curl")) else { return };
    let dir = pages.cluster.dir().to_path_buf();
    let request = dir.join("request");
    std::fs::write(&request, STANDARD.encode(message(b"x"))).unwrap();
    let mut clients: Vec<_> = ["--http1.1", "--http2"]
        .into_iter()
        .map(|protocol| {
            let (port, ip) = (pages.addr.port(), pages.addr.ip());
            let (url, to) = (format!("https://{HOST}:{port}/echo.Echo/Stall"), format!("{HOST}:{port}:{ip}"));
            let (cert, sent) = (pages.cert.display().to_string(), format!("@{}", request.display()));
            let kind = "content-type: application/grpc-web-text";
            let args =
                ["-sSN", protocol, "--resolve", &to, "--cacert", &cert, "-H", kind, "--data-binary", &sent, &url];
            Process::start(&curl, args, &dir.join(format!("curl{protocol}.log"))).unwrap()
        })
        .collect();
    let begun = STANDARD.encode(message(b"begun"));
    for client in &clients {
        wait_for("the stream has begun", LIMIT, || async {
            client.output().contains(&begun).then_some(()).ok_or_else(|| client.output() + &client.log())
        })
        .await
        .unwrap();
    }
    pages.service.kill().await.unwrap();
    for client in &mut clients {
        assert!(client.wait(LIMIT).await.unwrap().success(), "{}", client.log());
        let last = STANDARD.decode(&client.output()[begun.len()..]).unwrap();
        let (told, trailers) = messages(&last);
        assert!(told.is_empty() && trailers.unwrap().contains("grpc-status:14\r\n"), "{last:?}");
    }
    let cut = || pages.cluster.node("edge").process.output().matches("\"status\":200,\"cut\":true").count();
    wait_for("both are logged", LIMIT, || async { (cut() == 2).then_some(()).ok_or_else(|| cut().to_string()) })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_page_in_chromium_calls_by_grpc_web() {
    let (Some(pages), Some(_), Some(package)) = (pages().await, program("chromium"), grpc_web_package()) else {
        return;
    };
    let (script, python) = (client_script("chromium_grpc_web.py"), program("python3").unwrap());
    let (url, to) = (format!("https://{HOST}:{}", pages.addr.port()), pages.addr.to_string());
    let (package, cert) = (package.display().to_string(), pages.cert.display().to_string());
    for (flag, protocol) in [(None, "h2"), (Some("--quic"), "h3")] {
        let mut args = vec![&*script, &url, "--package", &package, "--cert", &cert, "--connect", &to];
        args.extend(flag);
        let (ok, out, err) = run(&python, &args);
        assert!(ok, "{protocol}: {out} {err} {}", pages.cluster.node("edge").process.log());
        let told: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(told["protocols"], serde_json::json!([protocol]), "{told}");
        for format in ["text", "binary"] {
            let told = &told[format];
            assert_eq!((&told["unary"], &told["trailer"]), (&true.into(), &"served".into()), "{protocol}: {told}");
            assert_eq!(told["failed"], serde_json::json!([8, "no more"]), "{protocol}: {told}");
            assert_eq!((&told["late"], &told["unknown"]), (&4.into(), &12.into()), "{protocol}: {told}");
        }
        assert_eq!(told["text"]["stream"], true, "{protocol}: {told}");
    }
}
