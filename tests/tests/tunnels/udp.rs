//! UDP over a port of its own.

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use starling_chaos::{NodeSpec, wait_for};
use starling_tests::is_known;
use tokio::net::UdpSocket;

use super::{LIMIT, figure_becomes, mesh};

/// Repeats packets to whoever sent them, with the address that they came from in front.
async fn echo() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut packet = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut packet).await {
            let answer = [from.to_string().as_bytes(), b" ", &packet[..length]].concat();
            let _ = socket.send_to(&answer, from).await;
        }
    });
    addr
}

async fn client(port: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(port).await.unwrap();
    socket
}

/// One question until it is answered: the address that the service saw, and what came back.
async fn ask(socket: &UdpSocket, question: &[u8]) -> (String, Vec<u8>) {
    let asking = async {
        loop {
            let _ = socket.send(question).await;
            let mut answer = vec![0; 65_536];
            let received = tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut answer)).await;
            if let Ok(Ok(length)) = received {
                let space = answer.iter().position(|byte| *byte == b' ').unwrap();
                let from = String::from_utf8_lossy(&answer[..space]).into_owned();
                return (from, answer[space + 1..length].to_vec());
            }
        }
    };
    tokio::time::timeout(LIMIT, asking).await.expect("an answer")
}

#[tokio::test]
async fn packets_go_there_and_back_and_flows_are_told_apart() {
    let (cluster, port) = mesh("dns", echo().await, "udp").await;
    let (one, other) = (client(port).await, client(port).await);
    let (from, back) = ask(&one, b"question").await;
    assert_eq!(back, b"question");
    let (same, _) = ask(&one, b"another").await;
    assert_eq!(from, same, "one flow, one socket");
    let (different, _) = ask(&other, b"").await;
    assert_ne!(from, different);
    // What fits into no datagram goes over the stream.
    for length in [1, 1200, 4000, 9000, 60_000] {
        let question: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let (_, back) = ask(&one, &question).await;
        assert!(back == question, "{length}");
    }
    for (outcome, least) in [("datagram", 4.0), ("stream", 2.0), ("delivered", 8.0)] {
        let outcome = format!("outcome=\"{outcome}\"");
        figure_becomes(&cluster, "near", "starling_udp_packets_total", &[&outcome], |packets| packets >= least).await;
    }
}

/// As a resolver asks: many at a time, each once. On loopback hardly one is lost.
#[tokio::test]
async fn ten_thousand_questions_are_answered() {
    const QUESTIONS: u32 = 10_000;
    const WINDOW: usize = 32;
    let (_cluster, port) = mesh("dns", echo().await, "udp").await;
    let socket = client(port).await;
    ask(&socket, b"are you there").await;
    let (mut answered, mut next, mut lost) = (HashSet::new(), 0, 0);
    let mut open = HashSet::new();
    let mut packet = vec![0; 2048];
    while next < QUESTIONS || !open.is_empty() {
        while open.len() < WINDOW && next < QUESTIONS {
            socket.send(&next.to_be_bytes()).await.unwrap();
            open.insert(next);
            next += 1;
        }
        match tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut packet)).await {
            Ok(received) => {
                let length = received.unwrap();
                if let Ok(number) = packet[length.saturating_sub(4)..length].try_into().map(u32::from_be_bytes) {
                    open.remove(&number);
                    answered.insert(number);
                }
            }
            Err(_) => {
                lost += open.len();
                open.clear();
            }
        }
    }
    assert!(lost <= 10, "{lost} lost, {} answered", answered.len());
}

/// What the application sees is one port that answers, whoever answers behind it.
#[tokio::test]
async fn a_flow_goes_on_at_another_instance_when_its_node_dies() {
    let addr = echo().await;
    let (mut cluster, port) = mesh("dns", addr, "udp").await;
    let socket = client(port).await;
    let (first, _) = ask(&socket, b"before").await;
    cluster.add(&NodeSpec::named("other").serving(format!("dns={addr},protocol=udp"))).await.unwrap();
    is_known(&cluster, "near", "dns", 2).await;
    cluster.kill("far").await.unwrap();
    let (second, back) = ask(&socket, b"after").await;
    assert_eq!(back, b"after");
    assert_ne!(first, second);
}

/// Floods of one flow leave the others their way.
#[tokio::test]
async fn a_flood_of_one_flow_leaves_others_alone() {
    let (cluster, port) = mesh("dns", echo().await, "udp").await;
    let quiet = client(port).await;
    ask(&quiet, b"hello").await;
    let flood = client(port).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let stopped = stop.clone();
    let flooding = tokio::spawn(async move {
        let packet = [7; 1200];
        while !stopped.is_cancelled() {
            for _ in 0..64 {
                let _ = flood.try_send(&packet);
            }
            tokio::task::yield_now().await;
        }
    });
    let mut lost = 0;
    for round in 0..50u32 {
        quiet.send(&round.to_be_bytes()).await.unwrap();
        let mut answer = vec![0; 2048];
        let received = tokio::time::timeout(Duration::from_secs(5), quiet.recv(&mut answer)).await;
        lost += u32::from(received.is_err());
    }
    stop.cancel();
    flooding.await.unwrap();
    // The flood fills the port's own socket, too, where nobody can tell one from another.
    assert!(lost <= 25, "{lost} of 50 lost");
    let _ = cluster;
    wait_for("others are answered", LIMIT, || async {
        ask(&quiet, b"still").await;
        Ok(())
    })
    .await
    .unwrap();
}

/// As resolvers do, which take a new port for each question: newcomers find room, however many have been there before.
#[tokio::test]
async fn more_addresses_than_there_is_room_for_are_all_answered() {
    let (_cluster, port) = mesh("dns", echo().await, "udp").await;
    for _ in 0..25 {
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..100 {
            asking.spawn(async move { ask(&client(port).await, b"who").await.1 });
        }
        assert!(asking.join_all().await.iter().all(|answer| answer == b"who"));
    }
}
