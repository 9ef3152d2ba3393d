//! Nodes find each other, call each other, die, come back and leave.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use starling_chaos::{Client, Cluster, Door, Load, NodeSpec, Process, free_port, wait_for};
use starling_protocol::admin::{Member, MemberStatus, Service, Status};
use starling_tests::{binary, broken_server, call, nginx, sample};

/// A seed and two nodes that serve `orders` with nginx behind them.
async fn two_instances() -> Option<(Cluster, Process)> {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (web, addr) = nginx(cluster.dir()).await?;
    for name in ["orders-1", "orders-2"] {
        let spec = NodeSpec::named(name).serving(format!("orders={addr}")).flag("--zone").flag("z1");
        cluster.add(&spec).await.unwrap();
    }
    cluster.converge().await.unwrap();
    Some((cluster, web))
}

#[tokio::test]
async fn nodes_agree_and_nginx_answers_behind_another_node() {
    let Some((cluster, _web)) = two_instances().await else { return };
    let mut views = Vec::new();
    for name in ["seed", "orders-1", "orders-2"] {
        let admin = format!("http://{}", cluster.node(name).admin);
        let json = cluster.run(&["members", "-o", "json", "--admin", &admin]).await.unwrap();
        let mut members: Vec<Member> = serde_json::from_str(&json).unwrap();
        assert_eq!(members.iter().filter(|m| m.is_self).map(|m| m.name.as_str()).collect::<Vec<_>>(), [name]);
        members.iter_mut().for_each(|m| {
            m.is_self = false;
            m.incarnation = 0;
            m.since = String::new();
        });
        views.push(members);
    }
    assert_eq!(views[0].len(), 3);
    assert!(views.windows(2).all(|pair| pair[0] == pair[1]), "{views:#?}");
    assert_eq!(views[0].iter().filter(|m| m.zone == "z1").count(), 2);

    let door = cluster.node("seed").outbound;
    for host in ["orders.mesh.internal", "orders.mesh", "orders", "ORDERS.mesh.internal:80"] {
        let answer = Client::plain().get(door, host, "/").await.unwrap();
        assert_eq!((answer.status, answer.text().contains("caller=seed")), (200, true), "{host}: {answer:?}");
    }
    let request = Request::get("http://orders.mesh.internal/").body(Bytes::new()).unwrap();
    assert_eq!(Client::plain().send(Door::PlainHttp2, door, request).await.unwrap().status, 200);

    let services: Vec<Service> = cluster.admin("seed", "/v1/services").await.unwrap();
    assert_eq!((services.len(), services[0].instances.len()), (1, 2));
    let status: Status = cluster.admin("orders-1", "/v1/status").await.unwrap();
    assert_eq!((status.members_alive, status.issuers_alive, status.issuer), (3, 1, false));
    assert_eq!(status.spiffe_id, "spiffe://demo/node/orders-1");
    let socket = cluster.node("seed").state.join("admin.sock");
    let table = cluster.run(&["members", "--admin", &socket.to_string_lossy()]).await.unwrap();
    assert!(table.contains("orders-2") && table.lines().count() == 4, "{table}");
}

#[tokio::test]
async fn a_killed_node_costs_no_idempotent_call_and_comes_back_newer() {
    let Some((mut cluster, _web)) = two_instances().await else { return };
    let before = cluster.members("seed").await.unwrap();
    let load = Load::start(cluster.node("seed").outbound, "orders", 400);
    enough(&load, 200).await;
    cluster.kill("orders-1").await.unwrap();
    let so_far = load.good();
    enough(&load, so_far + 500).await;
    let tally = load.stop().await;
    assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
    for observer in ["seed", "orders-2"] {
        cluster.wait_status(observer, "orders-1", MemberStatus::Down).await.unwrap();
    }
    cluster.restart("orders-1").await.unwrap();
    for observer in ["seed", "orders-2"] {
        cluster.wait_status(observer, "orders-1", MemberStatus::Alive).await.unwrap();
    }
    let after = cluster.members("seed").await.unwrap();
    let generation = |view: &[Member]| view.iter().find(|m| m.name == "orders-1").unwrap().generation;
    assert!(generation(&after) > generation(&before));
}

