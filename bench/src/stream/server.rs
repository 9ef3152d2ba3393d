//! The server behind every tunnel.

use std::io::{Read, Result, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use super::{BLOCK, ECHO, LAST, MESSAGE, SINK};

/// A server that reads blocks, or sends messages back, whichever a connection begins with. Its threads live as long as
/// the bench and its connections do.
pub(crate) struct Server {
    address: SocketAddr,
}

impl Server {
    /// Listens on loopback.
    pub(crate) fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A connection that fails is the client's to report: it waits for an answer.
                thread::spawn(move || serve(stream));
            }
        });
        Ok(Self { address })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    match kind {
        [SINK] => sink(stream),
        [ECHO] => echo(stream),
        _ => Ok(()),
    }
}

fn sink(mut stream: TcpStream) -> Result<()> {
    let mut block = vec![0; BLOCK];
    while block[0] != LAST {
        stream.read_exact(&mut block)?;
    }
    stream.write_all(&[LAST])
}

fn echo(mut stream: TcpStream) -> Result<()> {
    let mut message = [0; MESSAGE];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}
