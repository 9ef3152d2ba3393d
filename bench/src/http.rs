//! Just enough of an HTTP/1 client to ask whether something is up, and what it knows.

use std::io::{BufRead, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// How long connecting, or a pause between two reads, may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Answers are asked for from our own children only; this bounds a mistake, not an attack.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// GETs `path` and fails unless the answer is a 200; gives what follows the head of the answer, as sent.
pub(crate) fn get(server: SocketAddr, host: &str, path: &str) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE).with_context(|| format!("connect to {server}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream
        .take(MAX_ANSWER_BYTES)
        .read_to_end(&mut answer)
        .with_context(|| format!("read from {server} until it closes"))?;
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    check_status(&String::from_utf8_lossy(line)).with_context(|| format!("GET {server}{path}"))?;
    let Some(head) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
        bail!("{server}{path} answered with no end of head");
    };
    Ok(answer.split_off(head + 4))
}

/// Reads one answer from a connection that is kept; fails unless it is a 200 that tells its length.
pub(crate) fn read_kept(connection: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut connection = connection.take(MAX_ANSWER_BYTES);
    let mut line = String::new();
    let mut next = || {
        line.clear();
        connection.read_line(&mut line).context("read the head of an answer")?;
        line.strip_suffix("\r\n").map(str::to_owned).context("the answer broke off in its head")
    };
    check_status(&next()?)?;
    let mut length = None;
    loop {
        let line = next()?;
        match line.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = Some(value.trim().parse().with_context(|| format!("read {line:?}"))?);
            }
            _ if line.is_empty() => break,
            _ => {}
        }
    }
    let length: u64 = length.context("an answer without a content-length")?;
    let mut body = Vec::new();
    connection.take(length).read_to_end(&mut body).context("read the body of an answer")?;
    ensure!(body.len() as u64 == length, "the answer broke off after {} of {length} bytes", body.len());
    Ok(body)
}

fn check_status(line: &str) -> Result<()> {
    ensure!(line.split(' ').nth(1) == Some("200"), "answered {line:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn check(answer: &'static [u8]) -> Result<Vec<u8>> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).unwrap();
            assert!(request[..length].starts_with(b"GET /x HTTP/1.1\r\nHost: h\r\n"));
            stream.write_all(answer).unwrap();
        });
        let result = get(address, "h", "/x");
        server.join().unwrap();
        result
    }

    #[test]
    fn only_a_whole_200_counts() {
        assert_eq!(check(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nbody").unwrap(), b"body");
        assert!(check(b"HTTP/1.1 503 Service Unavailable\r\n\r\n200").is_err());
        assert!(check(b"HTTP/1.1 200 OK\r\nA: b\r\n").is_err());
        assert!(check(b"").is_err());
    }

    #[test]
    fn answers_on_a_kept_connection_end_where_they_say() {
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n";
        let two = format!("{head}bodyHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        let mut connection = two.as_bytes();
        assert_eq!(read_kept(&mut connection).unwrap(), b"body");
        assert_eq!(read_kept(&mut connection).unwrap(), b"");
        assert!(read_kept(&mut connection).is_err());
        for bad in [&format!("{head}bod"), &head.replace("200", "503"), &head.replace("Length", "Type"), &head[..20]] {
            assert!(read_kept(&mut bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
