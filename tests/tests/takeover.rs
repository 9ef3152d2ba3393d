//! A new process takes over from a running one, and nobody notices.

#[path = "takeover/edge.rs"]
mod edge;
#[path = "takeover/failures.rs"]
mod failures;
#[path = "takeover/systemd.rs"]
mod systemd;

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Client, Cluster, Load, NodeSpec, Process, free_port, wait_for};
use starling_protocol::{
    ServiceState,
    admin::{Member, MemberStatus, Status, Upgraded},
};
use starling_tests::{binary, sample};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

/// How long what must happen may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A seed, and a node with the one instance of `orders`.
async fn mesh() -> (Cluster, Process) {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (service, addr) = sample(cluster.dir(), "orders").await;
    let spec = NodeSpec::named("orders-1").serving(format!("orders={addr}")).flag("--workers").flag("2");
    cluster.add(&spec).await.unwrap();
    cluster.converge().await.unwrap();
    (cluster, service)
}

async fn so_many_more(load: &Load, calls: usize) {
    let before = load.good();
    let more = || async { (load.good() >= before + calls).then_some(()).ok_or(format!("{} calls", load.good())) };
    wait_for("calls are answered", LIMIT, more).await.unwrap();
}

async fn member(cluster: &Cluster, observer: &str, name: &str) -> Member {
    cluster.members(observer).await.unwrap().into_iter().find(|m| m.name == name).unwrap()
}

async fn status(cluster: &Cluster, name: &str) -> Status {
    cluster.admin(name, "/v1/status").await.unwrap()
}

/// `starling upgrade` of a node; an error is what the command says.
async fn upgrade(cluster: &Cluster, name: &str, more: &[&str]) -> Result<Upgraded, String> {
    let admin = cluster.node(name).state.join("admin.sock").to_string_lossy().into_owned();
    let args = [&["upgrade", "--admin", &admin, "-o", "json"], more].concat();
    let said = cluster.run(&args).await.map_err(|e| e.to_string())?;
    Ok(serde_json::from_str(&said).unwrap())
}

#[tokio::test]
async fn no_call_is_lost_at_either_end_and_the_node_is_never_away() {
    let (mut cluster, _service) = mesh().await;
    let before = member(&cluster, "seed", "orders-1").await;
    let [to, from] = ["seed", "orders-1"].map(|node| Load::start(cluster.node(node).outbound, "orders", 200));
    for name in ["orders-1", "seed", "orders-1", "orders-1"] {
        so_many_more(&to, 200).await;
        so_many_more(&from, 200).await;
        let mut old = cluster.take_over(name).await.unwrap();
        let status = status(&cluster, name).await;
        assert_eq!((status.phase.as_str(), status.name.as_str()), ("ready", name));
        assert!(old.wait(LIMIT).await.unwrap().success(), "{}", old.log());
    }
    so_many_more(&to, 200).await;
    for tally in [to.stop().await, from.stop().await] {
        assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
    }
    let after = member(&cluster, "seed", "orders-1").await;
    assert!(after.generation > before.generation && after.status == MemberStatus::Alive, "{after:?}");
    assert_eq!((after.id, after.addr), (before.id, before.addr));
    // The new process of the issuer admits.
    cluster.add(&NodeSpec::named("late")).await.unwrap();
    cluster.converge().await.unwrap();
}

/// Says what it is told, over TCP and UDP; over UDP with the address that it came from in front.
async fn echo() -> (SocketAddr, SocketAddr) {
    let (listener, socket) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await);
    let socket = socket.unwrap();
    let addrs = (listener.local_addr().unwrap(), socket.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    tokio::spawn(async move {
        let mut packet = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut packet).await {
            let answer = [&packet[..length], b" ", from.to_string().as_bytes()].concat();
            let _ = socket.send_to(&answer, from).await;
        }
    });
    addrs
}

