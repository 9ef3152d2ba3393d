//! A member whose services answer against the protocol: its callers get an error, and nothing of what it said.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use starling_chaos::{Cluster, NodeSpec, free_port};
use starling_tests::{
    binary, call,
    raw_h3::{DATA, HEADERS, SETTINGS, frame, head, varint},
    relay::parting_relay,
    rogue::Rogue,
    sample,
};

/// Answers each request with the row that its path names, `/row-N`, as it is.
async fn answer_with(endpoint: quinn::Endpoint, rows: Arc<Vec<Vec<u8>>>, connections: Arc<AtomicUsize>) {
    while let Some(incoming) = endpoint.accept().await {
        let Ok(connection) = incoming.await else { continue };
        connections.fetch_add(1, SeqCst);
        let rows = rows.clone();
        tokio::spawn(async move {
            let mut control = connection.open_uni().await.ok()?;
            control.write_all(&[varint(0), frame(SETTINGS, "")].concat()).await.ok()?;
            while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                let rows = rows.clone();
                tokio::spawn(async move {
                    let request = receive.read_to_end(64 << 10).await.ok()?;
                    // Our nodes send plain text: the path stands in the section as it is.
                    let at = request.windows(5).position(|window| window == b"/row-")? + 5;
                    let digits = request[at..].iter().take_while(|byte| byte.is_ascii_digit());
                    let row = digits.fold(0, |number, digit| number * 10 + usize::from(digit - b'0'));
                    send.write_all(&rows[row]).await.ok()?;
                    let _ = send.finish();
                    let _ = send.stopped().await;
                    Some(())
                });
            }
            drop(control);
            Some(())
        });
    }
}

#[tokio::test]
async fn answers_against_the_protocol_reach_nobody() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (_honest, honest) = sample(cluster.dir(), "honest").await;
    cluster.add(&NodeSpec::named("b").serving(format!("honest={honest}"))).await.unwrap();
    // A real member, so that everybody takes it for alive; calls for it go astray.
    let front = free_port();
    cluster
        .add(&NodeSpec::named("mallory").serving("spare=127.0.0.1:9").flag("--advertise").flag(front.to_string()))
        .await
        .unwrap();
    // One thread, so that all its calls go over one connection.
    cluster.add(&NodeSpec::named("caller").flag("--workers").flag("1")).await.unwrap();
    let rogue = Rogue::of(&cluster.node("mallory").state).unwrap();
    let endpoint = rogue.answering().unwrap();
    parting_relay(front, cluster.node("mallory").mesh, endpoint.local_addr().unwrap()).await;

    let ok = head(&[(":status", "200"), ("content-length", "5")]);
    let good = [&ok[..], &frame(DATA, "hello")].concat();
    let stream_errors: Vec<Vec<u8>> = vec![
        head(&[("server", "x")]),
        head(&[(":status", "200"), (":status", "200")]),
        head(&[("x-evil", "1"), (":status", "200")]),
        head(&[(":status", "200"), (":path", "/")]),
        head(&[(":status", "20x")]),
        head(&[(":status", "101"), ("upgrade", "x")]),
        head(&[(":status", "200"), ("x-evil", "1"), ("connection", "close")]),
        head(&[(":status", "200"), ("x-evil", "1"), ("transfer-encoding", "chunked")]),
        head(&[(":status", "200"), ("X-Evil", "1")]),
        head(&[(":status", "200"), ("x-evil", "a\r\nset-cookie: b")]),
        head(&[(":status", "200"), ("x-evil", "1"), ("content-length", "1"), ("content-length", "2")]),
        head(&[(":status", "100")]),
        head(&[(":status", "200"), ("x-evil", &"a".repeat(70_000))]),
    ];
    let connection_errors: Vec<Vec<u8>> = vec![
        frame(DATA, "x"),
        frame(SETTINGS, ""),
        frame(0x02, ""),
        frame(0x05, [0, 0, 0]),
        frame(HEADERS, [1, 0, 0x80]),
        frame(HEADERS, [0, 0, 0xff, 0x40]),
        [varint(HEADERS), varint(100), b"cut".to_vec()].concat(),
    ];
    let count = stream_errors.len();
    let rows = [vec![good], stream_errors, connection_errors].concat();
    let last = rows.len();
    let connections = Arc::<AtomicUsize>::default();
    let answering = tokio::spawn(answer_with(endpoint, Arc::new(rows), connections.clone()));
    cluster.converge().await.unwrap();

    let door = cluster.node("caller").outbound;
    let hello = call(door, "spare", "/row-0").await;
    assert_eq!((hello.status, hello.text()), (200, "hello".into()));
    // Where the first handshake took its time, a second one may come to its end behind it.
    let most = connections.load(SeqCst) + 1;
    for row in 1..last {
        let answer = call(door, "spare", &format!("/row-{row}")).await;
        assert_eq!(answer.status, 502, "row {row}: {answer:?}");
        assert!(answer.header("x-evil").is_empty() && answer.header("set-cookie").is_empty(), "row {row}: {answer:?}");
        if row <= count {
            assert!(answer.header("proxy-status").contains("http_protocol_error"), "row {row}: {answer:?}");
            assert!(connections.load(SeqCst) <= most, "row {row} costs its stream only");
        }
    }
    // Afterwards the next call is as good as the first, and others never noticed.
    tokio::time::timeout(Duration::from_secs(60), async {
        while call(door, "spare", "/row-0").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("a new connection is made");
    assert_eq!(call(door, "honest", "/").await.status, 200);
    let log = cluster.node("caller").process.log();
    assert!(!log.contains("panicked"), "{log}");
    answering.abort();
}
