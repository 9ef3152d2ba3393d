//! UDP relays: a bad network, and a member of whom one half has gone bad.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::Arc,
};

use tokio::net::UdpSocket;

/// Starts a relay for one client in front of `to`; returns where to send. Both ways, every third packet goes twice, and of
/// every five the second waits until three others have passed.
pub async fn shuffling_relay(to: SocketAddr) -> SocketAddr {
    let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
    back.connect(to).await.expect("an address of this machine");
    let addr = front.local_addr().expect("bound");
    tokio::spawn(async move {
        let mut buffer = vec![0; 64 << 10];
        let (length, client) = front.recv_from(&mut buffer).await.expect("a first packet");
        let _ = back.send(&buffer[..length]).await;
        front.connect(client).await.expect("an address of this machine");
        tokio::join!(shuffle(&front, &back), shuffle(&back, &front));
    });
    addr
}

async fn shuffle(from: &UdpSocket, to: &UdpSocket) {
    let mut buffer = vec![0; 64 << 10];
    let mut held: Option<(Vec<u8>, u64)> = None;
    for n in 0u64.. {
        // An unreachable port is told as an error of the next read; the ends find out by themselves.
        let Ok(length) = from.recv(&mut buffer).await else { continue };
        let packet = &buffer[..length];
        if n % 5 == 1 && held.is_none() {
            held = Some((packet.to_vec(), n));
            continue;
        }
        let _ = to.send(packet).await;
        if n % 3 == 0 {
            let _ = to.send(packet).await;
        }
        if let Some((late, _)) = held.take_if(|(_, since)| n >= *since + 3) {
            let _ = to.send(&late).await;
        }
    }
}

/// Stands where a node is advertised, and parts what comes for it as the node's own sockets do: by the first byte of the
/// connection id, 0 to `control` and all else to `calls`.
pub async fn parting_relay(at: SocketAddr, control: SocketAddr, calls: SocketAddr) {
    let front = Arc::new(UdpSocket::bind(at).await.expect("the port is free"));
    tokio::spawn(async move {
        let mut ways: HashMap<(SocketAddr, SocketAddr), Arc<UdpSocket>> = HashMap::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Ok((length, client)) = front.recv_from(&mut buffer).await else { continue };
            let packet = &buffer[..length];
            let is_long = packet.first().is_some_and(|first| first & 0x80 != 0);
            let to = if packet.get(if is_long { 6 } else { 1 }) == Some(&0) { control } else { calls };
            let way = match ways.entry((client, to)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let way = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
                    way.connect(to).await.expect("an address of this machine");
                    tokio::spawn(carry_back(way.clone(), front.clone(), client));
                    new.insert(way)
                }
            };
            let _ = way.send(packet).await;
        }
    });
}

async fn carry_back(way: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        // An unreachable port is told as an error of the next read.
        let Ok(length) = way.recv(&mut buffer).await else { continue };
        let _ = front.send_to(&buffer[..length], client).await;
    }
}
