//! Tunnels by the thousand, and where there are no more of them to be had.

use std::{io::ErrorKind, net::SocketAddr, process::Stdio};

use starling_chaos::{Cluster, NodeSpec, Process, free_port, wait_for};
use starling_tests::{binary, client_script, is_known, listening, program, run};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::{LIMIT, figure_becomes};

/// A mesh with a service that says what it is told, in a process of its own, and a port for it at each of so many nodes.
async fn far_away(near: usize) -> Option<(Cluster, Process, Vec<SocketAddr>)> {
    let python = program("python3")?;
    let (mut cluster, addr) = (Cluster::start(binary()).await.unwrap(), free_port());
    let args = [client_script("idle_tunnels.py"), "serve".into(), "--port".into(), addr.port().to_string()];
    let service = Process::start(&python, args, &cluster.dir().join("echo.log")).unwrap();
    listening(addr).await;
    let file = cluster.dir().join("far.toml");
    let text = format!("[[service]]\nname = \"db\"\naddr = \"{addr}\"\nprotocol = \"tcp\"\nmax_connections = 20000\n");
    std::fs::write(&file, text).unwrap();
    let token = cluster.token(&["--service", "db"]).await.unwrap();
    let far = NodeSpec::named("far").flag("--config").flag(file.to_string_lossy());
    cluster.add_with_token(&far, &token).await.unwrap();
    let mut ports = Vec::new();
    for name in ["near", "near-too"].into_iter().take(near) {
        let port = free_port();
        let near = NodeSpec::named(name).flag("--upstream").flag(format!("db={port},protocol=tcp"));
        cluster.add(&near).await.unwrap();
        is_known(&cluster, name, "db", 1).await;
        ports.push(port);
    }
    Some((cluster, service, ports))
}

async fn says_again(port: SocketAddr, word: &[u8]) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(port).await?;
    stream.write_all(word).await?;
    let mut again = vec![0; word.len()];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut again)).await.expect("an answer or an end")?;
    assert_eq!(again, word);
    Ok(stream)
}

/// Idle ones hold hardly anything, and new ones find room beside them.
#[tokio::test]
async fn ten_thousand_idle_tunnels_are_no_burden() {
    const TUNNELS: u64 = 10_000;
    let Some((cluster, _service, ports)) = far_away(2).await else { return };
    let memory = || ["near", "far"].map(|node| starling_tests::memory_kib(&cluster.node(node).process, "VmRSS:"));
    let before = memory();
    let mut clients = tokio::process::Command::new(program("python3").unwrap());
    clients.args([client_script("idle_tunnels.py"), "call".into(), "--connections".into(), TUNNELS.to_string()]);
    clients.args(ports.iter().map(|port| port.port().to_string()));
    let mut clients = clients.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let (mut tell, mut said) = (clients.stdin.take().unwrap(), BufReader::new(clients.stdout.take().unwrap()).lines());
    let mut next =
        async || tokio::time::timeout(LIMIT * 3, said.next_line()).await.expect("in time").unwrap().unwrap_or_default();
    let first = next().await;
    assert_eq!(
        first,
        format!("open {TUNNELS}"),
        "{} {}",
        cluster.node("near").process.log(),
        cluster.node("near-too").process.log()
    );
    for ((before, after), tunnels) in before.into_iter().zip(memory()).zip([TUNNELS / 2, TUNNELS]) {
        let more = after.saturating_sub(before) / tunnels;
        println!("{more} KiB for each of {tunnels}");
        assert!(more < 40, "{before} -> {after} KiB");
    }
    for _ in 0..3 {
        tell.write_all(b"once more\n").await.unwrap();
        assert_eq!(next().await, "well");
        says_again(ports[0], b"and a new one").await.unwrap();
    }
    drop(tell);
    assert!(clients.wait().await.unwrap().success());
    figure_becomes(&cluster, "far", "starling_calls_in_flight", &[], |open| open == 0.0).await;
}

/// The node of a service that has no more descriptors refuses, is a member all the same, and takes new ones as soon as it can.
#[tokio::test]
async fn tunnels_that_take_all_descriptors_are_refused_until_there_are_some_again() {
    let Some(prlimit) = program("prlimit") else { return };
    let Some((cluster, _service, ports)) = far_away(1).await else { return };
    let far = cluster.node("far").process.pid().unwrap();
    let open = std::fs::read_dir(format!("/proc/{far}/fd")).unwrap().count();
    let limit = format!("--nofile={0}:{0}", open + 40);
    assert!(run(&prlimit, &["--pid", &far.to_string(), &limit]).0);
    let mut kept = Vec::new();
    let mut refused = 0;
    for n in 0..100u32 {
        match says_again(ports[0], &n.to_be_bytes()).await {
            Ok(stream) => kept.push(stream),
            // At once, and not by silence.
            Err(error) => refused += usize::from(error.kind() == ErrorKind::ConnectionReset),
        }
    }
    assert!(kept.len() >= 20 && refused == 100 - kept.len(), "{} are open, {refused} were refused", kept.len());
    for observer in ["seed", "near"] {
        let far = cluster.members(observer).await.unwrap().into_iter().find(|m| m.name == "far").unwrap();
        assert_eq!(far.status, starling_protocol::admin::MemberStatus::Alive, "as {observer} sees it");
    }
    // Those that are open go on; and when they are closed, there is room.
    for stream in &mut kept {
        stream.write_all(b"still").await.unwrap();
        stream.read_exact(&mut [0; 5]).await.unwrap();
    }
    drop(kept);
    wait_for("tunnels open again", LIMIT, || async {
        says_again(ports[0], b"again").await.map(drop).map_err(|e| e.to_string())
    })
    .await
    .unwrap();
}
