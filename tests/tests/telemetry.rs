//! What a collector, a service and `/metrics` are told of calls.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request};
use serde_json::Value;
use starling_chaos::{Client, Cluster, Door, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_tests::{
    binary, client_script, listening, python,
    service::{self, Service, Speaks},
};
use tokio::io::AsyncWriteExt;

const LIMIT: Duration = Duration::from_secs(60);
const HOST: &str = "api.example.com";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const NOT_SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

/// A collector that is particular about what it gets.
struct Receiver {
    addr: SocketAddr,
    said: PathBuf,
    _process: Process,
}

impl Receiver {
    async fn start(dir: &Path, more: &[&str]) -> Option<Self> {
        let python = python()?;
        let (addr, said) = (free_port(), dir.join("otlp.jsonl"));
        let port = addr.port().to_string();
        let script = client_script("otlp_receiver.py");
        let out = said.to_string_lossy();
        let args = [&[script.as_str(), "--port", &port, "--out", &out], more].concat();
        let process = Process::start(&python, args, &dir.join("otlp.log")).expect("python starts");
        listening(addr).await;
        Some(Self { addr, said, _process: process })
    }

    /// All that it has got so far.
    fn got(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.said).unwrap_or_default();
        let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let problem = lines.iter().find(|line| !line["problem"].is_null());
        assert!(problem.is_none(), "{problem:?}");
        lines
    }

    /// Waits until what it has got is enough.
    async fn wait<T>(&self, what: &str, enough: impl Fn(&[Value]) -> Option<T>) -> T {
        let mut found = None;
        wait_for(what, LIMIT, || {
            let got = self.got();
            found = enough(&got);
            let done = found.is_some();
            async move { if done { Ok(()) } else { Err(format!("got {} things", got.len())) } }
        })
        .await
        .unwrap_or_else(|e| panic!("{e}\n{}", std::fs::read_to_string(&self.said).unwrap_or_default()));
        found.expect("it was found")
    }

    fn flags(&self, spec: NodeSpec) -> NodeSpec {
        spec.flag("--otlp").flag(format!("http://{}", self.addr)).flag("--sample").flag("1")
    }
}

/// A service that tells what trace it was told; `/fail` fails.
async fn traced_service() -> Service {
    Service::start(Speaks::Http1, |request, _| async move {
        let told = |name| request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or("-").to_string();
        match request.uri().path() {
            "/large" => service::text(200, vec![b'x'; 5000]),
            path => {
                let status = if path == "/fail" { 500 } else { 200 };
                service::text(status, format!("{} {}", told("traceparent"), told("tracestate")))
            }
        }
    })
    .await
}

async fn ask(client: &Client, door: Door, addr: SocketAddr, uri: &str, fields: &[(&str, &str)]) -> (u16, String) {
    let mut request = Request::builder().method(Method::GET).uri(uri);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    let answer = client.send(door, addr, request.body(Bytes::new()).unwrap()).await.unwrap();
    (answer.status, answer.text())
}

/// Through the outbound listener of a node, once the service is known there.
async fn call(cluster: &Cluster, from: &str, path: &str, fields: &[(&str, &str)]) -> (u16, String) {
    let (addr, uri) = (cluster.node(from).outbound, format!("http://web.mesh.internal{path}"));
    ask(&Client::plain(), Door::PlainHttp1, addr, &uri, fields).await
}

async fn known(cluster: &Cluster, from: &str) {
    wait_for("the service is known", LIMIT, || async {
        match call(cluster, from, "/", &[("traceparent", NOT_SAMPLED)]).await {
            (200, _) => Ok(()),
            (status, text) => Err(format!("{status} {text}")),
        }
    })
    .await
    .unwrap();
}

async fn metrics(cluster: &Cluster, node: &str) -> String {
    let admin = cluster.node(node).admin;
    Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text()
}

/// Waits until a line of `/metrics` that begins so has counted something.
/// Does something before each look.
async fn counted<F: Future<Output = ()>>(cluster: &Cluster, node: &str, line: &str, before: impl Fn() -> F) {
    wait_for(line, LIMIT, || async {
        before().await;
        let text = metrics(cluster, node).await;
        let found = text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse::<f64>().ok());
        if found > Some(0.0) { Ok(()) } else { Err(format!("{found:?}\n{text}")) }
    })
    .await
    .unwrap();
}

fn spans<'a>(got: &'a [Value], trace: &str) -> Vec<&'a Value> {
    got.iter().filter(|line| line["trace"] == trace).collect()
}

