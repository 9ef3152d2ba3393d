//! What is no HTTP, or stops being it: TCP, UDP and WebSocket through the mesh.

#[path = "tunnels/dns.rs"]
mod dns;
#[path = "tunnels/many.rs"]
mod many;
#[path = "tunnels/tcp.rs"]
mod tcp;
#[path = "tunnels/udp.rs"]
mod udp;
#[path = "tunnels/websocket.rs"]
mod websocket;

use std::{net::SocketAddr, time::Duration};

use starling_chaos::{Cluster, NodeSpec, free_port, wait_for};
use starling_tests::{binary, is_known};
use tokio::io::{AsyncRead, AsyncReadExt};

/// How long something may take that should happen at once.
const LIMIT: Duration = Duration::from_secs(60);

/// A mesh with one service behind the node `far`, and a port for it at the node `near`.
async fn mesh(service: &str, addr: SocketAddr, protocol: &str) -> (Cluster, SocketAddr) {
    let (mut cluster, port) = (Cluster::start(binary()).await.unwrap(), free_port());
    let far = NodeSpec::named("far").serving(format!("{service}={addr},protocol={protocol}"));
    cluster.add(&far).await.unwrap();
    let upstream = format!("{service}={port},protocol={protocol}");
    cluster.add(&NodeSpec::named("near").flag("--upstream").flag(upstream)).await.unwrap();
    is_known(&cluster, "near", service, 1).await;
    (cluster, port)
}

/// All that comes until the end, or the error that it ends with.
async fn read_all(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    tokio::time::timeout(LIMIT, stream.read_to_end(&mut all)).await.expect("it ends").map(|_| all)
}

/// A figure of a node's metrics: the sum of all series of that name with those labels.
async fn figure(cluster: &Cluster, node: &str, name: &str, labels: &[&str]) -> f64 {
    let admin = cluster.node(node).admin;
    let text = starling_chaos::Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text();
    let fits = |line: &&str| {
        let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
        rest.is_some_and(|rest| labels.iter().all(|label| rest.contains(label)))
    };
    text.lines().filter(fits).map(|line| line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap()).sum()
}

/// Waits until a figure of a node's metrics is as it should be.
async fn figure_becomes(cluster: &Cluster, node: &str, name: &str, labels: &[&str], right: impl Fn(f64) -> bool) {
    wait_for(name, LIMIT, || async {
        let figure = figure(cluster, node, name, labels).await;
        if right(figure) { Ok(()) } else { Err(format!("{labels:?}: {figure}")) }
    })
    .await
    .unwrap();
}
