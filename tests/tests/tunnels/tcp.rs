//! TCP: over a port of its own, and by CONNECT.

use std::{future::Future, io::ErrorKind, net::SocketAddr, time::Duration};

use http::{Method, Request};
use starling_chaos::{Client, Cluster, NodeSpec, Process, free_port, wait_for};
use starling_tests::{binary, is_known, listening, program, run, sample};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{LIMIT, figure, figure_becomes, mesh, read_all};

/// A server that does the same with each connection.
async fn server<F>(each: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(each(stream));
        }
    });
    addr
}

/// Says a word first, then repeats what it is told, until there is no more of it.
async fn echo() -> SocketAddr {
    server(|mut stream| async move {
        stream.write_all(b"hello\n").await?;
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await?;
        write.shutdown().await
    })
    .await
}

fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let (cluster, port) = mesh("db", echo().await, "tcp").await;
    // The server speaks first, and a byte goes as soon as it is there.
    let mut stream = TcpStream::connect(port).await.unwrap();
    let mut word = [0; 6];
    stream.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"hello\n");
    for byte in *b"typed" {
        stream.write_all(&[byte]).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), byte);
    }
    // Much at once, of which the end comes back behind all of it.
    let sent = pattern(16 << 20);
    let (mut read, mut write) = stream.into_split();
    let writing = tokio::spawn({
        let sent = sent.clone();
        async move {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
            write
        }
    });
    let back = read_all(&mut read).await.unwrap();
    assert!(back == sent, "{} bytes came back of {}", back.len(), sent.len());
    drop(writing.await.unwrap());
    let all = sent.len() as f64;
    let bytes = |of| ["side=\"client\"", of];
    for of in ["of=\"request\"", "of=\"response\""] {
        figure_becomes(&cluster, "near", "starling_call_size_bytes_total", &bytes(of), |bytes| bytes >= all).await;
    }
    assert_eq!(figure(&cluster, "near", "starling_calls_broken_total", &[]).await, 0.0);
}

