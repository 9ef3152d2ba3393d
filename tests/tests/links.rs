//! Links that fail, one way and both, between real nodes in a network namespace of the test's own.

use std::{sync::RwLock, time::Duration};

use starling_chaos::{Cluster, NodeSpec, wait_for};
use starling_protocol::admin::{Member, MemberStatus};
use starling_tests::{
    binary,
    namespace::{self, nft, udp_ports},
};

const LIMIT: Duration = Duration::from_secs(120);
/// Held by each test, alone by one that would take a machine that is busy with the others for a bad link.
static TURN: RwLock<()> = RwLock::new(());

/// See [`namespace::is_inside`].
fn in_namespace(test: &str, alone: bool) -> bool {
    let _alone = alone.then(|| TURN.write());
    let _beside = (!alone).then(|| TURN.read());
    namespace::is_inside(test)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().expect("a runtime")
}

/// What the network does to a node.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    /// It hears nobody.
    Deaf,
    /// Nobody hears it.
    Mute,
    /// Both.
    Off,
}

/// Drops what one node sends to the others, or they to it.
fn cut(cluster: &Cluster, name: &str, cut: Cut) {
    let ports = udp_ports(cluster.node(name).process.pid().expect("it runs"));
    assert!(ports.contains(&cluster.node(name).mesh.port()), "{ports:?}");
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    nft("add table ip cut");
    nft("add chain ip cut out { type filter hook output priority 0; }");
    let drops = |here: &str, there: &str| {
        nft(&format!("add rule ip cut out udp {here} {{ {ports} }} udp {there} != {{ {ports} }} drop"));
    };
    if cut != Cut::Mute {
        drops("dport", "sport");
    }
    if cut != Cut::Deaf {
        drops("sport", "dport");
    }
}

fn heal() {
    nft("delete table ip cut");
}

/// A mesh of five in which every node has a connection to every other.
async fn linked_mesh() -> Cluster {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for name in ["a", "b", "c", "d"] {
        cluster.add(&NodeSpec::named(name)).await.unwrap();
    }
    cluster.converge().await.unwrap();
    let names: Vec<String> = cluster.names().map(str::to_owned).collect();
    for observer in &names {
        wait_for(&format!("{observer} has a link to everybody"), LIMIT, || async {
            let members: Vec<Member> =
                cluster.admin(observer, "/v1/members?detail=true").await.map_err(|e| e.to_string())?;
            let linked = |m: &&Member| m.detail.as_ref().is_some_and(|detail| detail.connection == "connected");
            match members.iter().filter(|m| !m.is_self).filter(linked).count() {
                4 => Ok(()),
                some => Err(format!("{some} of 4")),
            }
        })
        .await
        .unwrap();
    }
    cluster
}

/// How long `c` stays cut off, once it is dead for everybody.
enum Until {
    /// Longer than a node must be heard while it is thought dead to count as deaf, and than it takes it to give up others.
    Long,
    /// It says so.
    Says(&'static str),
}

/// Cuts `c` off in that way, and waits until it is back; its log.
async fn lose_and_regain(how: Cut, until: Until) -> String {
    let cluster = linked_mesh().await;
    let before = cluster.members("c").await.unwrap().into_iter().find(|m| m.is_self).unwrap().generation;
    cut(&cluster, "c", how);
    for observer in ["seed", "a", "b", "d"] {
        cluster.wait_status(observer, "c", MemberStatus::Down).await.unwrap();
    }
    match until {
        Until::Long => tokio::time::sleep(Duration::from_secs(20)).await,
        Until::Says(what) => wait_for(&format!("c says {what:?}"), LIMIT, || async {
            let log = cluster.node("c").process.log();
            log.contains(what).then_some(()).ok_or(log)
        })
        .await
        .unwrap(),
    }
    heal();
    for observer in ["seed", "a", "b", "d"] {
        wait_for(&format!("{observer} sees c in a new life"), LIMIT, || async {
            let members = cluster.members(observer).await.map_err(|e| e.to_string())?;
            let c = members.iter().find(|m| m.name == "c").ok_or("nothing")?;
            let fine = c.status == MemberStatus::Alive && c.generation > before;
            fine.then_some(()).ok_or_else(|| format!("{:?} in {}", c.status, c.generation))
        })
        .await
        .unwrap();
        for healthy in ["seed", "a", "b", "d"] {
            let members = cluster.members(observer).await.unwrap();
            let status = members.iter().find(|m| m.name == healthy).map(|m| m.status);
            assert_eq!(status, Some(MemberStatus::Alive), "{observer} sees {healthy}");
        }
    }
    cluster.node("c").process.log()
}

/// What a node says that has to wait because its link is bad.
const HELD: &str = "must be good for that long first";

#[test]
fn a_node_that_hears_nobody_is_told_so_and_has_to_wait() {
    if in_namespace("a_node_that_hears_nobody_is_told_so_and_has_to_wait", false) {
        let log = runtime().block_on(lose_and_regain(Cut::Deaf, Until::Long));
        assert!(log.contains("others heard it all the time") && log.contains(HELD), "{log}");
    }
}

#[test]
fn a_node_that_nobody_hears_notices_and_has_to_wait() {
    if in_namespace("a_node_that_nobody_hears_notices_and_has_to_wait", false) {
        let log = runtime().block_on(lose_and_regain(Cut::Mute, Until::Says(HELD)));
        assert!(log.contains("few of its pings are answered"), "{log}");
    }
}

#[test]
fn a_node_that_was_cut_off_is_back_at_once() {
    if in_namespace("a_node_that_was_cut_off_is_back_at_once", true) {
        // Until it has given up everybody else.
        let log = runtime().block_on(lose_and_regain(Cut::Off, Until::Long));
        assert!(log.contains("member Suspect -> Down"), "{log}");
        assert!(log.contains("back in the mesh") && !log.contains(HELD), "{log}");
    }
}