/// Sends a packet until it is answered; returns where the service saw it come from.
async fn ask(socket: &UdpSocket, question: &str) -> String {
    let asking = async {
        loop {
            let _ = socket.send(question.as_bytes()).await;
            let mut answer = [0; 128];
            let received = tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut answer)).await;
            if let Ok(Ok(length)) = received
                && let Some((said, from)) = String::from_utf8_lossy(&answer[..length]).split_once(' ')
                && said == question
            {
                return from.to_string();
            }
        }
    };
    tokio::time::timeout(LIMIT, asking).await.expect("an answer")
}

async fn say(stream: &mut TcpStream, word: &[u8]) {
    stream.write_all(word).await.unwrap();
    let mut back = vec![0; word.len()];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut back)).await.expect("it comes back").unwrap();
    assert_eq!(back, word);
}

async fn client(port: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(port).await.unwrap();
    socket
}

#[tokio::test]
async fn what_is_open_goes_on_where_it_is_and_what_is_new_goes_to_the_new_process() {
    let (mut cluster, (tcp, udp)) = (Cluster::start(binary()).await.unwrap(), echo().await);
    let (db, dns) = (free_port(), free_port());
    let far =
        NodeSpec::named("far").serving(format!("db={tcp},protocol=tcp")).serving(format!("dns={udp},protocol=udp"));
    cluster.add(&far).await.unwrap();
    let file = cluster.dir().join("near.toml");
    let upstream = |service, listen, protocol, more| {
        format!("[[upstream]]\nservice = \"{service}\"\nlisten = \"{listen}\"\nprotocol = \"{protocol}\"\n{more}\n")
    };
    // A flow ends by its silence.
    let upstreams = [upstream("db", db, "tcp", ""), upstream("dns", dns, "udp", "idle_timeout = \"20s\"")];
    std::fs::write(&file, upstreams.concat()).unwrap();
    cluster.add(&NodeSpec::named("near").flag("--config").flag(file.to_string_lossy())).await.unwrap();
    for service in ["db", "dns"] {
        starling_tests::is_known(&cluster, "near", service, 1).await;
    }
    let (mut stream, flow) = (TcpStream::connect(db).await.unwrap(), client(dns).await);
    say(&mut stream, b"before").await;
    let from = ask(&flow, "before").await;

    let mut old = Vec::new();
    for (nth, name) in ["near", "far"].into_iter().enumerate() {
        let upgraded = upgrade(&cluster, name, &[]).await.unwrap();
        assert_ne!(upgraded.pid, upgraded.predecessor);
        assert_eq!(status(&cluster, name).await.predecessor, Some(upgraded.predecessor), "{name}");
        say(&mut stream, format!("after {nth}").as_bytes()).await;
        assert_eq!(ask(&flow, &format!("after-{nth}")).await, from, "the service sees the same address");
        // Another one has to wait for the end of this one.
        let refused = upgrade(&cluster, name, &[]).await.unwrap_err();
        assert!(refused.contains("has not finished yet"), "{refused}");
        let mut new = TcpStream::connect(db).await.unwrap();
        say(&mut new, b"new").await;
        assert_ne!(ask(&client(dns).await, "new").await, from);
        assert!(cluster.node_mut(name).process.is_running(), "it finishes what it has");
        old.push(name);
    }
    // What is over ends them.
    drop((stream, flow));
    for name in old {
        let gone = cluster.node_mut(name).process.wait(LIMIT * 2).await.unwrap();
        assert!(gone.success(), "{name}: {gone}");
        wait_for("the new one knows", LIMIT, || async {
            match status(&cluster, name).await.predecessor {
                None => Ok(()),
                Some(pid) => Err(format!("{pid} has not finished")),
            }
        })
        .await
        .unwrap();
    }
    assert_ne!(ask(&client(dns).await, "later").await, from);
}

