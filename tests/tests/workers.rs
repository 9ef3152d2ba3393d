//! More than one thread for calls: any number of them, one that stands still, and systems that cannot share a port.

use std::{process::Stdio, time::Duration};

use starling_chaos::{Client, Cluster, NodeSpec, wait_for};
use starling_protocol::admin::MemberStatus;
use starling_tests::{binary, call, client_script, namespace, program, sample, skip};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::Command,
    task::JoinSet,
};

const LIMIT: Duration = Duration::from_secs(120);

fn with_workers(name: &str, workers: usize) -> NodeSpec {
    NodeSpec::named(name).flag("--workers").flag(workers.to_string())
}

/// Names of a node's threads that carry calls.
fn workers(cluster: &Cluster, node: &str) -> Vec<String> {
    let pid = cluster.node(node).process.pid().unwrap();
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    let mut workers: Vec<String> =
        names.map(|name| name.trim().to_string()).filter(|name| name.starts_with("worker-")).collect();
    workers.sort();
    workers
}

/// A mesh of a caller with so many workers, and a service behind a node with as many.
async fn mesh(workers: usize) -> (Cluster, starling_chaos::Process) {
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
        let names: Vec<String> = (0..count).map(|index| format!("worker-{index}")).collect();
        assert_eq!((workers(&cluster, "near"), workers(&cluster, "far")), (names.clone(), names), "{count}");
        let outbound = cluster.node("near").outbound;
        // Each client has a connection of its own, so that the kernel deals them out.
        let mut calls = JoinSet::new();
        for _ in 0..48 {
            calls.spawn(async move {
                Client::plain().get(outbound, "orders.mesh.internal", "/hello").await.unwrap().status
            });
        }
        while let Some(status) = calls.join_next().await {
            assert_eq!(status.unwrap(), 200, "{count} workers");
        }
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
        let mut run = Command::new(binary());
        run.args(["chaos", "run"]).arg(&plan).args(["--backend", "relay"]).current_dir(dir.path());
        run.env("STARLING_WORKERS", workers).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(LIMIT, run.output()).await.expect("it ends").unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // A machine that is too slow for the flood cannot tell (2); what it can tell must be well.
        let acted = said.lines().any(|line| line.contains("another source port") && line.contains("acted"));
        assert!(output.status.code() != Some(1) && acted, "{workers} workers: {said}");
    }
}

#[tokio::test]
async fn a_worker_that_stands_still_holds_up_nobody_else() {
    let Some(python) = program("python3") else { return };
    let (cluster, _service) = mesh(2).await;
    let outbound = cluster.node("near").outbound;
    assert_eq!(call(outbound, "orders", "/hello").await.status, 200);
    let pid = cluster.node("near").process.pid().unwrap().to_string();
    let mut still = Command::new(python);
    still.args([client_script("stand_still.py").as_str(), &pid, "worker-1", "5"]).stdout(Stdio::piped());
    let mut still = still.kill_on_drop(true).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(still.stdout.as_mut().unwrap()).read_line(&mut line).await.unwrap();
    if line != "still\n" {
        return skip("may not stop a single thread of a process");
    }

    // Those whom the kernel gives to the other worker are answered meanwhile; the rest when theirs turns again.
    let mut calls = JoinSet::new();
    for _ in 0..32 {
        calls.spawn(async move {
            let mut stream = tokio::net::TcpStream::connect(outbound).await.unwrap();
            let request = "GET /hello HTTP/1.1\r\nhost: orders.mesh.internal\r\nconnection: close\r\n\r\n";
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer.starts_with("HTTP/1.1 200")
        });
    }
    let mut meanwhile = 0;
    while meanwhile < 5 {
        assert!(calls.join_next().await.expect("some go to the other worker").unwrap());
        assert!(still.try_wait().unwrap().is_none(), "only {meanwhile} calls were answered while a worker stood still");
        meanwhile += 1;
    }
    still.wait().await.unwrap();
    while let Some(answered) = calls.join_next().await {
        assert!(answered.unwrap());
    }
    for observer in ["seed", "near", "far"] {
        let members = cluster.members(observer).await.unwrap();
        assert!(members.iter().all(|m| m.status == MemberStatus::Alive), "{observer} shows {members:?}");
        let log = cluster.node(observer).process.log();
        assert!(!log.contains("Suspect"), "{observer}: {log}");
    }
    wait_for("the log says it", LIMIT, async || {
        let log = cluster.node("near").process.log();
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
    assert_eq!(workers(&cluster, "near"), ["worker-0"]);
    assert_eq!(call(cluster.node("near").outbound, "orders", "/hello").await.status, 200);
    let log = cluster.node("near").process.log();
    assert!(log.contains("cannot share the mesh port among threads"), "{log}");
}
