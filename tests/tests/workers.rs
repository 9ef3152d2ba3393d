//! More than one thread for calls: any number of them, one that stands still, and systems that cannot share a port.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use starling_chaos::{Client, Cluster, NodeSpec, Process, free_port, wait_for};
use starling_protocol::admin::MemberStatus;
use starling_tests::{
    binary, call, chaos_with, client_script, listening, memory_kib, namespace, program, python, run, sample, skip,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::Command,
    task::JoinSet,
};

const LIMIT: Duration = Duration::from_secs(120);

fn with_workers(name: &str, workers: usize) -> NodeSpec {
    NodeSpec::named(name).flag("--workers").flag(workers.to_string())
}

/// A node's threads that carry calls, and how often each of them has waited for something to do.
fn workers(cluster: &Cluster, node: &str) -> BTreeMap<String, u64> {
    let pid = cluster.node(node).process.pid().unwrap();
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("status")).ok());
    let line = |text: &str, key: &str| text.lines().find_map(|line| Some(line.strip_prefix(key)?.trim().to_string()));
    let threads =
        status.filter_map(|text| Some((line(&text, "Name:")?, line(&text, "voluntary_ctxt_switches:")?.parse().ok()?)));
    threads.filter(|(name, _)| name.starts_with("worker-")).collect()
}

/// A mesh of a caller with so many workers, and a service behind a node with as many.
async fn mesh(workers: usize) -> (Cluster, Process) {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (service, addr) = sample(cluster.dir(), "x").await;
    cluster.add(&with_workers("near", workers)).await.unwrap();
    cluster.add(&with_workers("far", workers).serving(format!("orders={addr}"))).await.unwrap();
    cluster.converge().await.unwrap();
    (cluster, service)
}

#[tokio::test]
async fn calls_work_with_any_number_of_workers_and_all_of_them_carry() {
    for count in [1, 2, 3, 5] {
        let (cluster, _service) = mesh(count).await;
        let names: Vec<String> = (0..count).map(|number| format!("worker-{number}")).collect();
        let before = workers(&cluster, "near");
        assert_eq!(before.keys().cloned().collect::<Vec<_>>(), names);
        assert_eq!(workers(&cluster, "far").len(), count);
        let outbound = cluster.node("near").outbound;
        // Each call comes on a connection of its own, so that the kernel deals them out, and wakes its worker more than once.
        for _ in 0..80 {
            let answer = Client::plain().get(outbound, "orders.mesh.internal", "/hello").await.unwrap();
            assert_eq!(answer.status, 200, "{count} workers");
        }
        let after = workers(&cluster, "near");
        for (name, woken) in &after {
            assert!(woken - before[name] > 5, "{name} of {count} has nothing to do: {before:?} -> {after:?}");
        }
    }
}

/// What one worker keeps of a service that takes few connections does not shut the others out.
#[tokio::test]
async fn a_service_with_one_connection_is_there_for_every_worker() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some(python) = python() else { return };
    let (script, grpc) = (client_script("grpc_echo.py"), free_port());
    let args = [&script, "serve", "--port", &grpc.port().to_string()];
    let _grpc = Process::start(&python, args, &cluster.dir().join("grpc.log")).unwrap();
    listening(grpc).await;
    let (_service, http) = sample(cluster.dir(), "x").await;
    let file = cluster.dir().join("few.toml");
    let service = |name, addr, protocol| {
        format!("[[service]]\nname = \"{name}\"\naddr = \"{addr}\"\nprotocol = \"{protocol}\"\nmax_connections = 1\n")
    };
    std::fs::write(&file, service("plain", http, "http1") + &service("grpc", grpc, "h2c")).unwrap();
    let token = cluster.token(&["--service", "plain", "--service", "grpc"]).await.unwrap();
    let spec = with_workers("far", 3).flag("--config").flag(file.to_string_lossy());
    cluster.add_with_token(&spec, &token).await.unwrap();
    // One caller a worker, each with a connection of its own to one of the three.
    for name in ["c1", "c2", "c3", "c4", "c5", "c6"] {
        cluster.add(&NodeSpec::named(name)).await.unwrap();
    }
    cluster.converge().await.unwrap();
    for name in ["c1", "c2", "c3", "c4", "c5", "c6"] {
        let door = cluster.node(name).outbound;
        assert_eq!(call(door, "plain", "/hello").await.status, 200, "{name}");
        let args =
            [&script, "call", "--target", &door.to_string(), "--authority", "grpc.mesh.internal", "--only", "unary"];
        let (ok, out, err) = run(&python, &args);
        assert!(ok, "{name}: {out} {err}");
    }
}

