//! Load of plain TCP connections: as many bytes as they take, or a small message to and fro; and the server behind it.
//!
//! Client and server are threads of the bench, so what they use is counted to no proxy.

mod server;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::load::Outcome;
pub(crate) use server::Server;

/// Bytes that are written and read at a time, where many are sent: few calls of the kernel, and within a core's cache.
pub(crate) const BLOCK: usize = 256 << 10;
/// Bytes of a message to and fro.
const MESSAGE: usize = 16;
/// How long a connection may take to open, and then neither take nor give anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first byte of a connection: blocks follow, of which the last is answered with one byte.
const SINK: u8 = b's';
/// The first byte of a connection: messages follow, each of which comes back.
const ECHO: u8 = b'e';

/// The first byte of a block. Not the end of the stream says which is the last: not every proxy ends the directions of a
/// connection one by one.
const MORE: u8 = b'm';
const LAST: u8 = b'l';

/// A kind of load.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stream {
    /// Blocks one way, as fast as so many connections take them. A block that the server has read is an answered request;
    /// it has no time of its own.
    Bulk { connections: usize },
    /// One message over one connection, again as soon as it has come back, which is the answer.
    PingPong,
}

impl Stream {
    /// Loads `entry` for `seconds`, and then until all that was sent has arrived.
    pub(crate) fn start(self, entry: SocketAddr, seconds: u32) -> JoinHandle<Outcome> {
        thread::spawn(move || self.run(entry, Duration::from_secs(seconds.into())))
    }

    fn run(self, entry: SocketAddr, time: Duration) -> Outcome {
        let begin = Instant::now();
        let end = begin + time;
        match self {
            Self::Bulk { connections } => {
                let senders: Vec<_> = (0..connections).map(|_| thread::spawn(move || send(entry, end))).collect();
                let results = senders.into_iter().map(|sender| sender.join().expect("a sender does not panic"));
                let (sent, failed): (Vec<_>, Vec<_>) = results.partition(Result::is_ok);
                let errors = failed.into_iter().filter_map(Result::err);
                let requests = sent.into_iter().flatten().sum();
                Outcome {
                    requests,
                    requests_per_second: requests as f64 / begin.elapsed().as_secs_f64(),
                    p50_ms: f64::NAN,
                    p99_ms: f64::NAN,
                    errors: errors.map(|error| format!("{error:#}")).collect(),
                }
            }
            Self::PingPong => {
                let mut times = Vec::new();
                let error = ping_pong(entry, end, &mut times).err();
                let requests = times.len() as u64;
                let requests_per_second = requests as f64 / begin.elapsed().as_secs_f64();
                times.sort_unstable();
                Outcome {
                    requests,
                    requests_per_second,
                    p50_ms: percentile_ms(&times, 50),
                    p99_ms: percentile_ms(&times, 99),
                    errors: error.map(|error| format!("{error:#}")).into_iter().collect(),
                }
            }
        }
    }
}

/// One message to the server behind `entry` and back.
pub(crate) fn ping(entry: SocketAddr) -> Result<()> {
    exchange(&mut open(entry, ECHO)?)
}

/// Sends blocks until `end`; gives their number when the server has read them all.
fn send(entry: SocketAddr, end: Instant) -> Result<u64> {
    let mut stream = open(entry, SINK)?;
    let mut block = vec![0; BLOCK];
    block[0] = MORE;
    let mut blocks = 1;
    while Instant::now() < end {
        stream.write_all(&block).context("send a block")?;
        blocks += 1;
    }
    block[0] = LAST;
    stream.write_all(&block).context("send the last block")?;
    stream.read_exact(&mut [0]).context("wait until all blocks have arrived")?;
    Ok(blocks)
}

/// Adds the time of each message to and fro until `end`.
fn ping_pong(entry: SocketAddr, end: Instant, times: &mut Vec<Duration>) -> Result<()> {
    let mut stream = open(entry, ECHO)?;
    let mut begin = Instant::now();
    while begin < end {
        exchange(&mut stream)?;
        let now = Instant::now();
        times.push(now - begin);
        begin = now;
    }
    ensure!(!times.is_empty(), "no message was sent");
    Ok(())
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    let sent = [b'p'; MESSAGE];
    let mut received = [0; MESSAGE];
    stream.write_all(&sent).context("send a message")?;
    stream.read_exact(&mut received).context("wait for a message")?;
    ensure!(received == sent, "another message came back than was sent");
    Ok(())
}

fn open(entry: SocketAddr, kind: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&entry, PATIENCE).with_context(|| format!("connect to {entry}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[kind]).context("say what follows")?;
    Ok(stream)
}

/// The time that so many of a hundred kept within; of ascending times.
fn percentile_ms(times: &[Duration], percent: usize) -> f64 {
    let rank = (times.len() * percent).div_ceil(100);
    times.get(rank.saturating_sub(1)).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_millis(200);

    #[test]
    fn every_block_is_counted() {
        let server = Server::start().unwrap();
        let outcome = Stream::Bulk { connections: 3 }.run(server.address(), TIME);
        assert_eq!(outcome.errors, [""; 0]);
        assert!(outcome.requests >= 3, "{outcome:?}");
        let most = outcome.requests as f64 / TIME.as_secs_f64();
        assert!(outcome.requests_per_second > 0.0 && outcome.requests_per_second <= most, "{outcome:?}");
    }

    #[test]
    fn every_message_has_its_time() {
        let server = Server::start().unwrap();
        ping(server.address()).unwrap();
        let outcome = Stream::PingPong.run(server.address(), TIME);
        assert_eq!(outcome.errors, [""; 0]);
        assert!(outcome.requests > 0 && outcome.p50_ms > 0.0 && outcome.p50_ms <= outcome.p99_ms, "{outcome:?}");
    }

    #[test]
    fn a_connection_that_ends_early_is_an_error() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || while listener.accept().is_ok() {});
        for load in [Stream::Bulk { connections: 2 }, Stream::PingPong] {
            let outcome = load.run(address, TIME);
            assert!(outcome.requests == 0 && !outcome.errors.is_empty(), "{load:?}: {outcome:?}");
        }
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!((percentile_ms(&times, 50), percentile_ms(&times, 99)), (100.0, 198.0));
        assert_eq!(percentile_ms(&times[..1], 99), 1.0);
        assert!(percentile_ms(&[], 50).is_nan());
    }
}
