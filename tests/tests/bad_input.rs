//! Wrong input: each gets a clear error, and loses nothing.

use std::{path::Path, time::Duration};

use starling_chaos::{Cluster, NodeSpec, Process, free_port, starling, wait_for};
use starling_protocol::admin::{MemberStatus, Status};
use starling_tests::{binary, broken_server, call};

/// Runs a command that must fail; returns its exit code and what it said.
async fn fails(args: &[&str]) -> (i32, String) {
    let (status, out, err) = starling(binary(), args).await.unwrap();
    assert!(!status.success(), "{args:?} succeeded: {out}");
    assert!(!err.contains("panicked"), "{err}");
    (status.code().unwrap_or(-1), err)
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_string_lossy().into_owned()
}

#[tokio::test]
async fn init_refuses_to_overwrite() {
    let dir = dir();
    let state = path(dir.path(), "s");
    starling(binary(), ["init", "--mesh", "one", "--state", &state]).await.unwrap();
    let root = std::fs::read(dir.path().join("s/root/cert.pem")).unwrap();
    let (code, said) = fails(&["init", "--mesh", "two", "--state", &state]).await;
    assert!(code == 1 && said.contains("holds the mesh \"one\" already"), "{said}");
    assert_eq!(std::fs::read(dir.path().join("s/root/cert.pem")).unwrap(), root);
}

#[tokio::test]
async fn usage_and_unreachable_have_their_exit_codes() {
    for args in
        [&["node", "--listen", "nowhere"][..], &["nosuch"], &["init"], &["init", "--mesh", "A B", "--state", "x"]]
    {
        assert_eq!(fails(args).await.0, 2, "{args:?}");
    }
    let nobody = format!("http://{}", free_port());
    let (code, said) = fails(&["members", "--admin", &nobody]).await;
    assert!(code == 3 && said.contains("no node answers") && said.contains("--admin"), "{said}");
    for later in ["top", "tap", "chaos", "doctor"] {
        assert_eq!(fails(&[later]).await.0, 2, "{later} must not be a stub");
    }
    for flag in ["--service", "--upstream"] {
        let (code, said) = fails(&["node", "--state", "/tmp", flag, "db=127.0.0.1:1,protocol=sctp"]).await;
        assert!(code == 2 && said.contains("tcp or udp"), "{flag}: {said}");
    }
}

#[tokio::test]
async fn check_finds_every_error_with_its_line() {
    let dir = dir();
    let file = path(dir.path(), "bad.toml");
    let text = "[node]\nnmae = \"a\"\nlisten = \"nowhere\"\n[edge]\nlisten = \"127.0.0.1:1\"\n[[route]]\nservice = \"orders\"\n";
    std::fs::write(&file, text).unwrap();
    let (code, said) = fails(&["check", &file]).await;
    assert_eq!(code, 4, "{said}");
    for line in [":2:", ":3:"] {
        assert!(said.contains(line), "{line} in {said}");
    }
    let text = "[edge]\nlisten = \"127.0.0.1:1\"\n[[route]]\nservice = \"orders\"\nauth = [\"jwt\"]\nplan = \"gold\"\n";
    std::fs::write(&file, text).unwrap();
    let (_, said) = fails(&["check", &file]).await;
    for needle in ["no certificate", "gold", ":6:", "[jwt]"] {
        assert!(said.contains(needle), "{needle} in {said}");
    }
    std::fs::write(&file, "[node]\nname = \"a\"\n").unwrap();
    let (status, out, _) = starling(binary(), ["check", &file]).await.unwrap();
    assert!(status.success() && out.contains("ok"), "{out}");
}

