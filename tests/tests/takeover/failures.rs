//! Takeovers that come to nothing, at any moment.

use std::{os::unix::fs::PermissionsExt, time::Duration};

use starling_chaos::{Client, Load, NodeSpec, starling, wait_for};
use starling_protocol::admin::MemberStatus;
use starling_tests::{binary, sample};

use super::{LIMIT, member, mesh, so_many_more, status, upgrade};

#[tokio::test]
async fn a_process_that_fails_its_checks_leaves_the_old_one_in_charge() {
    let (mut cluster, _service) = mesh().await;
    let before = status(&cluster, "orders-1").await;
    let load = Load::start(cluster.node("seed").outbound, "orders", 200);
    so_many_more(&load, 100).await;

    // Programs that are none, and one that has other ideas.
    for (program, why) in
        [("/bin/false", "ended before it asked"), ("/nowhere/starling", "cannot run"), ("/bin/cat", "ended before it")]
    {
        let said = upgrade(&cluster, "orders-1", &["--binary", program]).await.unwrap_err();
        assert!(said.contains(why), "{program}: {said}");
    }
    // Named by whoever can send a request to loopback.
    let admin = cluster.node("orders-1").admin.to_string();
    let (refused, _, said) =
        starling(binary(), ["upgrade", "--admin", &admin, "--binary", "/bin/false"]).await.unwrap();
    assert!(!refused.success() && said.contains("over admin.sock"), "{said}");
    // Arguments that it takes back before and after the old one has let go: a port in use, and a service that is not granted.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let upstream = format!("orders={}", taken.local_addr().unwrap());
    for (more, why) in [
        (["--take-over", "--upstream", &upstream], "another process has the port"),
        (["--take-over", "--service", "stock=127.0.0.1:9"], "does not grant service stock"),
        (["--take-over", "--name", "other"], "cannot be used multiple times"),
    ] {
        let old = cluster.start_beside("orders-1", &more).unwrap();
        let mut failed = cluster.replace("orders-1", old).unwrap();
        assert!(!failed.wait(LIMIT).await.unwrap().success());
        assert!(failed.log().contains(why), "{why}: {}", failed.log());
        so_many_more(&load, 100).await;
    }
    let after = status(&cluster, "orders-1").await;
    assert_eq!((after.phase, after.predecessor), ("ready".to_string(), None));
    assert!(after.uptime_s >= before.uptime_s);
    let tally = load.stop().await;
    assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
    // It gossips again: what it says and hears is new.
    cluster.add(&NodeSpec::named("late")).await.unwrap();
    cluster.converge().await.unwrap();
    assert_eq!(member(&cluster, "late", "orders-1").await.status, MemberStatus::Alive);
    // And it can be taken over by one that is well.
    let mut old = cluster.take_over("orders-1").await.unwrap();
    assert!(old.wait(LIMIT).await.unwrap().success());
}

