//! `starling demo --check`: uses the mesh as its users would, breaks it, and says how it went.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Method, Request};
use sha2::{Digest, Sha256};
use starling_chaos::{Answer, Client, Door, Load, wait_for};
use starling_protocol::admin::MemberStatus;

use super::{Demo, HOST};
use crate::Failure;

const BIG_BYTES: usize = 64 << 20;

/// Prints `ok` or `FAIL` a line.
struct Story {
    failures: usize,
}

impl Story {
    async fn tell(&mut self, what: &str, step: impl Future<Output = Result<String>>) {
        match step.await {
            Ok(detail) if detail.is_empty() => println!("ok    {what}"),
            Ok(detail) => println!("ok    {what}: {detail}"),
            Err(error) => {
                self.failures += 1;
                println!("FAIL  {what}: {error:#}");
            }
        }
    }
}

pub(super) async fn run(mut demo: Demo) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut story = Story { failures: 0 };
    story.tell("every node sees the same members", same_view(&demo)).await;
    story.tell("a call over the outbound listener, HTTP/1.1", outbound(&demo, Door::PlainHttp1)).await;
    story.tell("the same over HTTP/2 without TLS", outbound(&demo, Door::PlainHttp2)).await;
    story.tell("an unknown service is a clear 404", unknown(&demo)).await;
    let client = match Client::trusting(&demo.certificate) {
        Ok(client) => client,
        Err(error) => return Err(Failure::failed(format!("{error:#}"))),
    };
    for door in Door::PUBLIC {
        let name = match door {
            Door::Http2 => "HTTP/2",
            Door::Http3 => "HTTP/3",
            _ => "HTTP/1.1",
        };
        story
            .tell(
                &format!("edge, {name}: refused without a key, answered with one, v2 by path and by header"),
                public(&demo, &client, door),
            )
            .await;
        story.tell(&format!("edge, {name}: 64 MiB up, digest compared"), upload(&demo, &client, door)).await;
        story.tell(&format!("edge, {name}: 64 MiB down, digest compared"), download(&demo, &client, door)).await;
    }
    story.tell("edge: a public route is limited to its plan, whatever the protocol", limited(&demo, &client)).await;
    story.tell("SIGKILL of a node under load loses no idempotent call", killed(&mut demo)).await;
    story.tell("the dead node is known to be down", down(&demo)).await;
    story.tell("it comes back with a higher generation", restarted(&mut demo)).await;
    story.tell("a node that is told to stop leaves without a failed call", left(&mut demo)).await;
    println!("\n{} in {:.1} s", if story.failures == 0 { "all ok" } else { "failed" }, begun.elapsed().as_secs_f32());
    if story.failures == 0 { Ok(()) } else { Err(Failure { message: String::new(), code: 1 }) }
}

async fn same_view(demo: &Demo) -> Result<String> {
    let mut views = Vec::new();
    for name in demo.cluster.names() {
        let mut view: Vec<(String, u64)> =
            demo.cluster.members(name).await?.into_iter().map(|m| (m.name, m.generation)).collect();
        view.sort();
        views.push(view);
    }
    ensure!(views.windows(2).all(|pair| pair[0] == pair[1]), "{views:?}");
    Ok(format!("{} members", views.first().map_or(0, Vec::len)))
}

async fn outbound(demo: &Demo, door: Door) -> Result<String> {
    let addr = demo.cluster.node("seed").outbound;
    let request = Request::get("http://orders.mesh.internal/").body(Bytes::new())?;
    let answer = Client::plain().send(door, addr, request).await?;
    ensure!(answer.status == 200 && answer.text().starts_with("hello from orders-"), "{answer:?}");
    Ok(answer.text().trim().to_string())
}

async fn unknown(demo: &Demo) -> Result<String> {
    let answer = Client::plain().get(demo.cluster.node("seed").outbound, "nothing.mesh.internal", "/").await?;
    ensure!(answer.status == 404, "{answer:?}");
    ensure!(answer.header("proxy-status").contains("destination_not_found"), "{answer:?}");
    Ok(answer.header("proxy-status").to_string())
}

async fn send(
    demo: &Demo,
    client: &Client,
    door: Door,
    request: http::request::Builder,
    body: Bytes,
) -> Result<Answer> {
    client.send(door, demo.edge, request.body(body)?).await
}

fn to(demo: &Demo, path: &str) -> http::request::Builder {
    Request::builder().uri(format!("https://{HOST}:{}{path}", demo.edge.port()))
}

async fn public(demo: &Demo, client: &Client, door: Door) -> Result<String> {
    let none = Bytes::new;
    let refused = send(demo, client, door, to(demo, "/orders"), none()).await?;
    ensure!(refused.status == 401, "without a key: {refused:?}");
    ensure!(refused.header("content-type") == "application/problem+json", "{refused:?}");
    let keyed = |path: &str| to(demo, path).header("x-api-key", &demo.key);
    let v1 = send(demo, client, door, keyed("/orders"), none()).await?;
    ensure!(v1.status == 200 && !v1.header("ratelimit").is_empty(), "with a key: {v1:?}");
    let newest = demo.orders.last().map(|n| format!("hello from {n}\n")).unwrap_or_default();
    ensure!(v1.text() != newest, "v1 was answered by a v2 instance: {v1:?}");
    ensure!(v1.header("deprecation").starts_with('@') && !v1.header("sunset").is_empty(), "v1 is deprecated: {v1:?}");
    ensure!(v1.header("ratelimit-policy").contains("\"default-day\";q=1000000"), "a day's quota: {v1:?}");
    for request in [keyed("/v2/orders"), keyed("/orders").header("x-api-version", "v2")] {
        let v2 = send(demo, client, door, request, none()).await?;
        ensure!(v2.status == 200 && v2.text() == newest, "v2: {v2:?}");
        ensure!(v2.header("deprecation").is_empty(), "v2 is not deprecated: {v2:?}");
    }
    Ok(String::new())
}