#[tokio::test]
async fn a_node_says_why_it_does_not_start() {
    let dir = dir();
    let node = |state: &str| {
        let own = |a: std::net::SocketAddr| a.to_string();
        [
            "node",
            "--name",
            "x",
            "--state",
            state,
            "--listen",
            &own(free_port()),
            "--admin",
            &own(free_port()),
            "--outbound",
            &own(free_port()),
        ]
        .map(String::from)
        .to_vec()
    };
    let said = |args: Vec<String>| async move { fails(&args.iter().map(String::as_str).collect::<Vec<_>>()).await.1 };

    let empty = path(dir.path(), "empty");
    assert!(said(node(&empty)).await.contains("no token to join with"));
    let mut args = node(&empty);
    args.extend(["--token".into(), "hello".into()]);
    assert!(said(args).await.contains("not a join token"));
    let mut args = node(&empty);
    args.extend(["--token-file".into(), path(dir.path(), "missing")]);
    assert!(said(args).await.contains("token file"));
    for workers in ["0", "65"] {
        let mut args = node(&empty);
        args.extend(["--workers".into(), workers.into()]);
        assert!(said(args).await.contains("node.workers: from 1 to 64"));
    }
    let mut args = node(&empty);
    args.extend(["--service".into(), "a=192.0.2.1:80".into()]);
    assert!(said(args).await.contains("loopback"));

    // A port in use, TCP and UDP, before anything of a token is spent.
    let state = path(dir.path(), "s");
    starling(binary(), ["init", "--mesh", "m", "--state", &state]).await.unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut args = node(&state);
    args[8] = taken.local_addr().unwrap().to_string();
    let text = said(args).await;
    assert!(text.contains("admin API") && text.contains("another process has the port"), "{text}");
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut args = node(&state);
    args[6] = taken.local_addr().unwrap().to_string();
    let text = said(args).await;
    assert!(text.contains("mesh port") && text.contains("another process has the port"), "{text}");

    // Two nodes on one state directory.
    let running = Process::start(binary(), node(&state), &dir.path().join("n.log")).unwrap();
    wait_for("the node is up", Duration::from_secs(60), || async {
        if running.log().contains("node is up") { Ok(()) } else { Err(running.log()) }
    })
    .await
    .unwrap();
    assert!(said(node(&state)).await.contains("in use by another running node"));
}

#[tokio::test]
async fn tokens_are_refused_with_the_reason() {
    let cluster = Cluster::start(binary()).await.unwrap();
    let other = Cluster::start(binary()).await.unwrap();
    let try_join = |token: String, service: &'static str, name: &'static str| {
        let state = path(cluster.dir(), &format!("try-{}", free_port().port()));
        async move {
            let own = || free_port().to_string();
            let service = format!("{service}=127.0.0.1:9");
            let (listen, admin, outbound) = (own(), own(), own());
            let args = [
                "node",
                "--name",
                name,
                "--state",
                &state,
                "--listen",
                &listen,
                "--admin",
                &admin,
                "--outbound",
                &outbound,
                "--service",
                &service,
                "--token",
                &token,
            ];
            let (code, said) = fails(&args).await;
            assert_eq!(code, 1, "{said}");
            said
        }
    };
    let state = cluster.node("seed").state.to_string_lossy().into_owned();
    let seed = cluster.seed().to_string();
    let token = |more: &'static [&'static str]| {
        let fixed = ["token", "create", "--state", &state, "--seed", &seed, "--service", "orders"];
        let args = [&fixed, more].concat();
        let args: Vec<String> = args.into_iter().map(String::from).collect();
        async move { starling(binary(), args).await.unwrap().1.trim().to_string() }
    };

    let expired = token(&["--ttl", "0s"]).await;
    assert!(try_join(expired, "orders", "a").await.contains("expired"));
    let good = token(&[]).await;
    assert!(try_join(good.clone(), "users", "a").await.contains("does not grant service users"), "grants are strict");
    assert!(try_join(good, "orders", "seed").await.contains("the name \"seed\" belongs to another node"));

    // Another mesh's token at this mesh's seed.
    let mut foreign = vec!["token", "create", "--state"];
    let other_state = other.node("seed").state.to_string_lossy().into_owned();
    foreign.extend([other_state.as_str(), "--seed", &seed, "--service", "orders"]);
    let foreign = starling(binary(), foreign).await.unwrap().1.trim().to_string();
    assert!(try_join(foreign, "orders", "a").await.contains("belongs to another mesh"));

    // A forged one: the claims of a real token under a made-up secret.
    let mut forged: starling_protocol::JoinToken = token(&[]).await.parse().unwrap();
    forged.secret = [7; 32];
    assert!(try_join(forged.to_string(), "orders", "a").await.contains("not made by this mesh's issuer"));

    // None of the refused attempts left a member behind.
    let status: Status = cluster.admin("seed", "/v1/status").await.unwrap();
    assert_eq!(status.members, 1);
}