#[tokio::test]
async fn whoever_asks_where_nobody_runs_is_told_so() {
    let (mut cluster, _service) = mesh().await;
    let state = cluster.node("orders-1").state.clone();
    let mode = std::fs::metadata(state.join("takeover.sock")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    cluster.terminate("orders-1").await.unwrap();
    let state = state.to_string_lossy().into_owned();
    let (status, _, said) =
        starling(binary(), ["node", "--state", &state, "--take-over", "--listen", "127.0.0.1:0"]).await.unwrap();
    assert!(!status.success() && said.contains("no running node can be asked"), "{said}");
    // A socket that a former life has left behind does no harm.
    cluster.restart("orders-1").await.unwrap();
    // Somebody who says nothing, or nonsense, takes nothing from anybody.
    for nonsense in [&b""[..], b"\0\0\0\x02{}", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"] {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(format!("{state}/takeover.sock")).unwrap();
        stream.write_all(nonsense).unwrap();
    }
    let mut old = cluster.take_over("orders-1").await.unwrap();
    assert!(old.wait(LIMIT).await.unwrap().success());
}

/// Killed later and later, until it has taken over: whenever that is, a call finds somebody.
#[tokio::test]
async fn a_new_process_may_die_at_any_moment() {
    let (mut cluster, _service) = mesh().await;
    let (_other, addr) = sample(cluster.dir(), "other").await;
    cluster.add(&NodeSpec::named("orders-2").serving(format!("orders={addr}"))).await.unwrap();
    let load = Load::start(cluster.node("seed").outbound, "orders", 200);
    let mut old = loop_of_deaths(&mut cluster, &load).await;
    // The one from which it had taken over finishes, frees the ports, and the next start is one like any other.
    old.wait(LIMIT).await.unwrap();
    cluster.restart("orders-1").await.unwrap();
    cluster.wait_status("seed", "orders-1", MemberStatus::Alive).await.unwrap();
    so_many_more(&load, 100).await;
    let tally = load.stop().await;
    assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
    let door = cluster.node("orders-1").outbound;
    assert_eq!(Client::plain().get(door, "orders", "/").await.unwrap().status, 200);
}

/// Stopped as soon as it is known, whether the old one has let go by then or not.
#[tokio::test]
async fn a_new_process_that_stands_still_is_ended() {
    let (mut cluster, _service) = mesh().await;
    let load = Load::start(cluster.node("seed").outbound, "orders", 100);
    so_many_more(&load, 50).await;
    let old = cluster.start_beside("orders-1", &["--take-over"]).unwrap();
    wait_for("it is known", LIMIT, || async {
        old.log().contains("asks for this one's place").then_some(()).ok_or("not yet".to_string())
    })
    .await
    .unwrap();
    let mut new = cluster.replace("orders-1", old).unwrap();
    if new.signal("STOP").await.is_ok() && !new.log().contains("has taken over") {
        // It goes on just when it is given up, or is ended before: in neither case it takes anything.
        wait_for("it is given up", LIMIT, || async {
            new.log().contains("did not get on within").then_some(()).ok_or("not yet".to_string())
        })
        .await
        .unwrap();
        let _ = new.signal("CONT").await;
        assert!(!new.wait(LIMIT * 2).await.unwrap().success());
        cluster.wait_status("seed", "orders-1", MemberStatus::Alive).await.unwrap();
        so_many_more(&load, 50).await;
        assert_eq!(status(&cluster, "orders-1").await.phase, "ready");
        let socket = cluster.node("orders-1").state.join("admin.sock").to_string_lossy().into_owned();
        cluster.run(&["status", "--admin", &socket]).await.unwrap();
        let mut old = cluster.take_over("orders-1").await.unwrap();
        assert!(old.wait(LIMIT).await.unwrap().success());
    }
}

async fn loop_of_deaths(cluster: &mut starling_chaos::Cluster, load: &Load) -> starling_chaos::Process {
    for step in 0.. {
        let old = cluster.start_beside("orders-1", &["--take-over"]).unwrap();
        tokio::time::sleep(Duration::from_millis(20 * step)).await;
        let mut new = cluster.replace("orders-1", old).unwrap();
        let pid = new.pid().unwrap();
        new.kill().await.unwrap();
        so_many_more(load, 20).await;
        if has_given_its_place(&cluster.node("orders-1").process, pid).await {
            return cluster.replace("orders-1", new).unwrap();
        }
        let still = || async { status_of(cluster).await };
        wait_for("the old one is in charge", LIMIT, still).await.unwrap();
    }
    unreachable!()
}

/// Whether that process got the node's place before it died: only the one that gives it knows, for the other one may have died
/// with its last word still under way.
async fn has_given_its_place(process: &starling_chaos::Process, asking: u32) -> bool {
    let said = |what: &str| {
        process.log().lines().filter(|line| line.contains(what)).any(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["pid"] == asking
        })
    };
    if !said("asks for this one's place") {
        return false;
    }
    wait_for("what came of it is known", LIMIT, || async {
        (said("another process has taken over") || said("could not take over"))
            .then_some(())
            .ok_or("not yet".to_string())
    })
    .await
    .unwrap();
    said("another process has taken over")
}

async fn status_of(cluster: &starling_chaos::Cluster) -> Result<(), String> {
    let door = cluster.node("orders-1").outbound;
    let answer = Client::plain().get(door, "orders", "/").await.map_err(|e| e.to_string())?;
    (answer.status == 200).then_some(()).ok_or(answer.text())
}

#[tokio::test]
async fn the_old_process_may_die_while_it_finishes() {
    let (mut cluster, _service) = mesh().await;
    let load = Load::start(cluster.node("orders-1").outbound, "orders", 100);
    let mut stream = tokio::net::TcpStream::connect(cluster.node("orders-1").outbound).await.unwrap();
    use tokio::io::AsyncWriteExt;
    // A request that never ends keeps it.
    stream.write_all(b"POST / HTTP/1.1\r\nhost: orders\r\ncontent-length: 100\r\n\r\nsome").await.unwrap();
    so_many_more(&load, 50).await;
    let mut old = cluster.take_over("orders-1").await.unwrap();
    // What was under way is over, but for the one.
    so_many_more(&load, 300).await;
    assert!(old.is_running() && status(&cluster, "orders-1").await.predecessor == old.pid());
    old.kill().await.unwrap();
    wait_for("it is known to be gone", LIMIT, || async {
        status(&cluster, "orders-1").await.predecessor.map_or(Ok(()), |pid| Err(pid.to_string()))
    })
    .await
    .unwrap();
    so_many_more(&load, 100).await;
    let tally = load.stop().await;
    assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
}