async fn enough(load: &Load, calls: usize) {
    let done = || async { if load.good() >= calls { Ok(()) } else { Err(load.good().to_string()) } };
    wait_for("calls are answered", Duration::from_secs(60), done).await.unwrap();
}

#[tokio::test]
async fn a_seed_that_dies_is_not_missed() {
    let Some((mut cluster, _web)) = two_instances().await else { return };
    cluster.kill("seed").await.unwrap();
    cluster.wait_status("orders-1", "seed", MemberStatus::Down).await.unwrap();
    assert_eq!(call(cluster.node("orders-1").outbound, "orders", "/").await.status, 200);
    // A node that restarts finds its former peers by itself.
    cluster.kill("orders-2").await.unwrap();
    cluster.restart("orders-2").await.unwrap();
    cluster.wait_status("orders-1", "orders-2", MemberStatus::Alive).await.unwrap();
    cluster.wait_status("orders-2", "orders-1", MemberStatus::Alive).await.unwrap();
}

/// It used to answer 404, "no node of the mesh serves orders", until somebody had told it.
#[tokio::test]
async fn a_node_that_was_restarted_never_says_that_a_service_is_not_there() {
    let Some((mut cluster, _web)) = two_instances().await else { return };
    // The first node of a mesh has no seeds; it knows the others from its former life. The others have it for a seed.
    for name in ["seed", "orders-1", "seed"] {
        cluster.kill(name).await.unwrap();
        let door = cluster.node(name).outbound;
        let first = tokio::spawn(async move {
            loop {
                match Client::plain().get(door, "orders.mesh.internal", "/").await {
                    Ok(answer) => return answer,
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        });
        cluster.restart(name).await.unwrap();
        let answer = first.await.unwrap();
        assert_eq!(answer.status, 200, "{name}: {}", answer.text());
        assert_eq!(call(door, "orders", "/").await.status, 200, "{name} is ready");
    }
}

#[tokio::test]
async fn leaving_is_not_dying() {
    let Some((mut cluster, _web)) = two_instances().await else { return };
    let load = Load::start(cluster.node("seed").outbound, "orders", 200);
    enough(&load, 50).await;
    assert!(cluster.terminate("orders-2").await.unwrap().success());
    let so_far = load.good();
    enough(&load, so_far + 50).await;
    assert_eq!(load.stop().await.failed, Vec::<String>::new());
    for observer in ["seed", "orders-1"] {
        cluster.wait_status(observer, "orders-2", MemberStatus::Left).await.unwrap();
    }
}

#[tokio::test]
async fn a_second_signal_exits_at_once() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some((_silent, addr)) = broken_server(cluster.dir(), "silent").await else { return };
    cluster.add(&NodeSpec::named("a").serving(format!("slow={addr}"))).await.unwrap();
    let door = cluster.node("a").outbound;
    let waiting = tokio::spawn(async move { Client::plain().get(door, "slow.mesh.internal", "/").await });
    wait_for("the call is under way", Duration::from_secs(30), || async {
        let status: Status = cluster.admin("a", "/v1/status").await.map_err(|e| e.to_string())?;
        if status.in_flight > 0 { Ok(()) } else { Err("no call in flight".into()) }
    })
    .await
    .unwrap();
    cluster.node("a").process.signal("TERM").await.unwrap();
    wait_for("the node drains", Duration::from_secs(30), || async {
        if cluster.node("a").process.log().contains("draining") { Ok(()) } else { Err("not yet".into()) }
    })
    .await
    .unwrap();
    let status = cluster.terminate("a").await.unwrap();
    assert_eq!(status.code(), Some(1), "a second signal is no clean drain");
    waiting.abort();
}

#[tokio::test]
async fn big_bodies_go_both_ways_in_bounded_memory() {
    const BYTES: usize = 256 << 20;
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (_service, addr) = sample(cluster.dir(), "store").await;
    cluster.add(&NodeSpec::named("a").serving(format!("store={addr}"))).await.unwrap();
    cluster.converge().await.unwrap();
    let door = cluster.node("seed").outbound;
    let answer = call(door, "store", &format!("/bytes/{BYTES}")).await;
    assert_eq!((answer.status, answer.body.len()), (200, BYTES));
    let upload = Request::builder().method(Method::POST).uri("http://store.mesh.internal/");
    let upload = upload.body(Bytes::from(vec![0; BYTES])).unwrap();
    let answer = Client::plain().send(Door::PlainHttp1, door, upload).await.unwrap();
    assert_eq!(answer.text(), "a6d72ac7690f53be6ae46ba88506bd97302a093f7108472bd9efc3cefda06484");
    for name in ["seed", "a"] {
        let pid = cluster.node(name).process.pid().unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap().trim().to_string();
        let peak_kib: usize = peak.trim_end_matches(" kB").trim().parse().unwrap();
        assert!(peak_kib < 128 << 10, "{name} held {peak_kib} KiB");
    }
}

#[tokio::test]
async fn an_upstream_port_leads_to_its_service() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (_service, addr) = sample(cluster.dir(), "store").await;
    cluster.add(&NodeSpec::named("a").serving(format!("store={addr}"))).await.unwrap();
    let port = free_port();
    cluster.add(&NodeSpec::named("b").flag("--upstream").flag(format!("store={port}"))).await.unwrap();
    cluster.converge().await.unwrap();
    let answer = Client::plain().get(port, "whatever.example", "/").await.unwrap();
    assert_eq!(answer.text(), "hello from store\n");
}