#[tokio::test]
async fn a_trace_leads_from_the_edge_to_the_service() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let Some(receiver) = Receiver::start(&dir, &[]).await else { return };
    let service = traced_service().await;
    let node = NodeSpec::named("web-1").serving(format!("web={}", service.addr));
    cluster.add(&receiver.flags(node)).await.unwrap();
    let (cert, key) = (dir.join("edge.pem"), dir.join("edge.key"));
    self_signed(&[HOST], &cert, &key).unwrap();
    let public = free_port();
    let sections = format!(
        "[telemetry]\notlp = \"http://{}\"\nsample = 1.0\n[edge]\nlisten = \"{public}\"\n[[certificate]]\nhosts = \
         [\"{HOST}\"]\ncert = {cert:?}\nkey = {key:?}\n[[route]]\npath = \"/\"\nservice = \"web\"\nauth = []\n",
        receiver.addr
    );
    cluster.add_edge("edge", &sections).await.unwrap();
    known(&cluster, "edge").await;
    let client = Client::trusting(&cert).unwrap();
    for door in Door::PUBLIC {
        let fields = [("traceparent", SAMPLED), ("tracestate", "evil=1")];
        let (status, told) = ask(&client, door, public, &format!("https://{HOST}/x"), &fields).await;
        assert_eq!(status, 200, "{door:?}");
        let (parent, state) = told.split_once(' ').unwrap();
        let [version, trace, last, flags] = parent.split('-').collect::<Vec<_>>()[..] else { panic!("{told}") };
        assert_eq!((version, flags, state), ("00", "03", "-"), "{door:?}");
        assert_ne!(trace, TRACE, "{door:?}: a stranger's trace is not followed");
        let all = receiver
            .wait("three spans", |got| {
                let spans: Vec<_> = spans(got, trace).into_iter().cloned().collect();
                (spans.len() == 3).then_some(spans)
            })
            .await;
        let of = |node: &str, kind: &str| {
            let is = |span: &&Value| span["resource"]["service.instance.id"] == node && span["kind"] == kind;
            all.iter().find(is).unwrap_or_else(|| panic!("{door:?}: no {kind} of {node} in {all:#?}"))
        };
        let (arrival, attempt, served) = (of("edge", "server"), of("edge", "client"), of("web-1", "server"));
        assert_eq!((&arrival["parent"], &arrival["links"]), (&"".into(), &serde_json::json!([TRACE])), "{door:?}");
        assert_eq!(attempt["parent"], arrival["span"], "{door:?}");
        assert_eq!(served["parent"], attempt["span"], "{door:?}");
        assert_eq!(served["span"], last, "{door:?}: the service continues where the node is");
        assert_eq!(arrival["attributes"]["http.route"], "/");
        assert_eq!(attempt["attributes"]["starling.instance"], "web-1");
        assert_eq!(attempt["attributes"]["starling.attempt"], 1);
        assert_eq!(served["attributes"]["starling.caller"], "edge");
        for span in &all {
            assert_eq!(span["attributes"]["http.response.status_code"], 200, "{span}");
            assert!(span["attributes"]["starling.head_us"].is_u64(), "{span}");
            assert_eq!(span["error"], Value::Null, "{span}");
        }
    }
}

#[tokio::test]
async fn the_applications_own_trace_goes_on() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some(receiver) = Receiver::start(cluster.dir(), &[]).await else { return };
    let service = traced_service().await;
    let node = NodeSpec::named("web-1").serving(format!("web={}", service.addr));
    cluster.add(&receiver.flags(node)).await.unwrap();
    cluster.add(&receiver.flags(NodeSpec::named("app-1"))).await.unwrap();
    known(&cluster, "app-1").await;
    let (_, told) = call(&cluster, "app-1", "/", &[("traceparent", NOT_SAMPLED), ("tracestate", "a=1")]).await;
    assert_eq!(told, format!("{NOT_SAMPLED} a=1"), "what is not recorded passes as it came");
    assert!(spans(&receiver.got(), TRACE).is_empty());
    let (_, told) = call(&cluster, "app-1", "/fail", &[("traceparent", SAMPLED), ("tracestate", "a=1")]).await;
    assert!(told.starts_with(&format!("00-{TRACE}-")) && told.ends_with("-01 a=1"), "{told}");
    let all = receiver
        .wait("its spans", |got| {
            let spans: Vec<_> = spans(got, TRACE).into_iter().cloned().collect();
            (spans.len() == 3).then_some(spans)
        })
        .await;
    assert!(all.iter().any(|span| span["parent"] == "00f067aa0ba902b7"), "{all:#?}");
    assert!(all.iter().all(|span| span["error"] == "500"), "{all:#?}");
    for bad in ["00-nonsense", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "ff-1-2-3"] {
        let (_, told) = call(&cluster, "app-1", "/", &[("traceparent", bad), ("tracestate", "a=1")]).await;
        let (parent, state) = told.split_once(' ').unwrap();
        assert!(parent.len() == 55 && !parent.contains(TRACE), "{bad}: a new one begins: {told}");
        assert_eq!(state, "-", "{bad}");
    }
}