#[tokio::test]
async fn a_service_that_is_checked_is_never_thought_unwell() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (_service, addr) = sample(cluster.dir(), "orders").await;
    let file = cluster.dir().join("health.toml");
    let config =
        format!("[[service]]\nname = \"orders\"\naddr = \"{addr}\"\nhealth = {{ path = \"/\", interval = \"1s\" }}\n");
    std::fs::write(&file, config).unwrap();
    let token = cluster.token(&["--service", "orders"]).await.unwrap();
    let spec = NodeSpec::named("orders-1").flag("--config").flag(file.to_string_lossy());
    cluster.add_with_token(&spec, &token).await.unwrap();
    wait_for("its first check", LIMIT, || async {
        match member(&cluster, "seed", "orders-1").await.services.as_slice() {
            [one] if one.state == ServiceState::Up => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    let load = Load::start(cluster.node("seed").outbound, "orders", 200);
    for _ in 0..2 {
        so_many_more(&load, 100).await;
        cluster.take_over("orders-1").await.unwrap().wait(LIMIT).await.unwrap();
    }
    so_many_more(&load, 300).await;
    let tally = load.stop().await;
    assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
}

/// A long answer, and a WebSocket's like: what has not ended when the time is over is cut, and the process with it.
#[tokio::test]
async fn the_old_process_ends_when_its_time_is_over_or_a_signal_hurries_it() {
    let (mut cluster, addrs) = (Cluster::start(binary()).await.unwrap(), echo().await);
    let db = free_port();
    cluster.add(&NodeSpec::named("far").serving(format!("db={},protocol=tcp", addrs.0))).await.unwrap();
    let file = cluster.dir().join("near.toml");
    std::fs::write(&file, "[node]\nupgrade_timeout = \"2s\"\ndrain_timeout = \"1s\"\n").unwrap();
    let upstream = format!("db={db},protocol=tcp");
    let near = ["--config", &file.to_string_lossy(), "--upstream", &upstream].map(String::from);
    cluster.add(&near.into_iter().fold(NodeSpec::named("near"), NodeSpec::flag)).await.unwrap();
    starling_tests::is_known(&cluster, "near", "db", 1).await;
    let mut stream = TcpStream::connect(db).await.unwrap();
    say(&mut stream, b"before").await;
    let mut old = cluster.take_over("near").await.unwrap();
    say(&mut stream, b"after").await;
    assert!(old.wait(LIMIT).await.unwrap().success());
    assert!(!matches!(stream.read(&mut [0]).await, Ok(1..)), "it is cut");

    std::fs::write(&file, "[node]\nupgrade_timeout = \"1h\"\ndrain_timeout = \"1s\"\n").unwrap();
    let mut stream = TcpStream::connect(db).await.unwrap();
    say(&mut stream, b"before").await;
    let mut old = cluster.take_over("near").await.unwrap();
    say(&mut stream, b"after").await;
    old.signal("TERM").await.unwrap();
    assert!(old.wait(LIMIT).await.unwrap().success());
    let mut stream = TcpStream::connect(db).await.unwrap();
    say(&mut stream, b"the node is there").await;
    // A drain of the new process is one of the node.
    drop(stream);
    assert!(cluster.terminate("near").await.unwrap().success());
    cluster.wait_status("seed", "near", MemberStatus::Left).await.unwrap();
}

/// A connection that waits for a request when the process changes gets its answer, and the word that it was the last.
#[tokio::test]
async fn a_connection_that_is_kept_is_answered_once_more() {
    let (mut cluster, _service) = mesh().await;
    let door = cluster.node("orders-1").outbound;
    let mut stream = TcpStream::connect(door).await.unwrap();
    let mut call = async || {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !String::from_utf8_lossy(&answer).contains("\r\n\r\n") {
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0, "closed without an answer");
        }
        String::from_utf8(answer).unwrap().to_ascii_lowercase()
    };
    let first = call().await;
    assert!(first.starts_with("http/1.1 200") && !first.contains("connection: close"), "{first}");
    let _old = cluster.take_over("orders-1").await.unwrap();
    let last = call().await;
    assert!(last.starts_with("http/1.1 200") && last.contains("connection: close"), "{last}");
    let request = Request::get("http://orders/").body(Bytes::new()).unwrap();
    assert_eq!(Client::plain().send(starling_chaos::Door::PlainHttp2, door, request).await.unwrap().status, 200);
}