/// A mesh whose certificates live for `ttl`, of one node that serves `store` itself.
struct ShortLived {
    cluster: Cluster,
    state: String,
    mesh: SocketAddr,
    admin: SocketAddr,
    outbound: SocketAddr,
    processes: [Process; 2],
}

async fn short_lived(ttl: &str) -> ShortLived {
    let cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let (mesh, admin, outbound) = (free_port(), free_port(), free_port());
    let state = dir.join("short").to_string_lossy().into_owned();
    cluster.run(&["init", "--mesh", "short", "--state", &state]).await.unwrap();
    let (service, addr) = sample(&dir, "store").await;
    let text = format!(
        "[node]\nname = \"short\"\nstate = {state:?}\nlisten = \"{mesh}\"\ncert_ttl = \"{ttl}\"\n[admin]\nlisten = \
         \"{admin}\"\n[outbound]\nlisten = \"{outbound}\"\n[[service]]\nname = \"store\"\naddr = \"{addr}\"\n"
    );
    let file = dir.join("short.toml");
    std::fs::write(&file, text).unwrap();
    let node = Process::start(binary(), ["node", "--config", &file.to_string_lossy()], &dir.join("short.log")).unwrap();
    wait_for("the service is known", Duration::from_secs(60), || async {
        let answer = Client::plain().get(outbound, "store", "/").await.map_err(|e| e.to_string())?;
        if answer.status == 200 { Ok(()) } else { Err(answer.text()) }
    })
    .await
    .unwrap();
    ShortLived { cluster, state, mesh, admin, outbound, processes: [node, service] }
}

async fn status_at(admin: SocketAddr) -> Result<Status, String> {
    let answer = Client::plain().get(admin, &admin.to_string(), "/v1/status").await.map_err(|e| e.to_string())?;
    serde_json::from_slice(&answer.body).map_err(|e| e.to_string())
}

#[tokio::test]
async fn certificates_renew_at_half_life_and_no_connection_notices() {
    let short = short_lived("12s").await;
    let load = Load::start(short.outbound, "store", 100);
    for renewal in 1..=2 {
        let before = status_at(short.admin).await.unwrap().cert_expires;
        wait_for(&format!("renewal {renewal}"), Duration::from_secs(60), || async {
            if status_at(short.admin).await?.cert_expires == before { Err("not renewed yet".into()) } else { Ok(()) }
        })
        .await
        .unwrap();
    }
    let tally = load.stop().await;
    assert!(tally.failed.is_empty() && tally.good > 100, "{tally:?}");
}