#[tokio::test]
async fn without_a_collector_traces_pass() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let service = traced_service().await;
    cluster.add(&NodeSpec::named("web-1").serving(format!("web={}", service.addr))).await.unwrap();
    known(&cluster, "seed").await;
    let (_, told) = call(&cluster, "seed", "/", &[("traceparent", SAMPLED), ("tracestate", "a=1")]).await;
    assert_eq!(told, format!("{SAMPLED} a=1"));
    let (_, told) = call(&cluster, "seed", "/", &[]).await;
    assert_eq!(told, "- -", "whoever records nothing decides for nobody");
}

/// Two that counted under one name would be one counter that jumps to and fro.
#[tokio::test]
async fn after_an_upgrade_only_the_new_process_tells_figures() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let Some(receiver) = Receiver::start(&dir, &[]).await else { return };
    let service = Service::start(Speaks::Http1, |request, open| async move {
        match request.uri().path() {
            "/never" => service::watch(open),
            _ => service::text(200, ""),
        }
    })
    .await;
    cluster.add(&NodeSpec::named("web-1").serving(format!("web={}", service.addr))).await.unwrap();
    let (cert, key) = (dir.join("edge.pem"), dir.join("edge.key"));
    self_signed(&[HOST], &cert, &key).unwrap();
    let public = free_port();
    let sections = format!(
        "[telemetry]\notlp = \"http://{}\"\nmetrics_interval = \"1s\"\n[edge]\nlisten = \"{public}\"\n[[certificate]]\n\
         hosts = [\"{HOST}\"]\ncert = {cert:?}\nkey = {key:?}\n[[route]]\npath = \"/\"\nservice = \"web\"\nauth = []\n",
        receiver.addr
    );
    cluster.add_edge("edge", &sections).await.unwrap();
    known(&cluster, "edge").await;
    let client = Client::trusting(&cert).unwrap();
    let mut waiting = client.connect_tls(public, HOST, b"http/1.1").await.unwrap();
    waiting.write_all(format!("GET /never HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
    wait_for("the call is under way", LIMIT, || async {
        if service.open() > 0 { Ok(()) } else { Err("it is not".into()) }
    })
    .await
    .unwrap();
    let since = |got: &[Value]| -> Vec<u64> {
        let told = got.iter().filter(|line| line["kind"] == "sum" && line["metric"] == "starling.gossip_exchanges");
        told.map(|line| line["since"].as_u64().unwrap()).collect()
    };
    let first = receiver.wait("figures of the first", |got| since(got).first().copied()).await;
    let mut before = cluster.take_over("edge").await.unwrap();
    let all = receiver
        .wait("figures of the second", |got| {
            let all = since(got);
            (all.iter().filter(|at| **at != first).count() >= 4).then_some(all)
        })
        .await;
    assert!(before.is_running(), "the first has finished too early for this test: {}", before.log());
    let turn = all.iter().position(|at| *at != first).unwrap();
    assert!(all[turn..].iter().all(|at| *at == all[turn]), "{all:?}");
}

/// A call that took several attempts shows each.
#[tokio::test]
async fn attempts_are_told_apart() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some(receiver) = Receiver::start(cluster.dir(), &[]).await else { return };
    let service = traced_service().await;
    let nobody = free_port();
    cluster.add(&NodeSpec::named("web-1").serving(format!("web={nobody}"))).await.unwrap();
    cluster.add(&NodeSpec::named("web-2").serving(format!("web={}", service.addr))).await.unwrap();
    cluster.add(&receiver.flags(NodeSpec::named("app-1"))).await.unwrap();
    known(&cluster, "app-1").await;
    let (of_first, of_second) = two_attempts(&cluster, &receiver).await;
    assert_eq!(of_first["attributes"]["starling.instance"], "web-1");
    assert_eq!(of_second["attributes"]["starling.instance"], "web-2");
    assert_eq!(of_first["error"], "502", "{of_first}");
    assert_eq!(of_second["error"], Value::Null, "{of_second}");
    let text = metrics(&cluster, "app-1").await;
    let number = |line: &str| text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse::<f64>().ok());
    let attempts = number("starling_attempts_total{service=\"web\"}").expect("they are counted");
    let calls: f64 = text
        .lines()
        .filter_map(|l| l.strip_prefix("http_client_request_duration_seconds_count{")?.rsplit_once(' '))
        .filter(|(labels, _)| labels.contains("service=\"web\""))
        .filter_map(|(_, count)| count.parse::<f64>().ok())
        .sum();
    assert!(attempts > calls, "{attempts} attempts at {calls} calls\n{text}");
}