/// One that has said all may still listen, and the other way round.
#[tokio::test]
async fn half_of_a_tunnel_may_be_over_for_long() {
    let addr = server(|mut stream| async move {
        // All that it says, it says before it was told a thing.
        stream.write_all(b"all I have to say").await?;
        stream.shutdown().await?;
        let mut told = Vec::new();
        stream.read_to_end(&mut told).await?;
        let told = if told == pattern(300_000) { 1 } else { 2 };
        TOLD.store(told, std::sync::atomic::Ordering::SeqCst);
        Ok(())
    })
    .await;
    static TOLD: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);
    let (_cluster, port) = mesh("db", addr, "tcp").await;
    let (mut read, mut write) = TcpStream::connect(port).await.unwrap().into_split();
    assert_eq!(read_all(&mut read).await.unwrap(), b"all I have to say");
    for piece in pattern(300_000).chunks(50_000) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        write.write_all(piece).await.unwrap();
    }
    write.shutdown().await.unwrap();
    wait_for("the server was told all", LIMIT, || async {
        match TOLD.load(std::sync::atomic::Ordering::SeqCst) {
            1 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await
    .unwrap();
}

/// What is left of it keeps to the limits of both: a service that closes, and a client that does not notice, hold nothing for ever.
#[tokio::test]
async fn half_of_a_tunnel_that_is_silent_ends() {
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let addr = server(move |mut stream| {
        let tell = tell.clone();
        async move {
            stream.shutdown().await?;
            let mut all = Vec::new();
            let ended = stream.read_to_end(&mut all).await;
            let _ = tell.send((all.len(), ended.is_ok())).await;
            Ok(())
        }
    })
    .await;
    let (port, mut cluster) = (free_port(), Cluster::start(binary()).await.unwrap());
    cluster.add(&NodeSpec::named("far").serving(format!("db={addr},protocol=tcp"))).await.unwrap();
    let file = cluster.dir().join("near.toml");
    let upstream =
        format!("[[upstream]]\nservice = \"db\"\nlisten = \"{port}\"\nprotocol = \"tcp\"\nidle_timeout = \"2s\"\n");
    std::fs::write(&file, upstream).unwrap();
    cluster.add(&NodeSpec::named("near").flag("--config").flag(file.to_string_lossy())).await.unwrap();
    is_known(&cluster, "near", "db", 1).await;
    let mut stream = TcpStream::connect(port).await.unwrap();
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "it has closed");
    // As long as something goes, it goes on.
    for _ in 0..8 {
        stream.write_all(b"x").await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let told = tokio::time::timeout(LIMIT, told.recv()).await.unwrap();
    assert_eq!(told, Some((8, false)), "it was told all, and that this was cut");
    wait_for("the client is told", LIMIT, || {
        let written = stream.try_write(b"x");
        async move { if written.is_err() { Ok(()) } else { Err("it is not".into()) } }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_reset_is_one_at_the_other_end_too() {
    // Half of what it promised, and then no end, but a reset.
    let breaks = server(|mut stream| async move {
        stream.write_all(&pattern(100_000)).await?;
        stream.read_u8().await?;
        reset(&stream);
        Ok(())
    })
    .await;
    let (_cluster, port) = mesh("db", breaks, "tcp").await;
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.read_exact(&mut vec![0; 100_000]).await.unwrap();
    stream.write_u8(1).await.unwrap();
    let error = read_all(&mut stream).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");

    // And the other way round.
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let listens = server(move |mut stream| {
        let tell = tell.clone();
        async move {
            stream.write_u8(1).await?;
            let mut all = Vec::new();
            let _ = tell.send(stream.read_to_end(&mut all).await.map(|_| all.len()).map_err(|e| e.kind())).await;
            Ok(())
        }
    })
    .await;
    let (_cluster, port) = mesh("db", listens, "tcp").await;
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.read_u8().await.unwrap();
    stream.write_all(b"half of a statement").await.unwrap();
    reset(&stream);
    drop(stream);
    let seen = tokio::time::timeout(LIMIT, told.recv()).await.unwrap().unwrap();
    assert_eq!(seen, Err(ErrorKind::ConnectionReset));
}

/// Sends a CONNECT by HTTP/1.1, and reads the head of the answer.
async fn connect(door: SocketAddr, target: &str, version: &str) -> (String, TcpStream) {
    let mut stream = TcpStream::connect(door).await.unwrap();
    let host = if version == "1.1" { format!("host: {target}\r\n") } else { String::new() };
    stream.write_all(format!("CONNECT {target} HTTP/{version}\r\n{host}\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tokio::time::timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap());
    }
    (String::from_utf8(head).unwrap(), stream)
}

#[tokio::test]
async fn connect_opens_tunnels_at_the_outbound_port() {
    let (mut cluster, _) = mesh("db", echo().await, "tcp").await;
    let (_web, addr) = sample(cluster.dir(), "web").await;
    let nobody = free_port();
    let node = NodeSpec::named("web").serving(format!("web={addr}")).serving(format!("down={nobody},protocol=tcp"));
    cluster.add(&node).await.unwrap();
    for service in ["web", "down"] {
        is_known(&cluster, "near", service, 1).await;
    }
    let door = cluster.node("near").outbound;

    for (target, version) in
        [("db.mesh.internal:5432", "1.1"), ("db.mesh:1", "1.1"), ("DB:443", "1.1"), ("db.mesh.internal:5432", "1.0")]
    {
        let (head, mut stream) = connect(door, target, version).await;
        assert!(head.starts_with(&format!("HTTP/{version} 200 ")), "{target}: {head}");
        stream.write_all(b"and on").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(read_all(&mut stream).await.unwrap(), b"hello\nand on", "{target}");
    }

    // By HTTP/2: as many as there are on one connection.
    let (mut send, connection) = h2::client::handshake(TcpStream::connect(door).await.unwrap()).await.unwrap();
    tokio::spawn(connection);
    let mut open = Vec::new();
    for _ in 0..3 {
        let request = Request::builder().method(Method::CONNECT).uri("db.mesh.internal:5432").body(()).unwrap();
        send = send.ready().await.unwrap();
        open.push(send.send_request(request, false).unwrap());
    }
    for (answer, mut upload) in open {
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), 200);
        upload.send_data("again".into(), true).unwrap();
        let (mut body, mut all) = (answer.into_body(), Vec::new());
        while let Some(data) = body.data().await {
            all.extend_from_slice(&data.unwrap());
        }
        assert_eq!(all, b"hello\nagain");
    }

    // Refused at once, with the reason.
    for (target, status, reason) in [
        ("down.mesh.internal:80", "502", "the service does not accept connections"),
        ("nobody.mesh.internal:80", "404", "no node of the mesh serves nobody"),
        ("www.example.com:443", "404", "is not a service of the mesh"),
    ] {
        let (head, mut stream) = connect(door, target, "1.1").await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")) && head.contains("proxy-status"), "{target}: {head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).await.unwrap();
        assert!(String::from_utf8_lossy(&body).contains(reason), "{target}: {}", String::from_utf8_lossy(&body));
    }

    // To a service that speaks HTTP, HTTP is what comes through, and each request is a call.
    let (head, mut stream) = connect(door, "web.mesh.internal:80", "1.1").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    for _ in 0..2 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: anything\r\n\r\n").await.unwrap();
        let mut some = vec![0; 4096];
        let length = tokio::time::timeout(LIMIT, stream.read(&mut some)).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&some[..length]).into_owned();
        assert!(text.starts_with("HTTP/1.1 200 OK") && text.contains("hello from web"), "{text}");
    }
    let curl = program("curl").map(|curl| {
        let proxy = format!("http://{door}");
        run(&curl, &["-sS", "--proxytunnel", "--proxy", &proxy, "http://web.mesh.internal/"])
    });
    assert!(curl.is_none_or(|(ok, out, err)| { ok && out.contains("web") || panic!("{out} {err}") }));

    // What is called the wrong way is told the right one.
    let answer = Client::plain().get(door, "db.mesh.internal", "/").await.unwrap();
    assert!(
        answer.status == 400 && answer.text().contains("upstream with protocol = \\\"tcp\\\""),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn an_upstream_port_to_nobody_resets_and_says_why_once() {
    let (cluster, port) = mesh("db", free_port(), "tcp").await;
    for _ in 0..5 {
        let mut stream = TcpStream::connect(port).await.unwrap();
        let error = read_all(&mut stream).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    let log = cluster.node("near").process.log();
    let said = log.lines().filter(|line| line.contains("comes to nothing")).collect::<Vec<_>>();
    assert!(said.len() == 1 && said[0].contains("connection_refused"), "{log}");
}

/// Another instance takes a connection that the first one refuses, since nothing was said to it.
#[tokio::test]
async fn a_connection_goes_to_an_instance_that_takes_it() {
    let (mut cluster, port) = mesh("db", free_port(), "tcp").await;
    cluster.add(&NodeSpec::named("other").serving(format!("db={},protocol=tcp", echo().await))).await.unwrap();
    is_known(&cluster, "near", "db", 2).await;
    for round in 0..10 {
        let mut stream = TcpStream::connect(port).await.unwrap();
        stream.write_all(b"first words").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(read_all(&mut stream).await.unwrap(), b"hello\nfirst words", "{round}");
    }
}

#[tokio::test]
async fn a_peer_that_dies_ends_its_tunnels_with_a_reset() {
    let (mut cluster, port) = mesh("db", echo().await, "tcp").await;
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.read_exact(&mut [0; 6]).await.unwrap();
    cluster.kill("far").await.unwrap();
    // Something is on its way, so that somebody notices before the connection's own idle time.
    stream.write_all(b"are you there?").await.unwrap();
    let error = read_all(&mut stream).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

#[tokio::test]
async fn a_drain_lets_tunnels_end_and_cuts_them_at_its_deadline() {
    let (mut cluster, port) = mesh("db", echo().await, "tcp").await;
    let mut ends = TcpStream::connect(port).await.unwrap();
    let mut stays = TcpStream::connect(port).await.unwrap();
    for stream in [&mut ends, &mut stays] {
        stream.read_exact(&mut [0; 6]).await.unwrap();
    }
    cluster.node("far").process.signal("TERM").await.unwrap();
    wait_for("far is draining", LIMIT, || async {
        let log = cluster.node("far").process.log();
        if log.contains("draining") { Ok(()) } else { Err(log) }
    })
    .await
    .unwrap();
    // Tunnels that are open go on meanwhile.
    ends.write_all(b"the rest").await.unwrap();
    ends.shutdown().await.unwrap();
    assert_eq!(read_all(&mut ends).await.unwrap(), b"the rest");
    assert!(read_all(&mut stays).await.is_err(), "cut off, not ended");
    let status = cluster.terminate("far").await;
    assert!(status.is_ok(), "{status:?}");
}

#[tokio::test]
async fn redis_answers_over_an_upstream_port() {
    let (Some(server), Some(cli)) = (program("redis-server"), program("redis-cli")) else { return };
    let addr = free_port();
    let dir = tempfile::tempdir().unwrap();
    let args = [
        "--port",
        &addr.port().to_string(),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        &dir.path().to_string_lossy(),
    ];
    let _redis = Process::start(&server, args, &dir.path().join("redis.log")).unwrap();
    listening(addr).await;
    let (_cluster, port) = mesh("cache", addr, "tcp").await;
    let redis = |args: &[&str]| run(&cli, &[&["-h", "127.0.0.1", "-p", &port.port().to_string()], args].concat());
    let (ok, out, err) = redis(&["set", "greeting", "hello"]);
    assert!(ok && out.trim() == "OK", "{out} {err}");
    assert_eq!(redis(&["get", "greeting"]).1.trim(), "hello");
}

/// Idle ones hold hardly anything, and new ones find room beside them.
#[tokio::test]
async fn a_thousand_idle_tunnels_are_no_burden() {
    let (cluster, port) = mesh("db", echo().await, "tcp").await;
    let before = [starling_tests::memory_kib(&cluster.node("near").process, "VmRSS:"), 0];
    let mut open = Vec::new();
    for _ in 0..1000 {
        let mut stream = TcpStream::connect(port).await.unwrap();
        stream.read_exact(&mut [0; 6]).await.unwrap();
        open.push(stream);
    }
    let after = starling_tests::memory_kib(&cluster.node("near").process, "VmRSS:");
    assert!(after.saturating_sub(before[0]) < 40 << 10, "{} KiB more for a thousand", after - before[0]);
    for stream in &mut open {
        stream.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
    }
}

/// A program in a pager takes nothing for a while, and wants the rest then.
#[tokio::test]
async fn a_reader_may_pause_for_longer_than_http_lets() {
    const PAUSE: Duration = Duration::from_secs(40);
    let much = 32 << 20;
    let gives = server(move |mut stream| async move {
        stream.write_all(&pattern(much)).await?;
        stream.shutdown().await
    })
    .await;
    let takes = server(move |mut stream| async move {
        tokio::time::sleep(PAUSE).await;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await?;
        stream.write_all(if all == pattern(much) { b"all" } else { b"not" }).await
    })
    .await;
    let (_down, down) = mesh("db", gives, "tcp").await;
    let (_up, up) = mesh("db", takes, "tcp").await;
    let uploading = tokio::spawn(async move {
        let mut stream = TcpStream::connect(up).await.unwrap();
        stream.write_all(&pattern(much)).await.unwrap();
        stream.shutdown().await.unwrap();
        read_all(&mut stream).await.unwrap()
    });
    let mut stream = TcpStream::connect(down).await.unwrap();
    tokio::time::sleep(PAUSE).await;
    assert!(read_all(&mut stream).await.unwrap() == pattern(much));
    assert_eq!(uploading.await.unwrap(), b"all");
}

/// Over CONNECT, too, half of what there is must not look like all of it.
#[tokio::test]
async fn what_breaks_off_breaks_off_over_connect_too() {
    let breaks = server(|mut stream| async move {
        stream.write_all(&pattern(10_000)).await?;
        stream.read_u8().await?;
        reset(&stream);
        Ok(())
    })
    .await;
    let (cluster, _) = mesh("db", breaks, "tcp").await;
    let (_, mut stream) = connect(cluster.node("near").outbound, "db:1", "1.1").await;
    stream.read_exact(&mut vec![0; 10_000]).await.unwrap();
    stream.write_u8(1).await.unwrap();
    let error = read_all(&mut stream).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

/// What a client sends behind a CONNECT without waiting for the answer are bytes of its tunnel, and never requests.
#[tokio::test]
async fn nothing_behind_a_refused_connect_is_a_request() {
    let (mut cluster, _) = mesh("db", echo().await, "tcp").await;
    let (_web, addr) = sample(cluster.dir(), "web").await;
    cluster.add(&NodeSpec::named("web").serving(format!("web={addr}"))).await.unwrap();
    is_known(&cluster, "near", "web", 1).await;
    let mut stream = TcpStream::connect(cluster.node("near").outbound).await.unwrap();
    let sent =
        "CONNECT www.example.com:443 HTTP/1.1\r\nhost: www.example.com:443\r\n\r\nGET / HTTP/1.1\r\nhost: web\r\n\r\n";
    stream.write_all(sent.as_bytes()).await.unwrap();
    let answer = String::from_utf8(read_all(&mut stream).await.unwrap()).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.matches("HTTP/1.1").count() == 1, "{answer}");
}

/// A client that is gone leaves nothing at the service, though that takes nothing.
#[tokio::test]
async fn callers_that_go_are_noticed_while_the_service_does_not_read() {
    let open = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = open.clone();
    let stuck = server(move |stream| {
        let open = counted.clone();
        async move {
            open.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            // It reads nothing, and sees only that the connection is reset.
            while stream.take_error()?.is_none() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            open.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }
    })
    .await;
    let (cluster, port) = mesh("db", stuck, "tcp").await;
    let mut callers = Vec::new();
    for _ in 0..10 {
        let mut stream = TcpStream::connect(port).await.unwrap();
        let _ = tokio::time::timeout(Duration::from_millis(300), stream.write_all(&pattern(8 << 20))).await;
        callers.push(stream);
    }
    let are_open = |wanted: usize| {
        let open = open.clone();
        wait_for("connections of the service", LIMIT, move || {
            let now = open.load(std::sync::atomic::Ordering::SeqCst);
            async move { if now == wanted { Ok(()) } else { Err(now.to_string()) } }
        })
    };
    are_open(10).await.unwrap();
    callers.iter().for_each(reset);
    drop(callers);
    are_open(0).await.unwrap();
    figure_becomes(&cluster, "near", "starling_calls_in_flight", &[], |calls| calls == 0.0).await;
}

/// A connection to a database lives for weeks, and a certificate for a day.
#[tokio::test]
async fn a_tunnel_outlives_the_certificates_that_it_began_with() {
    const TTL: Duration = Duration::from_secs(12);
    let cluster = starling_chaos::Cluster::start(starling_tests::binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let state = dir.join("short").to_string_lossy().into_owned();
    cluster.run(&["init", "--mesh", "short", "--state", &state]).await.unwrap();
    let ([mesh, admin, outbound, port], addr) = ([(); 4].map(|()| free_port()), echo().await);
    let text = format!(
        "[node]\nname = \"short\"\nstate = {state:?}\nlisten = \"{mesh}\"\ncert_ttl = \"{}s\"\n[admin]\nlisten = \
         \"{admin}\"\n[outbound]\nlisten = \"{outbound}\"\n[[service]]\nname = \"db\"\naddr = \"{addr}\"\nprotocol = \
         \"tcp\"\n[[upstream]]\nservice = \"db\"\nlisten = \"{port}\"\nprotocol = \"tcp\"\n",
        TTL.as_secs()
    );
    let file = dir.join("short.toml");
    std::fs::write(&file, text).unwrap();
    let _node =
        Process::start(starling_tests::binary(), ["node", "--config", &file.to_string_lossy()], &dir.join("short.log"))
            .unwrap();
    listening(port).await;
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.read_exact(&mut [0; 6]).await.unwrap();
    let begun = std::time::Instant::now();
    while begun.elapsed() < TTL * 3 {
        stream.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x', "after {:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    stream.write_all(b"the end").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(read_all(&mut stream).await.unwrap(), b"the end");
}
