//! Versions that announce themselves: a node says which version of an API it serves, and for how long, and all edges follow.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, wait_for};
use starling_protocol::admin::{Explanation, Route, Service};
use starling_tests::{Front, binary, sample};

const HOST: &str = "api.example.com";
const LIMIT: Duration = Duration::from_secs(60);
const EDGES: [&str; 2] = ["edge", "edge-2"];

struct Stage {
    cluster: Cluster,
    listen: Vec<SocketAddr>,
    cert: PathBuf,
    services: Vec<Process>,
}

impl Stage {
    async fn set() -> Self {
        let cluster = Cluster::start(binary()).await.unwrap();
        let mut stage = Self { cluster, listen: Vec::new(), cert: PathBuf::new(), services: Vec::new() };
        stage.serve("a", "v1,deprecated=2026-01-01,sunset=2026-02-01").await;
        stage.serve("b", "v2,deprecated=2026-03-01,sunset=2099-01-01,link=https://example.com/news").await;
        stage.serve("c", "v3").await;
        for name in EDGES {
            let front = Front::new(stage.cluster.dir(), HOST, "");
            let rules = r#"
[[route]]
path = "/orders"
service = "orders"
auth = []
[[version]]
route = "/orders"
from = ["path", "header:x-api-version"]
weights = { v3 = 1, v4 = 1 }
sticky = true
versions = "mesh"
"#;
            stage.cluster.add_edge(name, &(front.sections + rules)).await.unwrap();
            stage.listen.push(front.listen);
            stage.cert = front.cert;
        }
        for name in EDGES {
            wait_for("the edge knows all versions", LIMIT, || async {
                let services: Vec<Service> =
                    stage.cluster.admin(name, "/v1/services").await.map_err(|e| e.to_string())?;
                let versions: Vec<&str> = services.iter().map(|service| service.version.as_str()).collect();
                (versions == ["v1", "v2", "v3"]).then_some(()).ok_or(format!("{versions:?}"))
            })
            .await
            .unwrap();
        }
        stage
    }

    /// A node with that version, whose service says its name.
    async fn serve(&mut self, name: &str, version: &str) {
        let (service, addr) = sample(self.cluster.dir(), &format!("orders-of-{name}")).await;
        self.services.push(service);
        let spec = NodeSpec::named(name).serving(format!("orders={addr},version={version}"));
        self.cluster.add(&spec).await.unwrap();
    }

    async fn ask(&self, edge: usize, door: Door, path: &str, version: Option<&str>) -> Answer {
        let client = Client::trusting(&self.cert).unwrap();
        let mut request = Request::get(format!("https://{HOST}{path}"));
        if let Some(version) = version {
            request = request.header("x-api-version", version);
        }
        client.send(door, self.listen[edge], request.body(Bytes::new()).unwrap()).await.unwrap()
    }
}

#[tokio::test]
async fn a_new_version_is_on_all_edges_when_a_node_serves_it() {
    let mut stage = Stage::set().await;
    for edge in 0..EDGES.len() {
        for door in Door::PUBLIC {
            // By path and by field, and the instances of that version alone.
            for (path, version, node) in
                [("/v3/orders/1", None, "c"), ("/orders/1", Some("v3"), "c"), ("/orders/v2/1", None, "b")]
            {
                let answer = stage.ask(edge, door, path, version).await;
                assert_eq!(answer.status, 200, "{door:?} {path}: {answer:?}");
                assert!(answer.text().contains(&format!("orders-of-{node}")), "{door:?} {path}: {answer:?}");
            }
            let old = stage.ask(edge, door, "/v2/orders/1", None).await;
            assert_eq!((old.status, old.header("deprecation")), (200, "@1772323200"), "{old:?}");
            assert_eq!(old.header("sunset"), "Thu, 01 Jan 2099 00:00:00 GMT");
            assert_eq!(old.header("link"), "<https://example.com/news>; rel=\"deprecation\"");
            let gone = stage.ask(edge, door, "/v1/orders/1", None).await;
            assert_eq!((gone.status, gone.header("content-type")), (410, "application/problem+json"), "{gone:?}");
            let unknown = stage.ask(edge, door, "/v4/orders/1", None).await;
            assert_eq!(unknown.status, 404);
            assert!(unknown.text().contains("known versions: v1, v2, v3"), "{unknown:?}");
            // Of the weights those count that somebody serves.
            assert!(stage.ask(edge, door, "/orders/1", None).await.text().contains("orders-of-c"));
        }
    }
    // One comes, and all edges have it, without a word to them.
    stage.serve("d", "v4").await;
    for edge in 0..EDGES.len() {
        wait_for("the new version is there", LIMIT, || async {
            let answer = stage.ask(edge, Door::Http2, "/v4/orders/1", None).await;
            let is_there = answer.status == 200 && answer.text().contains("orders-of-d");
            is_there.then_some(()).ok_or(format!("{answer:?}"))
        })
        .await
        .unwrap();
    }
    // Whoever names none stays with one of two.
    let first = stage.ask(0, Door::Http1, "/orders/1", None).await.text();
    for door in Door::PUBLIC.into_iter().cycle().take(9) {
        assert_eq!(stage.ask(1, door, "/orders/1", None).await.text(), first);
    }
    let routes: Vec<Route> = stage.cluster.admin("edge", "/v1/routes").await.unwrap();
    assert_eq!(routes[0].versions, ["v1", "v2", "v3", "v4"]);
    let services: Vec<Service> = stage.cluster.admin("c", "/v1/services").await.unwrap();
    let told = |name: &str| services.iter().find(|s| s.version == name).unwrap();
    assert_eq!(told("v2").sunset.as_deref(), Some("2099-01-01T00:00:00Z"));
    assert_eq!((told("v2").link.as_deref(), &told("v4").deprecated), (Some("https://example.com/news"), &None));
    let admin = format!("http://{}", stage.cluster.node("edge").admin);
    let table = stage.cluster.run(&["services", "--admin", &admin]).await.unwrap();
    assert!(table.contains("deprecated 2026-03-01, gone 2099-01-01"), "{table}");
    let url = format!("https://{HOST}/orders/1");
    let told = stage.cluster.run(&["edge", "explain", "GET", &url, "-o", "json", "--admin", &admin]).await.unwrap();
    let told: Explanation = serde_json::from_str(&told).unwrap();
    assert_eq!(told.version_by.as_deref(), Some("weight: v3 1, v4 1"));

    // A node that leaves takes its version with it.
    stage.cluster.terminate("d").await.unwrap();
    wait_for("the version is gone with its last node", LIMIT, || async {
        let answer = stage.ask(0, Door::Http3, "/v4/orders/1", None).await;
        (answer.status == 404).then_some(()).ok_or(format!("{answer:?}"))
    })
    .await
    .unwrap();
}
