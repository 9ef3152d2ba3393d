//! Closed-loop load from `wrk`, and the reading of what it prints.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::load::Outcome;
use crate::process;
use crate::target::HOST;

/// One thread, a fixed number of connections, each with one call under way at a time.
pub(crate) struct Wrk {
    program: PathBuf,
    connections: u32,
    path: String,
}

impl Wrk {
    /// Finds `wrk`; it will GET `path`.
    pub(crate) fn new(connections: u32, path: impl Into<String>) -> Result<Self> {
        let program = process::require("wrk", "apt-get install -y wrk")?;
        Ok(Self { program, connections, path: path.into() })
    }

    /// The program, and its flags for one load.
    pub(crate) fn command(&self, entry: SocketAddr, seconds: u32) -> (PathBuf, Vec<String>) {
        let args = [
            "-t1".to_owned(),
            format!("-c{}", self.connections),
            format!("-d{seconds}s"),
            "--latency".to_owned(),
            "-H".to_owned(),
            format!("Host: {HOST}"),
            format!("http://{entry}{}", self.path),
        ];
        (self.program.clone(), args.into())
    }
}

/// Reads what it prints at its end.
pub(crate) fn parse(text: &str) -> Result<Outcome> {
    let lines = || text.lines().map(str::trim);
    let after = |start: &str| lines().find_map(|line| line.strip_prefix(start)).map(str::trim);
    let requests = lines().find_map(|line| line.split_once(" requests in ")?.0.parse().ok());
    let rate = after("Requests/sec:").and_then(|rate| rate.parse().ok());
    let percentile = |start| after(start).and_then(milliseconds);
    let mut errors: Vec<String> = lines()
        .filter(|line| line.starts_with("Socket errors:") || line.starts_with("Non-2xx"))
        .map(str::to_owned)
        .collect();
    let requests = requests.context("no count of requests")?;
    if requests == 0 {
        errors.push("no request was answered".to_owned());
    }
    Ok(Outcome {
        requests,
        requests_per_second: rate.context("no Requests/sec")?,
        p50_ms: percentile("50%").context("no 50 % latency")?,
        p99_ms: percentile("99%").context("no 99 % latency")?,
        errors,
    })
}

/// Reads wrk's times: `950.00us`, `1.23ms`, `2.00s`, `1.50m`.
fn milliseconds(text: &str) -> Option<f64> {
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "us" => 0.001,
        "ms" => 1.0,
        "s" => 1000.0,
        "m" => 60_000.0,
        "h" => 3_600_000.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: &str = "Running 10s test @ http://127.0.0.1:1/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.45ms    1.99ms  38.47ms   92.11%
    Req/Sec    28.46k     3.02k   33.55k    72.00%
  Latency Distribution
     50%  950.00us
     75%    2.77ms
     90%    3.90ms
     99%    1.02s
  283183 requests in 10.01s, 72.37MB read
Requests/sec:  28294.75
Transfer/sec:      7.23MB
";

    #[test]
    fn a_clean_run_is_read() {
        let outcome = parse(CLEAN).unwrap();
        assert_eq!(outcome.requests, 283_183);
        assert_eq!(outcome.requests_per_second, 28_294.75);
        assert!((outcome.p50_ms - 0.95).abs() < 1e-9 && (outcome.p99_ms - 1020.0).abs() < 1e-9, "{outcome:?}");
        assert!(outcome.errors.is_empty());
    }

    #[test]
    fn every_kind_of_error_is_kept() {
        let bad =
            "  Socket errors: connect 0, read 3, write 0, timeout 1\n  Non-2xx or 3xx responses: 12\nRequests/sec:";
        let outcome = parse(&CLEAN.replace("Requests/sec:", bad)).unwrap();
        assert_eq!(
            outcome.errors,
            ["Socket errors: connect 0, read 3, write 0, timeout 1", "Non-2xx or 3xx responses: 12"]
        );
        let none = parse(&CLEAN.replace("283183", "0")).unwrap();
        assert_eq!(none.errors, ["no request was answered"]);
    }

    #[test]
    fn what_is_not_wrks_output_is_refused() {
        assert!(parse("unable to connect").is_err());
        assert!(parse(&CLEAN.replace("99%", "98%")).is_err());
    }

    #[test]
    fn units_of_time() {
        for (text, expected) in [("1.50m", Some(90_000.0)), ("2h", Some(7_200_000.0)), ("3", None), ("3parsec", None)] {
            assert_eq!(milliseconds(text), expected, "{text}");
        }
    }
}
