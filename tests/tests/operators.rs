//! What operators ask of the mesh and do to it: views, pings, documents, dead members, restarts, lost seeds.

use std::time::{Duration, Instant};

use serde_json::Value;
use starling_chaos::{Cluster, NodeSpec, Process, starling, wait_for};
use starling_protocol::admin::{Document, Member, MemberStatus};
use starling_protocol::{DocumentState, admin::ObserverView};
use starling_tests::{binary, call, sample};

const LIMIT: Duration = Duration::from_secs(60);

async fn mesh(names: &[&str]) -> Cluster {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for name in names {
        cluster.add(&NodeSpec::named(name)).await.unwrap();
    }
    cluster.converge().await.unwrap();
    cluster
}

fn admin(cluster: &Cluster, name: &str) -> String {
    format!("http://{}", cluster.node(name).admin)
}

/// Runs a command against a node; what it printed on stdout and stderr, and its exit code.
async fn ask(cluster: &Cluster, node: &str, args: &[&str]) -> (String, String, Option<i32>) {
    let admin = admin(cluster, node);
    let (status, out, err) = starling(cluster.binary(), [args, &["--admin", &admin]].concat()).await.unwrap();
    (out, err, status.code())
}

async fn member(cluster: &Cluster, observer: &str, subject: &str) -> Option<Member> {
    cluster.members(observer).await.unwrap().into_iter().find(|m| m.name == subject)
}

#[tokio::test]
async fn views_pings_and_the_watch_tell_the_truth() {
    let mut cluster = mesh(&["a", "b"]).await;
    let (wide, _, _) = ask(&cluster, "a", &["members", "-o", "wide"]).await;
    for word in ["SUSPECTED BY", "LINK", "connected", "RTT", "ROOT", "HEARD"] {
        assert!(wide.contains(word), "{word} is not in\n{wide}");
    }
    let (table, said, code) = ask(&cluster, "a", &["members", "--from", "all"]).await;
    assert!(said.contains("3 views agree about 3 members") && code == Some(0), "{said}{table}");
    assert!(!table.contains("differs"), "{table}");

    let (out, said, code) = ask(&cluster, "a", &["ping", "b", "-c", "2"]).await;
    assert!(out.lines().count() == 2 && said.contains("2 answers") && code == Some(0), "{out}{said}");
    let (_, said, code) = ask(&cluster, "a", &["ping", "nobody"]).await;
    assert!(said.contains("no member has the name") && code == Some(1), "{said}");

    let log = cluster.dir().join("watch.log");
    let args = ["members", "--watch", "-o", "json", "--admin", &admin(&cluster, "a")];
    let watch = Process::start(cluster.binary(), args, &log).unwrap();
    wait_for("the watch prints a first time", LIMIT, || async {
        (watch.output().lines().count() >= 3).then_some(()).ok_or_else(|| watch.output())
    })
    .await
    .unwrap();
    cluster.kill("b").await.unwrap();
    wait_for("the watch shows the death", LIMIT, || async {
        let lines = watch.output();
        let mut members = lines.lines().filter_map(|line| serde_json::from_str::<Member>(line).ok());
        let seen = members.any(|m| m.name == "b" && m.status == MemberStatus::Down);
        seen.then_some(()).ok_or(lines)
    })
    .await
    .unwrap();
    let (json, _, _) = ask(&cluster, "a", &["members", "--from", "all", "-o", "json"]).await;
    let views: Vec<ObserverView> = serde_json::from_str(&json).unwrap();
    assert_eq!(views.iter().map(|v| v.observer.as_str()).collect::<Vec<_>>(), ["a", "seed"]);
    let (_, said, code) = ask(&cluster, "a", &["ping", "b"]).await;
    assert!(said.contains("does not answer") && code == Some(1), "{said}");
}

async fn documents(cluster: &Cluster, node: &str) -> Vec<Document> {
    cluster.admin(node, "/v1/documents").await.unwrap()
}