fn digest_of_zeroes() -> String {
    hex(&Sha256::digest(vec![0; BIG_BYTES]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

async fn upload(demo: &Demo, client: &Client, door: Door) -> Result<String> {
    let begun = Instant::now();
    let request = to(demo, "/orders/up").method(Method::POST).header("x-api-key", &demo.key);
    let answer = send(demo, client, door, request, Bytes::from(vec![0; BIG_BYTES])).await?;
    ensure!(answer.status == 200 && answer.text() == digest_of_zeroes(), "{} {}", answer.status, answer.text());
    Ok(rate(begun))
}

async fn download(demo: &Demo, client: &Client, door: Door) -> Result<String> {
    let begun = Instant::now();
    let request = to(demo, &format!("/orders/bytes/{BIG_BYTES}")).header("x-api-key", &demo.key);
    let answer = send(demo, client, door, request, Bytes::new()).await?;
    ensure!(answer.status == 200 && answer.body.len() == BIG_BYTES, "{} {} bytes", answer.status, answer.body.len());
    ensure!(hex(&Sha256::digest(&answer.body)) == digest_of_zeroes(), "the digest differs");
    Ok(rate(begun))
}

fn rate(begun: Instant) -> String {
    format!("{:.0} MiB/s", 64.0 / begun.elapsed().as_secs_f64())
}

async fn limited(demo: &Demo, client: &Client) -> Result<String> {
    let mut statuses = Vec::new();
    for n in 0..9 {
        let answer = send(demo, client, Door::PUBLIC[n % 3], to(demo, "/users"), Bytes::new()).await?;
        if answer.status == 429 {
            ensure!(!answer.header("retry-after").is_empty(), "no Retry-After: {answer:?}");
        }
        statuses.push(answer.status);
    }
    ensure!(statuses[0] == 200 && statuses.contains(&429), "{statuses:?}");
    Ok(format!("{statuses:?}"))
}

async fn killed(demo: &mut Demo) -> Result<String> {
    let victim = demo.orders[0].clone();
    let load = Load::start(demo.cluster.node("seed").outbound, "orders", 500);
    enough(&load, 500).await?;
    demo.cluster.kill(&victim).await?;
    enough(&load, load.good() + 1500).await?;
    let tally = load.stop().await;
    ensure!(tally.failed.is_empty(), "{} failed, first: {:?}", tally.failed.len(), tally.failed.first());
    Ok(format!("{} calls, 0 failed, slowest {} ms", tally.good, tally.slowest.as_millis()))
}

async fn enough(load: &Load, calls: usize) -> Result<()> {
    wait_for("calls are answered", Duration::from_secs(30), || async {
        if load.good() >= calls { Ok(()) } else { Err(format!("{} of {calls}", load.good())) }
    })
    .await
}

async fn down(demo: &Demo) -> Result<String> {
    let begun = Instant::now();
    for observer in demo.cluster.names().filter(|n| *n != demo.orders[0]) {
        demo.cluster.wait_status(observer, &demo.orders[0], MemberStatus::Down).await?;
    }
    Ok(format!("by all, {:.1} s later", begun.elapsed().as_secs_f32()))
}

async fn restarted(demo: &mut Demo) -> Result<String> {
    let victim = demo.orders[0].clone();
    let before = generation(demo, &victim).await?;
    demo.cluster.restart(&victim).await?;
    demo.cluster.wait_status("seed", &victim, MemberStatus::Alive).await?;
    let after = generation(demo, &victim).await?;
    ensure!(after > before, "{before} then {after}");
    Ok(format!("{before} -> {after}"))
}

async fn generation(demo: &Demo, name: &str) -> Result<u64> {
    let members = demo.cluster.members("seed").await?;
    members.iter().find(|m| m.name == name).map(|m| m.generation).context("the node is not known")
}

async fn left(demo: &mut Demo) -> Result<String> {
    let leaver = demo.orders[1].clone();
    let load = Load::start(demo.cluster.node("seed").outbound, "orders", 300);
    enough(&load, 200).await?;
    let status = demo.cluster.terminate(&leaver).await?;
    enough(&load, load.good() + 200).await?;
    let tally = load.stop().await;
    ensure!(status.success(), "it ended with {status}");
    ensure!(tally.failed.is_empty(), "{} failed, first: {:?}", tally.failed.len(), tally.failed.first());
    demo.cluster.wait_status("seed", &leaver, MemberStatus::Left).await?;
    Ok(format!("{} calls, 0 failed, status left", tally.good))
}
