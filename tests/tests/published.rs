//! A fleet of edges: routes, plans, versions and keys that are published once, and hold on all of them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, starling, wait_for};
use starling_protocol::admin::{Document, Key, Route};
use starling_tests::{Front, binary, is_known, sample};

const HOST: &str = "api.example.com";
const LIMIT: Duration = Duration::from_secs(60);
const EDGES: [&str; 2] = ["edge", "edge-2"];

struct Stage {
    cluster: Cluster,
    listen: Vec<SocketAddr>,
    cert: PathBuf,
    /// Of the admin key.
    keys: String,
    _service: Process,
}

impl Stage {
    async fn set() -> Self {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let (service, addr) = sample(cluster.dir(), "orders").await;
        cluster.add(&NodeSpec::named("a").serving(format!("orders={addr}"))).await.unwrap();
        let (mut listens, mut cert) = (Vec::new(), PathBuf::new());
        for name in EDGES {
            let front = Front::new(cluster.dir(), HOST, "config = \"mesh\"");
            cluster.add_edge(name, &front.sections).await.unwrap();
            is_known(&cluster, name, "orders", 1).await;
            listens.push(front.listen);
            cert = front.cert;
        }
        let keys = cluster.node("seed").state.to_string_lossy().into_owned();
        Self { cluster, listen: listens, cert, keys, _service: service }
    }

    async fn ask(&self, edge: usize, door: Door, path: &str, key: &str) -> Answer {
        let client = Client::trusting(&self.cert).unwrap();
        let request = Request::get(format!("https://{HOST}{path}")).header("x-api-key", key);
        client.send(door, self.listen[edge], request.body(Bytes::new()).unwrap()).await.unwrap()
    }

    /// A command beside the admin key; whether it worked, and what it said.
    async fn admin(&self, args: &[&str]) -> (bool, String, String) {
        let admin = format!("http://{}", self.cluster.node("seed").admin);
        let args = [args, &["--state", &self.keys, "--admin", &admin]].concat();
        let (status, out, err) = starling(self.cluster.binary(), &args).await.unwrap();
        (status.success(), out, err)
    }

    async fn publish(&self, text: &str) -> (bool, String, String) {
        let file = self.cluster.dir().join("to-publish.toml");
        std::fs::write(&file, text).unwrap();
        self.admin(&["edge", "publish", &file.to_string_lossy()]).await
    }

    /// What all edges answer over all protocols.
    async fn all_answer(&self, path: &str, key: &str, status: u16) {
        for (edge, name) in EDGES.iter().enumerate() {
            for door in Door::PUBLIC {
                let answer = self.ask(edge, door, path, key).await;
                assert_eq!(answer.status, status, "{name} {door:?} {path}: {answer:?}");
            }
        }
    }
}

const FIRST: &str = r#"
[node]
name = "only-here"
[[route]]
path = "/orders"
service = "orders"
auth = ["api-key"]
plan = "small"
[[plan]]
name = "small"
rate = "1000/s"
"#;