/// The spans of the first and the second attempt of some call that took two.
async fn two_attempts(cluster: &Cluster, receiver: &Receiver) -> (Value, Value) {
    let mut found = None;
    wait_for("a call that took two attempts", LIMIT, || {
        let got = receiver.got();
        let of = |number: u32, parent: Option<&Value>| {
            let is = |span: &&Value| span["attributes"]["starling.attempt"] == number;
            got.iter().filter(is).find(|span| parent.is_none_or(|parent| span["parent"] == *parent)).cloned()
        };
        found = of(2, None).and_then(|second| Some((of(1, Some(&second["parent"]))?, second)));
        let done = found.is_some();
        async move {
            // One that fails is asked again only now and then.
            let (status, text) = call(cluster, "app-1", "/", &[("traceparent", SAMPLED)]).await;
            assert_eq!(status, 200, "{text}");
            if done { Ok(()) } else { Err("none yet".into()) }
        }
    })
    .await
    .unwrap();
    found.expect("it was found")
}

#[tokio::test]
async fn metrics_say_the_same_to_everybody() {
    const CALLS: u64 = 20;
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let (cert, key) = (dir.join("otlp.pem"), dir.join("otlp.key"));
    self_signed(&["localhost"], &cert, &key).unwrap();
    let (cert_arg, key_arg) = (cert.to_string_lossy(), key.to_string_lossy());
    let Some(receiver) = Receiver::start(&dir, &["--cert", &cert_arg, "--key", &key_arg]).await else { return };
    let service = traced_service().await;
    let file = dir.join("extra.toml");
    let port = receiver.addr.port();
    std::fs::write(
        &file,
        format!(
            "[telemetry]\notlp = \"https://localhost:{port}\"\nca = {cert:?}\nmetrics_interval = \"1s\"\nsample = \
             0.0\nheaders = {{ authorization = \"Bearer secret\" }}\n"
        ),
    )
    .unwrap();
    let node = NodeSpec::named("web-1").serving(format!("web={}", service.addr));
    cluster.add(&node.flag("--config").flag(file.to_string_lossy()).flag("--workers").flag("2")).await.unwrap();
    cluster.add(&NodeSpec::named("app-1").serving(format!("app={}", free_port()))).await.unwrap();
    known(&cluster, "app-1").await;
    for path in ["/", "/fail"] {
        for _ in 0..CALLS {
            call(&cluster, "app-1", path, &[]).await;
        }
    }
    for _ in 0..CALLS {
        assert_eq!(call(&cluster, "app-1", "/large", &[]).await.0, 200);
    }
    let whole = metrics(&cluster, "app-1").await;
    let of_client = "{caller=\"app\",service=\"web\",side=\"client\"";
    assert!(whole.contains(&format!("starling_calls_broken_total{of_client},why=\"cut\"}} 0")), "{whole}");
    let labels = |more: &str| format!("{{caller=\"app\",service=\"web\",http_request_method=\"GET\",{more}}}");
    // Not one attempt more: what the service answers is nobody's to repeat but a GET that failed.
    let failed = labels("http_response_status_code=\"500\"");
    let text = metrics(&cluster, "web-1").await;
    let count = text
        .lines()
        .find_map(|l| l.strip_prefix(&format!("http_server_request_duration_seconds_count{failed}")))
        .unwrap_or_else(|| panic!("no count of failures in\n{text}"))
        .trim()
        .parse::<u64>()
        .unwrap();
    assert!(count >= CALLS, "{count}");
    receiver
        .wait("the same in the collector's hands", |got| {
            got.iter().rev().find(|line| {
                line["metric"] == "http.server.request.duration"
                    && line["points"].as_array().is_some_and(|points| {
                        points.iter().any(|point| {
                            point["count"] == count
                                && point["attributes"]["http.response.status_code"] == "500"
                                && point["attributes"]["caller"] == "app"
                                && point["sum"].as_f64().is_some_and(|sum| sum > 0.0)
                        })
                    })
            })?;
            let bytes = got.iter().rev().find(|line| line["metric"] == "starling.call.size")?;
            assert_eq!(bytes["unit"], "By");
            got.iter().find(|line| line["authorization"] == "Bearer secret").map(|_| ())
        })
        .await;
    // Last words at the end of a node.
    let before = receiver.got().iter().filter(|line| line["metric"] == "starling.members").count();
    assert!(cluster.terminate("web-1").await.unwrap().success());
    assert!(receiver.got().iter().filter(|line| line["metric"] == "starling.members").count() > before);
}

