//! The service without HTTP: what comes over TCP, or in a packet, goes back, behind a line with the name of the node.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

use super::{Manner, Service};

/// A message: five bytes that mean nothing here, the number of its call, and which of the call's messages it is.
pub(crate) const MESSAGE_BYTES: usize = 14;
/// Longest packet, in bytes.
const PACKET_BYTES: usize = 2048;
/// After an error of a socket.
const PAUSE: Duration = Duration::from_millis(10);

/// Listens at both, and serves as long as the process lives.
pub(super) async fn serve(listen: SocketAddr, service: Arc<Service>) -> Result<()> {
    let cannot = || format!("cannot listen on {listen}");
    let listener = TcpListener::bind(listen).await.with_context(cannot)?;
    let socket = UdpSocket::bind(listen).await.with_context(cannot)?;
    let of = service.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(connection(stream, of.clone()));
        }
    });
    tokio::spawn(packets(socket, service));
    Ok(())
}

/// The number of the call that a message belongs to.
fn nonce(message: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(message.get(5..13)?.try_into().ok()?))
}

async fn connection(mut stream: TcpStream, service: Arc<Service>) -> io::Result<()> {
    let _ = stream.set_nodelay(true);
    let mut message = [0; MESSAGE_BYTES];
    let mut is_first = true;
    loop {
        match stream.read_exact(&mut message).await {
            Ok(_) => {}
            // Its half is over, and so is this one.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return stream.shutdown().await,
            Err(error) => return Err(error),
        }
        let manner = *service.manner.borrow();
        if manner == Manner::Hang {
            std::future::pending::<()>().await;
        }
        if std::mem::take(&mut is_first) {
            service.done(nonce(&message).unwrap_or_default(), manner).await;
            stream.write_all(&said_by(&service, b"")).await?;
        }
        stream.write_all(&message).await?;
    }
}

async fn packets(socket: UdpSocket, service: Arc<Service>) {
    let socket = Arc::new(socket);
    let mut packet = [0; PACKET_BYTES];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut packet).await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let manner = *service.manner.borrow();
        let (Some(nonce), false) = (nonce(&packet[..length]), manner == Manner::Hang) else { continue };
        let (socket, service, answer) = (socket.clone(), service.clone(), said_by(&service, &packet[..length]));
        tokio::spawn(async move {
            service.done(nonce, manner).await;
            let _ = socket.send_to(&answer, from).await;
        });
    }
}

fn said_by(service: &Service, what: &[u8]) -> Vec<u8> {
    [service.name.as_bytes(), b"\n", what].concat()
}
