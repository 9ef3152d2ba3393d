//! Load from `oha`: at a fixed rate, or over TLS with any version of HTTP; and the reading of its JSON.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::load::Outcome;
use crate::target::{HOST, PUBLIC_HOST};

/// How to get oha where it is missing.
pub(crate) const INSTALL: &str = "cargo install oha --features http3 --root DIR, then --peers DIR";

/// What oha calls a call that was under way when its time was over, which is nobody's fault.
const CUT_OFF: &str = "aborted due to deadline";

/// More calls than any target answers, which is as many as it does. It makes oha take the way on which SIGINT ends it at
/// once, with all it has seen: by itself oha 1.16 goes on after its time over HTTP/3, until its connections have been
/// idle for 30 s, and counts that as part of its time.
const UNTIL_INTERRUPTED: [&str; 6] = ["-z", "24h", "--burst-delay", "10ms", "--burst-rate", "1000"];

/// The program and a kind of load.
pub(crate) struct Oha {
    program: PathBuf,
    kind: Kind,
}

enum Kind {
    /// So many calls a second over plain HTTP/1, whether or not earlier ones were answered.
    Rate(u32),
    /// As much as the target takes over TLS.
    Public { version: Version, headers: Vec<String> },
}

/// A version of HTTP on the public side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Version {
    H1,
    H2,
    H3,
}

impl Version {
    /// Each of them.
    pub(crate) const ALL: [Self; 3] = [Self::H1, Self::H2, Self::H3];

    /// oha's word for it, connections, and calls at a time on each: 64 calls under way on all of them.
    fn shape(self) -> (&'static str, u32, u32) {
        match self {
            Self::H1 => ("1.1", 64, 1),
            Self::H2 => ("2", 8, 8),
            Self::H3 => ("3", 8, 8),
        }
    }
}

impl Oha {
    /// A fixed rate over 64 plain HTTP/1 connections. A call counts from when it was due, so that a stall delays all that
    /// were due in it, not only those on their way.
    pub(crate) fn rate(program: PathBuf, per_second: u32) -> Self {
        Self { program, kind: Kind::Rate(per_second) }
    }

    /// As many calls as are answered over TLS, each with these fields, written `name: value`.
    pub(crate) fn public(program: PathBuf, version: Version, headers: Vec<String>) -> Self {
        Self { program, kind: Kind::Public { version, headers } }
    }

    /// Whether it goes on until it gets SIGINT, whatever length it was told.
    pub(crate) fn runs_until_interrupted(&self) -> bool {
        matches!(self.kind, Kind::Public { version: Version::H3, .. })
    }

    /// The program, and its flags for one load.
    pub(crate) fn command(&self, entry: SocketAddr, seconds: u32) -> (PathBuf, Vec<String>) {
        // One thread, as wrk has, so that it leaves the proxies as much of the machine.
        let common = ["--no-tui", "--output-format", "json", "--worker-threads", "1", "--redirect", "0"];
        let mut args: Vec<String> = common.map(str::to_owned).into();
        args.push("--disable-compression".to_owned());
        if self.runs_until_interrupted() {
            args.extend(UNTIL_INTERRUPTED.map(str::to_owned));
        } else {
            args.extend(["-z".to_owned(), format!("{seconds}s")]);
        }
        match &self.kind {
            Kind::Rate(rate) => {
                args.extend(["-c", "64", "-w", "--latency-correction", "-q"].map(str::to_owned));
                args.extend([rate.to_string(), "--host".to_owned(), HOST.to_owned(), format!("http://{entry}/")]);
            }
            Kind::Public { version, headers } => {
                let (word, connections, streams) = version.shape();
                args.extend(["--insecure".to_owned(), "--http-version".to_owned(), word.to_owned()]);
                args.extend(["-c".to_owned(), connections.to_string(), "-p".to_owned(), streams.to_string()]);
                args.extend(headers.iter().flat_map(|header| ["-H".to_owned(), header.clone()]));
                args.extend(["--connect-to".to_owned(), format!("{PUBLIC_HOST}:443:{entry}")]);
                args.push(format!("https://{PUBLIC_HOST}/"));
            }
        }
        (self.program.clone(), args)
    }
}

/// Reads what it prints at its end.
pub(crate) fn parse(text: &str) -> Result<Outcome> {
    let start = text.find('{').context("no JSON")?;
    let json: Value = serde_json::from_str(text[start..].trim_end()).context("not JSON")?;
    let counts = |name: &str| -> Result<Vec<(String, u64)>> {
        let counts = json[name].as_object().with_context(|| format!("no {name}"))?;
        let count = |(key, value): (&String, &Value)| Some((key.clone(), value.as_u64()?));
        counts.iter().map(count).collect::<Option<_>>().with_context(|| format!("a {name} that is no count"))
    };
    let statuses = counts("statusCodeDistribution")?;
    let requests: u64 = statuses.iter().map(|(_, count)| count).sum();
    let failed = statuses.iter().filter(|(status, _)| !status.starts_with('2'));
    let mut errors: Vec<String> = failed.map(|(status, count)| format!("status {status}: {count}")).collect();
    let broken = counts("errorDistribution")?.into_iter().filter(|(error, _)| error != CUT_OFF);
    errors.extend(broken.map(|(error, count)| format!("{error}: {count}")));
    if requests == 0 {
        errors.push("no request was answered".to_owned());
    }
    let total_s = json["summary"]["total"].as_f64().context("no total time")?;
    // Absent, or null, where nothing was answered.
    let percentile_ms = |name: &str| json["latencyPercentiles"][name].as_f64().map_or(f64::NAN, |s| s * 1000.0);
    Ok(Outcome {
        requests,
        requests_per_second: requests as f64 / total_s,
        p50_ms: percentile_ms("p50"),
        p99_ms: percentile_ms("p99"),
        errors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn output(statuses: Value, errors: Value) -> String {
        let json = json!({
            "summary": {"successRate": 1.0, "total": 2.5, "requestsPerSec": 41.0},
            "latencyPercentiles": {"p10": 0.0004, "p50": 0.00125, "p99": 0.25, "p99.9": 1.0},
            "statusCodeDistribution": statuses,
            "errorDistribution": errors,
        });
        format!("{json:#}\n")
    }

    #[test]
    fn a_clean_run_is_read() {
        let outcome = parse(&output(json!({"200": 100}), json!({CUT_OFF: 2}))).unwrap();
        let expected =
            Outcome { requests: 100, requests_per_second: 40.0, p50_ms: 1.25, p99_ms: 250.0, errors: Vec::new() };
        assert_eq!(outcome, expected);
    }

    #[test]
    fn every_kind_of_error_is_kept() {
        let outcome = parse(&output(json!({"200": 1, "429": 3}), json!({"timeout": 4, CUT_OFF: 2}))).unwrap();
        assert_eq!((outcome.requests, outcome.errors), (4, vec!["status 429: 3".to_owned(), "timeout: 4".to_owned()]));
        let outcome = parse(&output(json!({}), json!({}))).unwrap();
        assert_eq!(outcome.errors, ["no request was answered"]);
    }

    #[test]
    fn what_is_not_ohas_output_is_refused() {
        for text in
            ["Error: no such host", "{", "{}", &output(json!({"200": "x"}), json!({})), &output(json!([]), json!({}))]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