/// Waits until every node has that version of `policy` in that state.
async fn all_hold(cluster: &Cluster, version: u64, state: DocumentState) {
    wait_for(&format!("all hold version {version} as {state:?}"), LIMIT, || async {
        let held = documents(cluster, "a").await;
        let fine = held.iter().any(|d| {
            let same =
                |n: &starling_protocol::admin::NodeDocument| n.version == Some(version) && n.state == Some(state);
            d.version == version && d.nodes.len() == 3 && d.nodes.iter().all(same) && !d.drift
        });
        fine.then_some(()).ok_or_else(|| format!("{held:#?}"))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn documents_get_round_and_never_back() {
    let mut cluster = mesh(&["a", "b"]).await;
    let file = cluster.dir().join("rules.toml");
    std::fs::write(&file, "mode = \"open\"\n").unwrap();
    let (file, keys) = (file.display().to_string(), cluster.node("seed").state.display().to_string());
    let publish = |more: &[&'static str], file: &str, keys: &str| -> Vec<String> {
        let fixed = ["documents", "publish", file, "--kind", "policy", "--state", keys];
        fixed.iter().chain(more).map(ToString::to_string).collect()
    };
    let run = async |cluster: &Cluster, node: &str, args: Vec<String>| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        ask(cluster, node, &args).await
    };

    let (out, said, code) = run(&cluster, "a", publish(&[], &file, &keys)).await;
    assert!(out.starts_with("policy version 1 ") && code == Some(0), "{out}{said}");
    all_hold(&cluster, 1, DocumentState::Active).await;
    run(&cluster, "b", publish(&[], &file, &keys)).await;
    all_hold(&cluster, 2, DocumentState::Active).await;
    let (table, _, _) = ask(&cluster, "a", &["documents"]).await;
    assert!(table.contains("policy") && table.contains("3/3"), "{table}");

    // Nothing of these may change what the mesh holds.
    let stranger = cluster.dir().join("other");
    let stranger = stranger.display().to_string();
    cluster.run(&["init", "--mesh", "other", "--state", &stranger]).await.unwrap();
    let large = cluster.dir().join("large");
    std::fs::write(&large, vec![b'x'; (256 << 10) + 1]).unwrap();
    let large = large.display().to_string();
    for (args, why) in [
        (publish(&["--edition", "1"], &file, &keys), "behind version 2"),
        (publish(&["--edition", "99999999999"], &file, &keys), "leaps"),
        (publish(&[], &file, &stranger), "not issued by this mesh"),
        (publish(&[], &large, &keys), "a document has at most"),
        (publish(&[], "/nonexistent", &keys), "cannot read"),
        (publish(&[], &file, &cluster.node("b").state.display().to_string()), "no admin key"),
        (publish(&["--expires-in", "0s"], &file, &keys), ""),
    ] {
        let (out, said, code) = run(&cluster, "a", args).await;
        if why.is_empty() {
            // Taken, and over at once.
            assert_eq!(code, Some(0), "{said}");
        } else {
            assert!(said.contains(why) && code == Some(1), "{why}: {out}{said}");
        }
    }
    all_hold(&cluster, 3, DocumentState::Expired).await;

    // A node that was away catches up, and a restart does not forget how far it was.
    cluster.kill("b").await.unwrap();
    run(&cluster, "a", publish(&[], &file, &keys)).await;
    cluster.restart("b").await.unwrap();
    all_hold(&cluster, 4, DocumentState::Active).await;
    let (_, said, _) = run(&cluster, "b", publish(&["--edition", "3"], &file, &keys)).await;
    assert!(said.contains("behind version 4"), "{said}");

    let (_, said, code) = ask(&cluster, "a", &["documents", "delete", "--kind", "policy", "--state", &keys]).await;
    assert_eq!(code, Some(0), "{said}");
    all_hold(&cluster, 5, DocumentState::Deleted).await;
    let (_, said, code) = ask(&cluster, "a", &["documents", "delete", "--kind", "none", "--state", &keys]).await;
    assert!(said.contains("there is no document none") && code == Some(1), "{said}");
}

#[tokio::test]
async fn a_document_on_whose_trial_the_node_dies_twice_is_quarantined_there() {
    let mut cluster = mesh(&["a", "b"]).await;
    let file = cluster.dir().join("rules.toml");
    std::fs::write(&file, "mode = \"open\"\n").unwrap();
    let keys = cluster.node("seed").state.display().to_string();
    let file = file.display().to_string();
    let publish = ["documents", "publish", &file, "--kind", "plans", "--state", &keys];
    ask(&cluster, "a", &publish).await;
    all_hold(&cluster, 1, DocumentState::Active).await;
    cluster.kill("b").await.unwrap();
    cluster.restart("b").await.unwrap();
    all_hold(&cluster, 1, DocumentState::Active).await;
    cluster.kill("b").await.unwrap();
    cluster.restart("b").await.unwrap();
    wait_for("the drift shows", LIMIT, || async {
        let held = documents(&cluster, "a").await;
        let of_b = held.first().and_then(|d| d.nodes.iter().find(|n| n.node == "b")).and_then(|n| n.state);
        let fine = held.first().is_some_and(|d| d.drift) && of_b == Some(DocumentState::Quarantined);
        fine.then_some(()).ok_or_else(|| format!("{held:#?}"))
    })
    .await
    .unwrap();
    let (table, _, _) = ask(&cluster, "a", &["documents"]).await;
    assert!(table.contains("quarantined"), "{table}");
    // The next edition is another one, and gets its own trial.
    ask(&cluster, "a", &publish).await;
    all_hold(&cluster, 2, DocumentState::Active).await;
}

#[tokio::test]
async fn a_dead_member_can_be_struck_off_and_come_back() {
    let mut cluster = mesh(&["a", "b"]).await;
    let state = cluster.node("seed").state.to_string_lossy().into_owned();
    let strike = ["force-leave", "b", "--state", &state];
    let (_, said, code) = ask(&cluster, "a", &["force-leave", "b"]).await;
    assert!(said.contains("only an issuer or the admin key") && code == Some(1), "{said}");
    let (_, said, code) = ask(&cluster, "a", &strike).await;
    assert!(said.contains("it is not down") && code == Some(1), "{said}");
    cluster.kill("b").await.unwrap();
    cluster.wait_status("a", "b", MemberStatus::Down).await.unwrap();
    cluster.wait_status("seed", "b", MemberStatus::Down).await.unwrap();
    let (_, said, code) = ask(&cluster, "a", &strike).await;
    assert_eq!(code, Some(0), "{said}");
    cluster.wait_status("seed", "b", MemberStatus::Left).await.unwrap();
    let (_, _, code) = ask(&cluster, "seed", &["force-leave", "b", "--prune"]).await;
    assert_eq!(code, Some(0));
    for observer in ["a", "seed"] {
        wait_for("it is not shown any more", LIMIT, || async {
            member(&cluster, observer, "b").await.map_or(Ok(()), |m| Err(format!("{m:?}")))
        })
        .await
        .unwrap();
    }
    cluster.restart("b").await.unwrap();
    cluster.converge().await.unwrap();
}

#[tokio::test]
async fn a_node_that_restarts_at_once_is_never_missed() {
    let mut cluster = mesh(&["a"]).await;
    let (_service, addr) = sample(cluster.dir(), "orders").await;
    cluster.add(&NodeSpec::named("b").serving(format!("orders={addr}"))).await.unwrap();
    cluster.converge().await.unwrap();
    // As if the clock had been set back by an hour since the last start.
    let generation = cluster.node("b").state.join("generation");
    let ahead = member(&cluster, "a", "b").await.unwrap().generation + 3600;
    std::fs::write(&generation, ahead.to_string()).unwrap();
    for life in 1..=2 {
        cluster.kill("b").await.unwrap();
        cluster.restart("b").await.unwrap();
        let back = Instant::now();
        wait_for("the new life is known", LIMIT, || async {
            let seen = member(&cluster, "a", "b").await.map(|m| (m.generation, m.status));
            (seen == Some((ahead + life, MemberStatus::Alive))).then_some(()).ok_or_else(|| format!("{seen:?}"))
        })
        .await
        .unwrap();
        let answer = call(cluster.node("a").outbound, "orders", "/").await;
        assert_eq!(answer.status, 200, "{:?} after the restart: {}", back.elapsed(), answer.text());
        let (_, said, code) = ask(&cluster, "a", &["ping", "b", "-c", "1"]).await;
        assert_eq!(code, Some(0), "{said}");
    }
}

#[tokio::test]
async fn only_the_paused_node_is_suspected_and_it_comes_back() {
    let cluster = mesh(&["a", "b", "c"]).await;
    let before = cluster.members("a").await.unwrap();
    cluster.node("c").process.signal("STOP").await.unwrap();
    for observer in ["seed", "a", "b"] {
        cluster.wait_status(observer, "c", MemberStatus::Down).await.unwrap();
    }
    // Longer than anybody's patience: c must not blame the others for its own sleep.
    tokio::time::sleep(Duration::from_secs(4)).await;
    cluster.node("c").process.signal("CONT").await.unwrap();
    for observer in ["seed", "a", "b"] {
        cluster.wait_status(observer, "c", MemberStatus::Alive).await.unwrap();
    }
    for observer in ["seed", "a", "b", "c"] {
        let now = cluster.members(observer).await.unwrap();
        for old in before.iter().filter(|m| m.name != "c") {
            let new = now.iter().find(|m| m.name == old.name).unwrap();
            let same = (new.status, new.generation) == (MemberStatus::Alive, old.generation);
            assert!(same, "{observer} sees {new:?}");
        }
    }
}

#[tokio::test]
async fn with_every_seed_dead_the_mesh_is_still_joined() {
    let mut cluster = mesh(&["a", "b"]).await;
    // A second issuer, which is no seed; a token of its own that names only `a`, which is neither.
    let token = cluster.token(&["--issuer"]).await.unwrap();
    cluster.add_with_token(&NodeSpec::named("issuer-2"), &token).await.unwrap();
    cluster.converge().await.unwrap();
    let (state, through) = (cluster.node("issuer-2").state.clone(), cluster.node("a").mesh.to_string());
    let token = ["token", "create", "--state", &state.to_string_lossy(), "--seed", &through, "--service", "orders"];
    let token = cluster.run(&token).await.unwrap();
    cluster.kill("seed").await.unwrap();
    cluster.wait_status("a", "seed", MemberStatus::Down).await.unwrap();
    let newcomer = NodeSpec::named("late").flag("--seed").flag(through);
    cluster.add_with_token(&newcomer, token.trim()).await.unwrap();
    cluster.wait_status("b", "late", MemberStatus::Alive).await.unwrap();
    // And one that was there before finds back by the peers that it remembers.
    cluster.kill("b").await.unwrap();
    cluster.restart("b").await.unwrap();
    cluster.converge().await.unwrap();
    // Whom it never heard it asks itself before it gives it up, whatever the others say.
    cluster.wait_status("b", "seed", MemberStatus::Down).await.unwrap();
    let status: Value = cluster.admin("b", "/v1/status").await.unwrap();
    assert_eq!(status["members_alive"], 4, "{status}");
}
