//! Addresses that are true: what a node tells of where it is, and what becomes of one that nobody reaches there.

use std::time::{Duration, Instant};

use starling_chaos::{Cluster, NodeSpec, free_port, wait_for};
use starling_protocol::{
    ServiceState,
    admin::{Service, Status},
};
use starling_tests::{binary, call, sample};

/// A node that tells an address where it does not answer was once `alive` for everybody, and each call there took six seconds.
#[tokio::test]
async fn a_node_that_nobody_reaches_is_not_called_and_says_so() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let (_lost, lost) = sample(&dir, "lost").await;
    let (_good, good) = sample(&dir, "good").await;
    cluster.add(&NodeSpec::named("good").serving(format!("web={good}"))).await.unwrap();
    let nowhere = free_port();
    let spec = NodeSpec::named("lost").serving(format!("web={lost}")).serving(format!("only={lost}"));
    cluster.add(&spec.flag("--advertise").flag(nowhere.to_string())).await.unwrap();

    wait_for("the node knows", Duration::from_secs(60), || async {
        let status: Status = cluster.admin("lost", "/v1/status").await.map_err(|e| e.to_string())?;
        let why = status.not_reached.ok_or("not yet")?;
        if why.contains(&nowhere.to_string()) { Ok(()) } else { Err(why) }
    })
    .await
    .unwrap();
    wait_for("the others know", Duration::from_secs(60), || async {
        let services: Vec<Service> = cluster.admin("seed", "/v1/services").await.map_err(|e| e.to_string())?;
        let only = services.iter().find(|service| service.name.as_str() == "only").ok_or("not listed")?;
        let state = only.instances.first().map(|instance| instance.state);
        if state == Some(ServiceState::Unhealthy) { Ok(()) } else { Err(format!("{state:?}")) }
    })
    .await
    .unwrap();
    let outbound = cluster.node("seed").outbound;
    for _ in 0..20 {
        assert_eq!(call(outbound, "web", "/").await.text(), "hello from good\n");
    }
    let begun = Instant::now();
    assert_eq!(call(outbound, "only", "/").await.status, 503);
    assert!(begun.elapsed() < Duration::from_secs(5), "it took {:?}", begun.elapsed());
    let log = std::fs::read_to_string(cluster.dir().join("seed.log")).unwrap_or_default()
        + &std::fs::read_to_string(cluster.dir().join("good.log")).unwrap_or_default();
    assert!(log.contains("cannot reach a member at the address that it tells"), "{log}");
    for name in ["seed", "good"] {
        let status: Status = cluster.admin(name, "/v1/status").await.unwrap();
        assert_eq!(status.not_reached, None, "{name}");
    }
}
