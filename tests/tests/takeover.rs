//! A new process takes over from a running one, and nobody notices.

use std::time::Duration;

use starling_chaos::{Cluster, Load, NodeSpec, Process, wait_for};
use starling_protocol::admin::{Member, MemberStatus, Status};
use starling_tests::{binary, sample};

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

#[tokio::test]
async fn no_call_is_lost_at_either_end_and_the_node_is_never_away() {
    let (mut cluster, _service) = mesh().await;
    let before = member(&cluster, "seed", "orders-1").await;
    let [to, from] = ["seed", "orders-1"].map(|node| Load::start(cluster.node(node).outbound, "orders", 200));
    for name in ["orders-1", "seed", "orders-1"] {
        so_many_more(&to, 200).await;
        so_many_more(&from, 200).await;
        let mut old = cluster.take_over(name).await.unwrap();
        let status: Status = cluster.admin(name, "/v1/status").await.unwrap();
        assert_eq!((status.phase.as_str(), status.name.as_str()), ("ready", name));
        assert!(old.wait(LIMIT).await.unwrap().success(), "{}", old.log());
    }
    so_many_more(&to, 200).await;
    for tally in [to.stop().await, from.stop().await] {
        assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
        println!("{} calls, the slowest {:?}", tally.good, tally.slowest);
    }
    let after = member(&cluster, "seed", "orders-1").await;
    assert!(after.generation > before.generation && after.status == MemberStatus::Alive, "{after:?}");
    assert_eq!((after.id, after.addr), (before.id, before.addr));
}