#[tokio::test]
async fn a_token_is_good_for_its_uses_also_through_a_relay_and_over_a_restart_of_the_issuer() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    cluster.add(&NodeSpec::named("relay")).await.unwrap();
    cluster.converge().await.unwrap();
    let state = cluster.node("seed").state.to_string_lossy().into_owned();
    let relay = cluster.node("relay").mesh.to_string();
    let token =
        cluster.run(&["token", "create", "--state", &state, "--seed", &relay]).await.unwrap().trim().to_string();
    let join = |name: &'static str| {
        let own = || free_port().to_string();
        [
            "node",
            "--name",
            name,
            "--state",
            &path(cluster.dir(), name),
            "--listen",
            &own(),
            "--admin",
            &own(),
            "--outbound",
            &own(),
            "--token",
            &token,
            "--seed",
            &relay,
        ]
        .map(String::from)
        .to_vec()
    };
    let _first = Process::start(binary(), join("first"), &cluster.dir().join("first.log")).unwrap();
    let second = join("second");
    cluster.wait_status("seed", "first", MemberStatus::Alive).await.unwrap();
    cluster.kill("seed").await.unwrap();
    cluster.restart("seed").await.unwrap();
    cluster.wait_status("relay", "seed", MemberStatus::Alive).await.unwrap();
    let said = fails(&second.iter().map(String::as_str).collect::<Vec<_>>()).await.1;
    assert!(said.contains("used already"), "{said}");
}

#[tokio::test]
async fn an_unreachable_seed_is_retried_and_said() {
    let cluster = Cluster::start(binary()).await.unwrap();
    let gone = free_port();
    // The flag names a dead seed first, the token itself a live one.
    let alive: starling_protocol::JoinToken = cluster.token(&[]).await.unwrap().parse().unwrap();
    let own = || free_port().to_string();
    let args = [
        "node",
        "--name",
        "a",
        "--state",
        &path(cluster.dir(), "a"),
        "--listen",
        &own(),
        "--admin",
        &own(),
        "--outbound",
        &own(),
        "--token",
        &alive.to_string(),
        "--seed",
        &gone.to_string(),
    ]
    .map(String::from);
    let node = Process::start(binary(), args, &cluster.dir().join("a.log")).unwrap();
    cluster.wait_status("seed", "a", MemberStatus::Alive).await.unwrap();
    let log = node.log();
    assert!(log.contains("seed does not answer") && log.contains(&gone.to_string()), "{log}");
}

#[tokio::test]
async fn faults_of_a_service_have_their_status_and_proxy_status() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let dead = free_port();
    cluster.add(&NodeSpec::named("a").serving(format!("dead={dead}"))).await.unwrap();
    cluster.converge().await.unwrap();
    let door = cluster.node("seed").outbound;
    let check = |answer: starling_chaos::Answer, status: u16, error: &str| {
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.header("proxy-status").contains(error), "{answer:?}");
        assert_eq!(answer.header("content-type"), "application/problem+json");
        assert!(answer.header("starling-sent").is_empty(), "internal fields stay inside: {answer:?}");
    };
    check(call(door, "nothing", "/").await, 404, "destination_not_found");
    check(call(door, "dead", "/").await, 502, "connection_refused");
    for (mode, status, error) in [
        ("reset", 502, "connection_terminated"),
        ("bad-status", 502, "http_protocol_error"),
        ("huge-header", 502, "http_protocol_error"),
    ] {
        let Some((_server, addr)) = broken_server(cluster.dir(), mode).await else { return };
        let name = format!("n-{mode}");
        cluster.add(&NodeSpec::named(&name).serving(format!("{mode}={addr}"))).await.unwrap();
        cluster.converge().await.unwrap();
        check(call(door, mode, "/").await, status, error);
    }
    cluster.kill("a").await.unwrap();
    cluster.wait_status("seed", "a", MemberStatus::Down).await.unwrap();
    check(call(door, "dead", "/").await, 503, "destination_unavailable");
}

