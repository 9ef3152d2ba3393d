//! Takeovers of an edge: a client of each protocol that keeps its connection, and clients of other makes.

use std::path::Path;

use bytes::Bytes;
use http::Request;
use starling_chaos::{Client, Cluster, Door, NodeSpec, free_port, self_signed};
use starling_tests::{binary, program, sample};

use super::LIMIT;

const HOST: &str = "api.example.com";

/// What h2load says that it has done for some seconds: requests that succeeded, and those that did not.
async fn h2load(h2load: &Path, seconds: u32, url: String, http1: bool) -> (usize, usize) {
    let mut command = tokio::process::Command::new(h2load);
    command.args(["-t1", "-c8", "-m4", &format!("-D{seconds}")]).kill_on_drop(true);
    if http1 {
        command.arg("--h1");
    }
    let output = tokio::time::timeout(LIMIT, command.arg(url).output()).await.expect("it ends").unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = said.lines().find(|line| line.starts_with("requests:")).unwrap_or_else(|| panic!("{said}"));
    let count = |what| {
        let part = line.split(", ").find(|part| part.ends_with(what)).unwrap();
        part.split_whitespace().find_map(|word| word.parse::<usize>().ok()).unwrap()
    };
    (count("succeeded"), count("failed") + count("errored") + count("timeout"))
}

#[tokio::test]
async fn clients_of_every_protocol_notice_nothing() {
    let Some(program) = program("h2load") else { return };
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (_service, addr) = sample(cluster.dir(), "orders").await;
    cluster.add(&NodeSpec::named("orders-1").serving(format!("orders={addr}"))).await.unwrap();
    let (cert, key, addr) = (cluster.dir().join("edge.pem"), cluster.dir().join("edge.key"), free_port());
    self_signed(&[HOST, "localhost"], &cert, &key).unwrap();
    let sections = format!(
        "[edge]\nlisten = \"{addr}\"\n\n[[certificate]]\nhosts = [\"{HOST}\", \"localhost\"]\ncert = {cert:?}\nkey = \
         {key:?}\n\n[[route]]\npath = \"/\"\nservice = \"orders\"\nauth = []\n"
    );
    cluster.add_edge("edge", &sections).await.unwrap();
    starling_tests::is_known(&cluster, "edge", "orders", 1).await;
    let kept = [true, false].map(|http1| {
        let (program, url) = (program.clone(), format!("https://localhost:{}/kept-{http1}", addr.port()));
        tokio::spawn(async move { h2load(&program, 8, url, http1).await })
    });
    // New connections, all the time.
    let client = Client::trusting(&cert).unwrap();
    let new = Door::PUBLIC.map(|door| {
        let client = client.clone();
        tokio::spawn(async move {
            let begun = std::time::Instant::now();
            let mut calls = 0;
            while begun.elapsed().as_secs() < 8 {
                let request = Request::get(format!("https://{HOST}/")).body(Bytes::new()).unwrap();
                let answer = client.send(door, addr, request).await.unwrap_or_else(|e| panic!("{door:?}: {e:#}"));
                assert_eq!(answer.status, 200, "{door:?}: {}", answer.text());
                calls += 1;
            }
            calls
        })
    });
    for _ in 0..3 {
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        let mut old = cluster.take_over("edge").await.unwrap();
        assert!(old.wait(LIMIT).await.unwrap().success(), "{}", old.log());
    }
    for load in new {
        assert!(load.await.unwrap() > 10);
    }
    let [http1, http2] = kept;
    let (good, bad) = http1.await.unwrap();
    assert!(good > 100 && bad == 0, "{good} succeeded, {bad} did not");
    // Told that its connection takes no more, h2load gives up what it has not sent, and opens no other one. All that it did send was
    // answered.
    let (good, given_up) = http2.await.unwrap();
    let log = cluster.node("edge").process.output();
    let sent: Vec<_> = log.lines().filter(|line| line.contains("kept-false")).collect();
    let bad: Vec<_> = sent.iter().filter(|line| !line.contains("\"status\":200") || line.contains("\"cut\"")).collect();
    assert!(good > 100 && bad.is_empty() && sent.len() == good, "{good}, {given_up}, {}: {bad:#?}", sent.len());
}
