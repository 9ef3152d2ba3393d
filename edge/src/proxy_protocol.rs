//! The PROXY protocol, version 2 (HAProxy's proxy-protocol.txt, §2.2): a balancer says in front of a connection whose it is.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::io::{AsyncRead, AsyncReadExt};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Longest rest of a header that is read: addresses and some extensions.
const MAX_BYTES: u16 = 4096;

/// Reads the header: whose the connection is, or `None` if it is the balancer's own. Nothing behind it is read.
///
/// # Errors
/// If there is none, or one that says nothing of use. Not cancel safe.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut head = [0; 16];
    stream.read_exact(&mut head).await?;
    let [.., command, family, high, low] = head;
    let length = u16::from_be_bytes([high, low]);
    if head[..12] != SIGNATURE || length > MAX_BYTES {
        return Err(wrong("no PROXY protocol header of version 2"));
    }
    let mut rest = vec![0; length.into()];
    stream.read_exact(&mut rest).await?;
    let port = |at: usize| rest.get(at..at + 2).map(|port| u16::from_be_bytes([port[0], port[1]]));
    let source: Option<(IpAddr, u16)> = match (command, family) {
        (0x20, _) => return Ok(None),
        (0x21, 0x11) => rest.first_chunk::<4>().map(|ip| Ipv4Addr::from(*ip).into()).zip(port(8)),
        (0x21, 0x21) => rest.first_chunk::<16>().map(|ip| Ipv6Addr::from(*ip).into()).zip(port(32)),
        (0x21, _) => return Err(wrong("a PROXY protocol header of no TCP connection")),
        _ => return Err(wrong("a PROXY protocol header of another version or command")),
    };
    source.map(|source| Some(source.into())).ok_or_else(|| wrong("a PROXY protocol header that breaks off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn of(rest: &[u8]) -> Result<Option<SocketAddr>, String> {
        let bytes = [&SIGNATURE, rest, b"rest"].concat();
        let mut stream = bytes.as_slice();
        let read = read(&mut stream).await.map_err(|e| e.to_string());
        assert!(read.is_err() || stream == b"rest", "{stream:?}");
        read
    }

    #[tokio::test]
    async fn headers_as_balancers_write_them() {
        let v4 = [0x21, 0x11, 0, 12, 203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x34, 1, 187];
        assert_eq!(of(&v4).await, Ok(Some("203.0.113.7:4660".parse().unwrap())));
        let mut v6 = vec![0x21, 0x21, 0, 39];
        v6.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend([0; 16]);
        v6.extend([0, 80, 1, 187, 4, 0, 0]);
        assert_eq!(of(&v6).await, Ok(Some("[2001:db8::1]:80".parse().unwrap())));
        assert_eq!(of(&[0x20, 0, 0, 0]).await, Ok(None));
        for bad in
            [&[0x21, 0x11, 0, 4, 1, 2, 3, 4][..], &[0x21, 0x31, 0, 0], &[0x11, 0x11, 0, 0], &[0x21, 0x11, 0xff, 0xff]]
        {
            assert!(of(bad).await.is_err(), "{bad:?}");
        }
        assert!(read(&mut &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..]).await.is_err());
    }
}