#[tokio::test]
async fn a_node_that_slept_past_its_certificate_renews_and_is_back() {
    let short = short_lived("6s").await;
    let token = ["token", "create", "--state", &short.state, "--seed", &short.mesh.to_string()];
    let token = short.cluster.run(&token).await.unwrap().trim().to_string();
    let (listen, admin, outbound) = (free_port().to_string(), free_port(), free_port().to_string());
    let state = short.cluster.dir().join("sleeper").to_string_lossy().into_owned();
    let seed = short.mesh.to_string();
    let args = [
        "node",
        "--name",
        "sleeper",
        "--state",
        &state,
        "--listen",
        &listen,
        "--admin",
        &admin.to_string(),
        "--outbound",
        &outbound,
        "--seed",
        &seed,
        "--token",
        &token,
    ]
    .map(String::from);
    let log = short.cluster.dir().join("sleeper.log");
    let mut sleeper = Process::start(binary(), &args, &log).unwrap();
    let alive = || async {
        let status = status_at(short.admin).await?;
        if status.members_alive == 2 { Ok(()) } else { Err(format!("{} alive", status.members_alive)) }
    };
    wait_for("the sleeper joins", Duration::from_secs(60), alive).await.unwrap();
    sleeper.kill().await.unwrap();
    // Certificates live for six seconds: after this, the sleeper's own has ended.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let _awake = Process::start(binary(), &args, &log).unwrap();
    wait_for("the sleeper is back", Duration::from_secs(60), || async {
        let answer = Client::plain().get(admin, &admin.to_string(), "/v1/members").await.map_err(|e| e.to_string())?;
        let members: Vec<Member> = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
        let alive = members.iter().filter(|m| m.status == MemberStatus::Alive).count();
        if alive == 2 { Ok(()) } else { Err(format!("{members:?}")) }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_second_issuer_admits_nodes_by_itself() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let token = cluster.token(&["--issuer"]).await.unwrap();
    cluster.add_with_token(&NodeSpec::named("issuer-2"), &token).await.unwrap();
    cluster.converge().await.unwrap();
    cluster.kill("seed").await.unwrap();
    let state = cluster.node("issuer-2").state.to_string_lossy().into_owned();
    let seed = cluster.node("issuer-2").mesh.to_string();
    let token = cluster.run(&["token", "create", "--state", &state, "--seed", &seed]).await.unwrap();
    cluster.add_with_token(&NodeSpec::named("late"), token.trim()).await.unwrap();
    cluster.wait_status("issuer-2", "late", MemberStatus::Alive).await.unwrap();
}

#[tokio::test]
async fn a_hang_up_reloads_the_file_of_a_node() {
    let short = short_lived("1h").await;
    let file = short.cluster.dir().join("short.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let [node, _] = &short.processes;
    let zone = || async {
        let answer = Client::plain().get(short.admin, &short.admin.to_string(), "/v1/members").await;
        let members: Vec<Member> = serde_json::from_slice(&answer.map_err(|e| e.to_string())?.body).unwrap();
        Ok::<_, String>((members[0].zone.clone(), members[0].services[0].version.clone()))
    };
    let changed = text
        .replace("[admin]", "zone = \"eu\"\n[admin]")
        .replace("name = \"store\"", "name = \"store\"\nversion = \"v7\"");
    std::fs::write(&file, &changed).unwrap();
    node.signal("HUP").await.unwrap();
    wait_for("the new zone and version", Duration::from_secs(60), || async {
        let seen = zone().await?;
        if seen == ("eu".into(), "v7".into()) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await
    .unwrap();
    std::fs::write(&file, changed.replace("name = \"short\"", "name = \"other\"")).unwrap();
    node.signal("HUP").await.unwrap();
    wait_for("the refusal", Duration::from_secs(60), || async {
        status_at(short.admin).await?.reload_error.map(|_| ()).ok_or_else(|| "no error yet".into())
    })
    .await
    .unwrap();
}