#[tokio::test]
async fn one_file_holds_on_all_edges_and_the_last_good_one_stays() {
    let mut stage = Stage::set().await;
    // Nothing is known yet, and that is not the caller's fault.
    stage.all_answer("/orders", "", 503).await;

    let (fine, out, err) = stage.publish(FIRST).await;
    assert!(fine && out.starts_with("edge version 1 "), "{out} {err}");
    assert!(err.contains("in force on 2 of 2 edges: edge, edge-2"), "{err}");
    stage.all_answer("/orders", "", 401).await;
    stage.all_answer("/other", "", 404).await;

    // A key for all of them, beside those of each.
    let (fine, key, err) = stage.admin(&["keys", "create", "--consumer", "acme"]).await;
    assert!(fine, "{err}");
    let key = key.trim();
    for edge in 0..EDGES.len() {
        wait_for("the key is there", LIMIT, || async {
            let answer = stage.ask(edge, Door::Http2, "/orders", key).await;
            (answer.status == 200).then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
    }
    stage.all_answer("/orders", key, 200).await;
    let admin = format!("http://{}", stage.cluster.node("edge").admin);
    let own = stage.cluster.run(&["keys", "create", "--consumer", "own", "--admin", &admin]).await.unwrap();
    assert_eq!(stage.ask(0, Door::Http1, "/orders", own.trim()).await.status, 200);
    assert_eq!(stage.ask(1, Door::Http1, "/orders", own.trim()).await.status, 401, "an edge's own holds there alone");
    let keys: Vec<Key> = stage.cluster.admin("edge", "/v1/keys").await.unwrap();
    let held: Vec<(&str, bool)> = keys.iter().map(|key| (key.consumer.as_str(), key.published)).collect();
    assert_eq!(held, [("own", false), ("acme", true)]);

    // What is wrong is said where, and reaches nobody.
    let (fine, _, err) = stage.publish(&FIRST.replace("plan = \"small\"", "plan = \"large\"")).await;
    assert!(!fine && err.contains("to-publish.toml:8: route[0].plan: there is no plan \"large\""), "{err}");
    // What this version cannot read is refused by the edges, which go on as before.
    let later = stage.cluster.dir().join("later.toml");
    std::fs::write(&later, "[[route]]\npath = \"/\"\nservice = \"orders\"\nauth = []\nof_later = 1\n").unwrap();
    let (fine, _, err) = stage.admin(&["documents", "publish", &later.to_string_lossy(), "--kind", "edge"]).await;
    assert!(fine, "{err}");
    wait_for("the edges refuse it", LIMIT, || async {
        let documents: Vec<Document> = stage.cluster.admin("seed", "/v1/documents").await.map_err(|e| e.to_string())?;
        let edge = documents.iter().find(|document| document.kind.as_str() == "edge").unwrap();
        let refusing = edge.nodes.iter().filter(|node| node.state.is_some_and(|state| state.to_string() == "refused"));
        (refusing.count() == 2).then_some(()).ok_or(format!("{documents:?}"))
    })
    .await
    .unwrap();
    stage.all_answer("/orders", key, 200).await;

    // Another one, and back, with one command.
    let second = "[[route]]\npath = \"/goods\"\nservice = \"orders\"\nauth = []\n";
    let (fine, _, err) = stage.publish(second).await;
    assert!(fine, "{err}");
    stage.all_answer("/goods", "", 200).await;
    stage.all_answer("/orders", key, 404).await;
    // It holds over a restart, without anybody to ask.
    stage.cluster.kill("edge-2").await.unwrap();
    stage.cluster.restart("edge-2").await.unwrap();
    is_known(&stage.cluster, "edge-2", "orders", 1).await;
    stage.all_answer("/goods", "", 200).await;
    let (fine, out, err) = stage.admin(&["edge", "rollback"]).await;
    assert!(fine && out.starts_with("edge version 4 ") && err.contains("publishing edition 1 again"), "{out} {err}");
    stage.all_answer("/orders", key, 200).await;
    stage.all_answer("/goods", "", 404).await;
    let routes: Vec<Route> = stage.cluster.admin("edge-2", "/v1/routes").await.unwrap();
    assert_eq!(routes.iter().map(|route| route.path.as_str()).collect::<Vec<_>>(), ["/orders"]);

    // Whoever loses a key loses it everywhere.
    let id = &key[3..15];
    let (fine, out, err) = stage.admin(&["keys", "revoke", id]).await;
    assert!(fine && out.contains(id), "{err}");
    for edge in 0..EDGES.len() {
        wait_for("the key is gone", LIMIT, || async {
            let answer = stage.ask(edge, Door::Http3, "/orders", key).await;
            (answer.status == 401).then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
    }
    let (fine, _, err) = stage.admin(&["keys", "revoke", "000000000000"]).await;
    assert!(!fine && err.contains("no key has the id"), "{err}");

    // Keys that were published from elsewhere are not replaced by what is here.
    std::fs::write(std::path::Path::new(&stage.keys).join("published-keys.hash"), "another").unwrap();
    let (fine, _, err) = stage.admin(&["keys", "create", "--consumer", "late"]).await;
    assert!(!fine && err.contains("were not published from here"), "{err}");
    // What is deleted is gone, also over a restart.
    let (fine, _, err) = stage.admin(&["documents", "delete", "--kind", "edge"]).await;
    assert!(fine, "{err}");
    for edge in 0..EDGES.len() {
        wait_for("nothing is published any more", LIMIT, || async {
            let answer = stage.ask(edge, Door::Http2, "/orders", "").await;
            (answer.status == 503).then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
    }
    stage.cluster.kill("edge-2").await.unwrap();
    stage.cluster.restart("edge-2").await.unwrap();
    stage.all_answer("/orders", "", 503).await;
}

/// An edge that goes by its own file has what is published as soon as its file says so, and an upgrade changes nothing.
#[tokio::test]
async fn an_edge_changes_to_what_is_published_without_a_pause() {
    let mut stage = Stage::set().await;
    let (fine, _, err) = stage.publish("[[route]]\npath = \"/goods\"\nservice = \"orders\"\nauth = []\n").await;
    assert!(fine, "{err}");
    let file = stage.cluster.dir().join("edge.toml");
    let with_mesh = std::fs::read_to_string(&file).unwrap();
    let own = with_mesh.replace("config = \"mesh\"\n", "");
    let own = format!("{own}[[route]]\npath = \"/own\"\nservice = \"orders\"\nauth = []\n");
    let becomes = async |stage: &Stage, text: &str, path: &str| {
        std::fs::write(&file, text).unwrap();
        wait_for("the edge goes by it", LIMIT, || async {
            let answer = stage.ask(0, Door::Http3, path, "").await;
            (answer.status == 200).then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
    };
    becomes(&stage, &own, "/own").await;
    assert_eq!(stage.ask(0, Door::Http1, "/goods", "").await.status, 404);
    becomes(&stage, &with_mesh, "/goods").await;
    assert_eq!(stage.ask(0, Door::Http1, "/own", "").await.status, 404);
    // A process that takes over has what the one before had.
    let mut old = stage.cluster.take_over("edge").await.unwrap();
    for _ in 0..20 {
        stage.all_answer("/goods", "", 200).await;
    }
    assert!(old.wait(LIMIT).await.unwrap().success());
}

/// What is published may need something that an edge's file does not have yet.
#[tokio::test]
async fn an_edition_that_was_refused_holds_when_the_edge_has_what_it_needs() {
    let stage = Stage::set().await;
    let goods = "[[route]]\npath = \"/goods\"\nservice = \"orders\"\nauth = []\n";
    let (fine, _, err) = stage.publish(goods).await;
    assert!(fine, "{err}");
    let shown =
        format!("{goods}[[route]]\npath = \"/partners\"\nservice = \"orders\"\nauth = [\"client-certificate\"]\n");
    let (fine, _, err) = stage.publish(&shown).await;
    assert!(!fine && err.contains("cannot read it"), "{err}");
    stage.all_answer("/goods", "", 200).await;
    stage.all_answer("/partners", "", 404).await;
    for name in EDGES {
        let file = stage.cluster.dir().join(format!("{name}.toml"));
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, format!("{text}[client_certificate]\nca = {:?}\n", stage.cert)).unwrap();
    }
    for edge in 0..EDGES.len() {
        wait_for("it holds", LIMIT, || async {
            let answer = stage.ask(edge, Door::Http3, "/partners", "").await;
            (answer.status == 403).then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
    }
    stage.all_answer("/goods", "", 200).await;
    let documents: Vec<Document> = stage.cluster.admin("edge", "/v1/documents").await.unwrap();
    let edge = documents.iter().find(|document| document.kind.as_str() == "edge").unwrap();
    assert_eq!(edge.state.to_string(), "active");
}