#[tokio::test]
async fn a_collector_that_fails_costs_nobody_a_call() {
    for (mode, outcome) in [("busy", "exported"), ("refuse", "failed"), ("hang", "dropped"), ("partial", "failed")] {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let Some(receiver) = Receiver::start(cluster.dir(), &["--mode", mode]).await else { return };
        let service = traced_service().await;
        cluster.add(&NodeSpec::named("web-1").serving(format!("web={}", service.addr))).await.unwrap();
        cluster.add(&receiver.flags(NodeSpec::named("app-1"))).await.unwrap();
        known(&cluster, "app-1").await;
        let outcome = format!("starling_spans_total{{outcome=\"{outcome}\"}} ");
        wait_for(mode, LIMIT, || async {
            for _ in 0..200 {
                let (status, text) = call(&cluster, "app-1", "/", &[]).await;
                assert_eq!(status, 200, "{mode}: {text}");
            }
            let text = metrics(&cluster, "app-1").await;
            let count = text.lines().find_map(|line| line.strip_prefix(&outcome)?.parse::<u64>().ok());
            if count > Some(0) { Ok(()) } else { Err(text) }
        })
        .await
        .unwrap();
        let log = std::fs::read_to_string(cluster.dir().join("app-1.log")).unwrap();
        let said = log.matches("does not take telemetry").count();
        // One that hangs is waited for before anything is said of it.
        let may = if mode == "partial" { 0..=0 } else { usize::from(mode != "hang")..=2 };
        assert!(may.contains(&said), "{mode}: said {said} times\n{log}");
        // Neither does it hold up the end.
        let begun = std::time::Instant::now();
        assert!(cluster.terminate("app-1").await.unwrap().success(), "{mode}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{mode}");
    }
}

/// A caller that goes before there is an answer, and an answer that breaks off.
#[tokio::test]
async fn calls_without_a_whole_answer_are_counted() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some((_broken, cut)) = starling_tests::broken_server(cluster.dir(), "cut").await else { return };
    let silent = Service::start(Speaks::Http1, |_, open| async move {
        let _open = open;
        std::future::pending::<()>().await;
        service::text(200, "never")
    })
    .await;
    let node = NodeSpec::named("web-1").serving(format!("web={cut}")).serving(format!("silent={}", silent.addr));
    cluster.add(&node).await.unwrap();
    let outbound = cluster.node("seed").outbound;
    let broken = |side: &str, service: &str, why: &str| {
        format!("starling_calls_broken_total{{caller=\"seed\",service=\"{service}\",side=\"{side}\",why=\"{why}\"}} ")
    };
    for (node, side) in [("seed", "client"), ("web-1", "server")] {
        counted(&cluster, node, &broken(side, "web", "cut"), || async {
            let request = Request::get("http://web.mesh.internal/").body(Bytes::new()).unwrap();
            let _ = Client::plain().send(Door::PlainHttp1, outbound, request).await;
        })
        .await;
    }
    let uri = "http://silent.mesh.internal/";
    let request = Request::get(uri).body(Bytes::new()).unwrap();
    let client = Client::plain();
    let call = client.send(Door::PlainHttp1, outbound, request);
    let begun = silent.begun.clone();
    tokio::select! {
        answer = call => panic!("{answer:?}"),
        seen = wait_for("the service has it", LIMIT, || async {
            if begun.load(std::sync::atomic::Ordering::Relaxed) > 0 { Ok(()) } else { Err("not yet".into()) }
        }) => seen.unwrap(),
    }
    for (node, side) in [("seed", "client"), ("web-1", "server")] {
        counted(&cluster, node, &broken(side, "silent", "abandoned"), || async {}).await;
    }
}