/// Addresses change under load, and a flood comes: calls survive, gossip is on time.
#[tokio::test]
async fn connections_keep_to_their_worker_and_gossip_to_its_time() {
    const PLAN: &str = r#"
about = "Addresses change under load, then a flood."

[mesh]
nodes = 3
services = [{ name = "orders", instances = 2 }]

[load]
rate = 60
calm = "2s"

[[step]]
name = "another source port every second"
hold = "5s"
faults = [{ rebind = { victims = "all", every = "1s" } }]

[[step]]
name = "a flood"
hold = "4s"
faults = [{ burst = { times = 10 } }]
"#;
    let dir = tempfile::tempdir().unwrap();
    let plan = dir.path().join("workers.toml");
    std::fs::write(&plan, PLAN).unwrap();
    for workers in ["1", "3"] {
        let args = ["run", &plan.to_string_lossy(), "--backend", "relay"];
        let (code, said, _) = chaos_with(dir.path(), &args, &[("STARLING_WORKERS", workers)]).await;
        // A machine that is too slow for the flood cannot tell (2); what it can tell must be well.
        let acted = said.lines().any(|line| line.contains("another source port") && line.contains("acted"));
        assert!(code != 1 && acted, "{workers} workers: {said}");
    }
}

/// First packets of connections that come to nothing, as fast as one thread can send them, all aimed at one worker. Ends when
/// it is dropped.
struct Flood(Arc<AtomicBool>);

impl Flood {
    fn start(to: SocketAddr, aim: u8) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        std::thread::spawn(move || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            // An Initial of version 1 with an id of 8 bytes (RFC 9000 §17.2.2), padded to what a server takes.
            let mut packet = vec![0; 1200];
            packet[..7].copy_from_slice(&[0xc0, 0, 0, 0, 1, 8, aim]);
            // No id of the source, no token, and as long as the rest.
            packet[14..18].copy_from_slice(&[0, 0, 0x44, 0x9e]);
            for count in 0u64.. {
                if ended.load(Relaxed) {
                    return;
                }
                packet[7..14].copy_from_slice(&count.to_be_bytes()[1..]);
                let _ = socket.send_to(&packet, to);
            }
        });
        Self(over)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Strangers choose where their packets go. They keep one worker busy, and nobody takes its node for dead.
#[tokio::test]
async fn a_flood_at_one_worker_leaves_the_others_and_gossip_alone() {
    let (cluster, _service) = mesh(2).await;
    let outbound = cluster.node("near").outbound;
    let before = memory_kib(&cluster.node("far").process, "VmRSS:");
    let _flood = Flood::start(cluster.node("far").mesh, 1);
    let begun = tokio::time::Instant::now();
    let mut answered = 0;
    // As long as a suspicion takes, and as many calls as show that they are made.
    while begun.elapsed() < Duration::from_secs(8) || answered <= 10 {
        assert!(begun.elapsed() < LIMIT, "{answered}");
        // On connections of their own, so that both workers of the caller make calls, to both of the other node.
        let answer = Client::plain().get(outbound, "orders.mesh.internal", "/hello").await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answered += 1;
        for name in ["seed", "near"] {
            let members = cluster.members(name).await.unwrap();
            let far = members.iter().find(|member| member.name.as_str() == "far").expect("it is a member");
            assert_eq!(far.status, MemberStatus::Alive, "as {name} sees it, after {answered} calls");
        }
    }
    let after = memory_kib(&cluster.node("far").process, "VmRSS:");
    assert!(after < before + (32 << 10), "{before} -> {after} KiB");
}