#[tokio::test]
async fn a_body_that_breaks_off_is_never_complete() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for mode in ["cut", "cut-chunked"] {
        let Some((_server, addr)) = broken_server(cluster.dir(), mode).await else { return };
        cluster.add(&NodeSpec::named(mode).serving(format!("{mode}={addr}"))).await.unwrap();
        cluster.converge().await.unwrap();
        let host = format!("{mode}.mesh.internal");
        let broken = starling_chaos::Client::plain().get(cluster.node("seed").outbound, &host, "/").await;
        // The reset may overtake the head of the answer: then the caller gets an error of our own instead.
        let seen = broken.map_or(true, |answer| answer.status == 502);
        assert!(seen, "{mode}: a short body looked complete");
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_does_not_reach_the_service_as_complete() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let service = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = service.local_addr().unwrap();
    cluster.add(&NodeSpec::named("a").serving(format!("up={addr}"))).await.unwrap();
    cluster.converge().await.unwrap();
    for head in ["Content-Length: 1000", "Transfer-Encoding: chunked"] {
        let mut caller = tokio::net::TcpStream::connect(cluster.node("seed").outbound).await.unwrap();
        let body = if head.starts_with('C') { "hello" } else { "5\r\nhello\r\n" };
        let request = format!("POST / HTTP/1.1\r\nHost: up.mesh.internal\r\n{head}\r\n\r\n{body}");
        caller.write_all(request.as_bytes()).await.unwrap();
        let (mut arrived, _) = tokio::time::timeout(Duration::from_secs(60), service.accept()).await.unwrap().unwrap();
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("hello") {
            let mut chunk = [0; 1024];
            let read = tokio::time::timeout(Duration::from_secs(60), arrived.read(&mut chunk)).await.unwrap().unwrap();
            assert!(read > 0, "the service was cut off before the body");
            seen.extend_from_slice(&chunk[..read]);
        }
        drop(caller);
        // The rest is an end of the connection or a reset, and never the end of a chunked body.
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(60), arrived.read_to_end(&mut rest)).await.unwrap();
        assert!(!String::from_utf8_lossy(&rest).contains("0\r\n\r\n"), "{head}: {ended:?} {rest:?}");
    }
}

#[tokio::test]
async fn malformed_requests_are_refused_and_never_forwarded() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (_service, addr) = starling_tests::sample(cluster.dir(), "store").await;
    cluster.add(&NodeSpec::named("a").serving(format!("store={addr}"))).await.unwrap();
    cluster.converge().await.unwrap();
    let door = cluster.node("seed").outbound;
    let many = "X-A: 1\r\n".repeat(200);
    let long = format!("X-A: {}\r\n", "a".repeat(100 << 10));
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n".to_string(), "400"),
        ("GET / HTTP/1.1\r\nHost: store\r\nHost: store\r\n\r\n".into(), "400"),
        ("GET http://store/ HTTP/1.1\r\nHost: other\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\nHost: a@store\r\n\r\n".into(), "400"),
        ("POST / HTTP/1.1\r\nHost: store\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!".into(), "400"),
        ("POST / HTTP/1.1\r\nHost: store\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\nHost : store\r\n\r\n".into(), "400"),
        ("CONNECT store:443 HTTP/1.1\r\nHost: store:443\r\nContent-Length: 5\r\n\r\nhello".into(), "400"),
        ("CONNECT store:443 HTTP/1.1\r\nHost: other:443\r\n\r\n".into(), "400"),
        ("CONNECT / HTTP/1.1\r\nHost: store\r\n\r\n".into(), "400"),
        ("CONNECT store HTTP/1.1\r\nHost: store\r\n\r\n".into(), "400"),
        (format!("GET / HTTP/1.1\r\nHost: store\r\n{many}\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\nHost: store\r\n{long}\r\n"), "431"),
    ] {
        let mut caller = tokio::net::TcpStream::connect(door).await.unwrap();
        caller.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let read = tokio::time::timeout(Duration::from_secs(60), caller.read(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
        let first = answer.lines().next().unwrap_or_default().to_string();
        assert!(first.contains(status), "{first:?} for {:?}", &request[..request.len().min(80)]);
    }
    assert_eq!(call(door, "store", "/").await.status, 200);
}
