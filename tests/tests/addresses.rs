//! Addresses that are true: what a node tells of where it is, and what becomes of one that nobody reaches there.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use starling_chaos::{Client, Cluster, NodeSpec, Process, free_port, starling, wait_for};
use starling_protocol::{
    ServiceState,
    admin::{Member, Service, Status},
};
use starling_tests::{binary, call, run, sample};

const LIMIT: Duration = Duration::from_secs(120);

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

    wait_for("the node knows", LIMIT, || async {
        let status: Status = cluster.admin("lost", "/v1/status").await.map_err(|e| e.to_string())?;
        let why = status.not_reached.ok_or("not yet")?;
        if why.contains(&nowhere.to_string()) { Ok(()) } else { Err(why) }
    })
    .await
    .unwrap();
    wait_for("the others know", LIMIT, || async {
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

/// A machine was cloned with its state directory: once the clone took every call, and the original logged that its own link
/// was bad.
#[tokio::test]
async fn two_nodes_with_one_key_are_named_by_themselves_and_by_others() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let (_service, service) = sample(&dir, "web").await;
    cluster.add(&NodeSpec::named("web").serving(format!("web={service}"))).await.unwrap();
    cluster.add(&NodeSpec::named("other")).await.unwrap();
    cluster.converge().await.unwrap();
    let original = (cluster.node("web").mesh, cluster.node("web").state.clone());
    let copy = dir.join("copy");
    let paths = [&original.1, &copy].map(|path| path.to_string_lossy().into_owned());
    assert!(run(Path::new("cp"), &["-a", &paths[0], &paths[1]]).0, "the state directory is copied");
    let [mesh, admin, outbound] = [free_port(), free_port(), free_port()];
    let flags = [
        ("--name", "web".into()),
        ("--state", copy.to_string_lossy().into_owned()),
        ("--listen", mesh.to_string()),
        ("--admin", admin.to_string()),
        ("--outbound", outbound.to_string()),
        ("--seed", cluster.seed().to_string()),
        ("--service", format!("web={service}")),
    ];
    let args = ["node".to_owned()].into_iter().chain(flags.into_iter().flat_map(|(f, v)| [f.to_owned(), v]));
    let mut clone = Process::start(binary(), args, &dir.join("clone.log")).unwrap();

    let both = [original.0.to_string(), mesh.to_string()];
    wait_for("both logs name both addresses", LIMIT, || async {
        let logs = [cluster.node("web").process.log(), clone.log()];
        let says =
            |log: &String| log.lines().any(|l| l.contains("this node's key") && both.iter().all(|a| l.contains(a)));
        if logs.iter().all(says) { Ok(()) } else { Err(logs.join("\n--\n")) }
    })
    .await
    .unwrap();
    for (at, own, other) in [(cluster.node("web").admin, original.0, mesh), (admin, mesh, original.0)] {
        wait_for(&format!("the status at {own} shows the other"), LIMIT, || async {
            let answer = Client::plain().get(at, &at.to_string(), "/v1/status").await.map_err(|e| e.to_string())?;
            let status: Status = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
            let at = (status.advertise, status.also_at);
            if at == (own, Some(other)) { Ok(()) } else { Err(format!("{at:?}")) }
        })
        .await
        .unwrap();
    }
    for observer in ["seed", "other"] {
        wait_for(&format!("{observer} shows both"), LIMIT, || async {
            let members: Vec<Member> = cluster.members(observer).await.map_err(|e| e.to_string())?;
            let member = members.iter().find(|m| m.name == "web").ok_or("nothing")?;
            let at = [Some(member.addr), member.also_at];
            if at.contains(&Some(original.0)) && at.contains(&Some(mesh)) { Ok(()) } else { Err(format!("{at:?}")) }
        })
        .await
        .unwrap();
    }
    // Each has its turn.
    for addr in [original.0, mesh] {
        wait_for(&format!("the turn of {addr}"), LIMIT, || async {
            let members: Vec<Member> = cluster.members("seed").await.map_err(|e| e.to_string())?;
            let now = members.iter().find(|m| m.name == "web").map(|m| m.addr);
            if now == Some(addr) { Ok(()) } else { Err(format!("{now:?}")) }
        })
        .await
        .unwrap();
    }
    let seed = cluster.node("seed").admin.to_string();
    let (_, _, told) = starling(binary(), ["members", "--admin", &seed]).await.unwrap();
    assert!(both.iter().all(|addr| told.contains(addr)) && told.contains("stop one"), "{told}");

    // The one that is left is called, however the other has ended.
    clone.kill().await.unwrap();
    wait_for("the original is called", LIMIT, || async {
        let answer = call(cluster.node("other").outbound, "web", "/").await;
        let members: Vec<Member> = cluster.members("other").await.map_err(|e| e.to_string())?;
        let addr = members.iter().find(|m| m.name == "web").map(|m| m.addr);
        if answer.status == 200 && addr == Some(original.0) {
            Ok(())
        } else {
            Err(format!("{}, {addr:?}", answer.status))
        }
    })
    .await
    .unwrap();
}