#[tokio::test]
async fn a_callers_worker_that_stands_still_holds_up_nobody_else() {
    stands_still("near").await;
}

#[tokio::test]
async fn a_worker_of_the_other_node_that_stands_still_holds_up_nobody_else() {
    stands_still("far").await;
}

async fn stands_still(node: &str) {
    let Some(python) = program("python3") else { return };
    let (cluster, _service) = mesh(2).await;
    let outbound = cluster.node("near").outbound;
    assert_eq!(call(outbound, "orders", "/hello").await.status, 200);
    let pid = cluster.node(node).process.pid().unwrap().to_string();
    let mut still = Command::new(python);
    still.args([client_script("stand_still.py").as_str(), &pid, "worker-1", "5"]).stdout(Stdio::piped());
    let mut still = still.kill_on_drop(true).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(still.stdout.as_mut().unwrap()).read_line(&mut line).await.unwrap();
    if line != "still\n" {
        return skip("may not stop a single thread of a process");
    }

    // Those whom the kernel gives to the other worker are answered meanwhile; the rest when theirs turns again, or by an
    // error, if it is the other node's that does not answer.
    let mut calls = JoinSet::new();
    for _ in 0..32 {
        calls.spawn(async move {
            let mut stream = tokio::net::TcpStream::connect(outbound).await.unwrap();
            let request = "GET /hello HTTP/1.1\r\nhost: orders.mesh.internal\r\nconnection: close\r\n\r\n";
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        });
    }
    let mut meanwhile = 0;
    while meanwhile < 5 {
        let answer = calls.join_next().await.expect("some go to the other worker").unwrap();
        assert!(still.try_wait().unwrap().is_none(), "only {meanwhile} calls were answered while a worker stood still");
        meanwhile += usize::from(answer.starts_with("HTTP/1.1 200"));
    }
    still.wait().await.unwrap();
    while let Some(answer) = calls.join_next().await {
        let answer = answer.unwrap();
        assert!(node == "far" || answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    wait_for("it is as before", LIMIT, async || {
        let answers = [call(outbound, "orders", "/hello").await, call(outbound, "orders", "/hello").await];
        if answers.iter().all(|answer| answer.status == 200) { Ok(()) } else { Err(format!("{answers:?}")) }
    })
    .await
    .unwrap();
    for observer in ["seed", "near", "far"] {
        let members = cluster.members(observer).await.unwrap();
        assert!(members.iter().all(|m| m.status == MemberStatus::Alive), "{observer} shows {members:?}");
        let log = cluster.node(observer).process.log();
        assert!(!log.contains("Suspect"), "{observer}: {log}");
    }
    wait_for("the log says it", LIMIT, async || {
        let log = cluster.node(node).process.log();
        let said = log.contains("a worker does not answer") && log.contains("the worker is back");
        if said { Ok(()) } else { Err(log) }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn where_a_port_cannot_be_shared_one_thread_carries_everything() {
    if !namespace::is_inside("where_a_port_cannot_be_shared_one_thread_carries_everything") {
        return;
    }
    // Less than the program that steers packets takes.
    std::fs::write("/proc/sys/net/core/optmem_max", "160").unwrap();
    let (cluster, _service) = mesh(3).await;
    assert_eq!(workers(&cluster, "near").into_keys().collect::<Vec<_>>(), ["worker-0"]);
    assert_eq!(call(cluster.node("near").outbound, "orders", "/hello").await.status, 200);
    let log = cluster.node("near").process.log();
    assert!(log.contains("cannot share the mesh port among threads"), "{log}");
}
