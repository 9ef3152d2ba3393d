//! Calls without HTTP: a TCP connection, or packets, with messages that come back one after the other.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UdpSocket,
};

use super::{
    calls::{TURNS, message},
    door::Door,
};
use crate::history::Call;

/// After so long without an answer, a packet is sent again: networks lose some.
const AGAIN: Duration = Duration::from_millis(300);

/// A TCP connection: each message is sent when the one before has come back; then this half ends, and the other one has to.
pub(super) async fn connection(call: &mut Call, door: &Door) -> anyhow::Result<()> {
    let stream = door.from.connect(door.addr).await.context("connect")?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    for turn in 0..TURNS {
        let message = message(call.nonce, turn);
        stream.write_all(&message).await?;
        if turn == 0 {
            stream.read_line(&mut call.by).await.context("nobody answers")?;
            call.by.truncate(call.by.trim_end().len());
        }
        let mut echo = vec![0; message.len()];
        stream.read_exact(&mut echo).await.context("a message does not come back")?;
        if echo != message {
            call.wrong = true;
            bail!("wrong content: {echo:?} instead of {message:?}");
        }
    }
    stream.shutdown().await?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await?;
    if !rest.is_empty() {
        bail!("{rest:?} behind the last message");
    }
    call.status = 200;
    Ok(())
}

/// Packets from a port of their own, each sent until it is answered.
pub(super) async fn packets(call: &mut Call, door: &Door) -> anyhow::Result<()> {
    let socket = UdpSocket::from_std(door.from.udp()?)?;
    socket.connect(door.addr).await?;
    let mut packet = [0; 256];
    for turn in 0..TURNS {
        let message = message(call.nonce, turn);
        'answered: loop {
            // Refused while nobody has the port: there may be somebody soon.
            let _ = socket.send(&message).await;
            let again = tokio::time::sleep(AGAIN);
            tokio::pin!(again);
            loop {
                let received = tokio::select! {
                    received = socket.recv(&mut packet) => received,
                    () = &mut again => break,
                };
                let Ok(length) = received else {
                    again.as_mut().await;
                    break;
                };
                let end = packet[..length].iter().position(|byte| *byte == b'\n').context("no name in an answer")?;
                call.by = String::from_utf8_lossy(&packet[..end]).into_owned();
                let echo = &packet[end + 1..length];
                if echo == &message[..] {
                    break 'answered;
                }
                // One that was sent again can be answered twice.
                if !(0..turn).any(|before| echo == &super::calls::message(call.nonce, before)[..]) {
                    call.wrong = true;
                    bail!("wrong content: {echo:?} instead of {message:?}");
                }
            }
        }
    }
    call.status = 200;
    Ok(())
}
