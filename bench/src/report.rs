//! What the samples add up to: medians for each target, and how two targets compare.

use serde_json::{Value, json};

use crate::load::Outcome;
use crate::measurement::{Sample, Schedule};
use crate::table::Table;
use crate::target::Target;

/// Everything a run found out.
pub(crate) struct Report {
    schedule: Schedule,
    connections: u32,
    body_bytes: u32,
    rows: Vec<Row>,
}

struct Row {
    name: &'static str,
    version: String,
    proxies: Vec<String>,
    samples: Vec<Sample>,
}

impl Row {
    /// The errors of all rounds; a row with any is not to be trusted.
    fn problems(&self) -> Vec<String> {
        let of_round = |(index, sample): (usize, &Sample)| {
            sample.outcome.errors.iter().map(|error| format!("round {}: {error}", index + 1)).collect::<Vec<_>>()
        };
        self.samples.iter().enumerate().flat_map(of_round).collect()
    }

    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of).collect())
    }

    fn each_proxy(&self, of: impl Fn(&Sample, usize) -> f64) -> Vec<f64> {
        (0..self.proxies.len()).map(|proxy| self.median(|sample| of(sample, proxy))).collect()
    }

    fn outcome(&self, of: impl Fn(&Outcome) -> f64) -> f64 {
        self.median(|sample| of(&sample.outcome))
    }

    fn cpu_us_total(&self) -> Option<f64> {
        self.samples.iter().map(Sample::cpu_us_total).collect::<Option<Vec<_>>>().map(median)
    }

    fn cpu_us(&self) -> Vec<f64> {
        self.each_proxy(|sample, proxy| sample.cpu_us[proxy])
    }

    fn resident_mib(&self) -> Vec<f64> {
        self.each_proxy(|sample, proxy| sample.memory[proxy].resident_kib as f64 / 1024.0)
    }

    fn peak_mib(&self) -> Vec<f64> {
        self.each_proxy(|sample, proxy| sample.memory[proxy].peak_kib as f64 / 1024.0)
    }
}

/// How one target compares with another: medians of the ratios of each round.
struct Ratio {
    name: String,
    cpu: f64,
    rate: f64,
}

impl Report {
    /// Joins the targets and their samples, which are in the same order.
    pub(crate) fn new(
        targets: &[Target],
        samples: Vec<Vec<Sample>>,
        schedule: Schedule,
        connections: u32,
        body_bytes: u32,
    ) -> Self {
        let row = |(target, samples): (&Target, Vec<Sample>)| Row {
            name: target.name,
            version: target.version.clone(),
            proxies: target.proxies.iter().map(|proxy| proxy.name().to_owned()).collect(),
            samples,
        };
        Self { schedule, connections, body_bytes, rows: targets.iter().zip(samples).map(row).collect() }
    }

    /// Whether no round of any target saw an error.
    pub(crate) fn is_valid(&self) -> bool {
        self.rows.iter().all(|row| row.problems().is_empty())
    }

    /// The first pair against each other one, where neither saw an error.
    fn ratios(&self) -> Vec<Ratio> {
        let mut pairs = self.rows.iter().filter(|row| !row.proxies.is_empty());
        let Some(ours) = pairs.next() else { return Vec::new() };
        pairs.filter_map(|peer| Self::ratio(ours, peer)).collect()
    }

    fn ratio(ours: &Row, peer: &Row) -> Option<Ratio> {
        if !ours.problems().is_empty() || !peer.problems().is_empty() {
            return None;
        }
        let rounds = || ours.samples.iter().zip(&peer.samples);
        let cpu: Option<Vec<f64>> =
            rounds().map(|(ours, peer)| Some(ours.cpu_us_total()? / peer.cpu_us_total()?)).collect();
        let rate = rounds().map(|(ours, peer)| ours.outcome.requests_per_second / peer.outcome.requests_per_second);
        Some(Ratio { name: format!("{} / {}", ours.name, peer.name), cpu: median(cpu?), rate: median(rate.collect()) })
    }

    /// For people: a table, the ratios, and anything that went wrong.
    pub(crate) fn text(&self) -> String {
        let headings = [
            "target",
            "requests/s",
            "MiB/s",
            "CPU us/req",
            "a",
            "b",
            "p50 ms",
            "p99 ms",
            "RSS MiB a",
            "b",
            "peak a",
            "b",
            "other CPU",
            "",
        ];
        let mut table = Table::new(&headings);
        for row in &self.rows {
            table.push(cells(row, self.body_bytes));
        }
        let Schedule { seconds, rounds, .. } = self.schedule;
        let mut text = format!(
            "{} connections, {}-byte answers, {seconds} s a round; medians over rounds: {rounds}\n\n{table}\n",
            self.connections, self.body_bytes
        );
        for row in &self.rows {
            text += &format!("{}: {}\n", row.name, row.version);
        }
        for Ratio { name, cpu, rate } in self.ratios() {
            text +=
                &format!("\n{name}: CPU per request {cpu:.3}, requests/s {rate:.3} (medians of the rounds' ratios)\n");
        }
        for row in &self.rows {
            for problem in row.problems() {
                text += &format!("INVALID: {}: {problem}\n", row.name);
            }
        }
        text
    }

    /// For programs: the same, and every round.
    pub(crate) fn json(&self) -> Value {
        json!({
            "seconds": self.schedule.seconds,
            "warmup_seconds": self.schedule.warmup_seconds,
            "rounds": self.schedule.rounds,
            "connections": self.connections,
            "body_bytes": self.body_bytes,
            "valid": self.is_valid(),
            "targets": self.rows.iter().map(row_json).collect::<Vec<_>>(),
            "ratios": self.ratios().into_iter().map(|Ratio { name, cpu, rate }| json!({
                "of": name, "cpu_per_request": cpu, "requests_per_second": rate,
            })).collect::<Vec<_>>(),
        })
    }
}

fn cells(row: &Row, body_bytes: u32) -> Vec<String> {
    // A dash for each of the two proxies that the bare backend lacks.
    let two = |values: Vec<f64>| -> [String; 2] {
        std::array::from_fn(|i| values.get(i).map_or_else(|| "-".to_owned(), |value| format!("{value:.1}")))
    };
    let total = row.cpu_us_total().map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
    let rate = row.outcome(|outcome| outcome.requests_per_second);
    let mib = rate * f64::from(body_bytes) / f64::from(1 << 20);
    let mut cells = vec![row.name.to_owned(), format!("{rate:.0}"), format!("{mib:.0}"), total];
    cells.extend(two(row.cpu_us()));
    cells.push(format!("{:.2}", row.outcome(|outcome| outcome.p50_ms)));
    cells.push(format!("{:.2}", row.outcome(|outcome| outcome.p99_ms)));
    cells.extend(two(row.resident_mib()));
    cells.extend(two(row.peak_mib()));
    cells.push(format!("{:.0} %", row.median(|sample| sample.elsewhere) * 100.0));
    cells.push(if row.problems().is_empty() { String::new() } else { "INVALID".to_owned() });
    cells
}

fn row_json(row: &Row) -> Value {
    let round = |sample: &Sample| {
        json!({
            "requests": sample.outcome.requests,
            "requests_per_second": sample.outcome.requests_per_second,
            "p50_ms": sample.outcome.p50_ms,
            "p99_ms": sample.outcome.p99_ms,
            "cpu_us_per_request": sample.cpu_us_total(),
            "other_cpu": sample.elsewhere,
            "errors": sample.outcome.errors,
        })
    };
    let (cpu, resident, peak) = (row.cpu_us(), row.resident_mib(), row.peak_mib());
    let proxy = |(index, name): (usize, &String)| {
        json!({
            "name": name,
            "cpu_us_per_request": cpu[index],
            "rss_mib": resident[index],
            "peak_rss_mib": peak[index],
        })
    };
    json!({
        "target": row.name,
        "version": row.version,
        "valid": row.problems().is_empty(),
        "requests_per_second": row.outcome(|outcome| outcome.requests_per_second),
        "cpu_us_per_request": row.cpu_us_total(),
        "p50_ms": row.outcome(|outcome| outcome.p50_ms),
        "p99_ms": row.outcome(|outcome| outcome.p99_ms),
        "other_cpu": row.median(|sample| sample.elsewhere),
        "proxies": row.proxies.iter().enumerate().map(proxy).collect::<Vec<_>>(),
        "rounds": row.samples.iter().map(round).collect::<Vec<_>>(),
    })
}

/// The middle value, or the mean of the two middle ones; not a number for none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Memory;

    fn sample(rate: f64, cpu_us: &[f64], errors: &[&str]) -> Sample {
        let errors = errors.iter().map(|error| (*error).to_owned()).collect();
        Sample {
            outcome: Outcome { requests: 100, requests_per_second: rate, p50_ms: 1.0, p99_ms: 2.0, errors },
            cpu_us: cpu_us.to_vec(),
            memory: vec![Memory { resident_kib: 2048, peak_kib: 4096 }; cpu_us.len()],
            elsewhere: 0.25,
        }
    }

    fn report(rows: [(&'static str, Vec<Sample>); 3]) -> Report {
        let row = |(name, samples): (&'static str, Vec<Sample>)| Row {
            name,
            version: format!("{name} 1"),
            proxies: (0..samples[0].cpu_us.len()).map(|index| format!("{name}-{index}")).collect(),
            samples,
        };
        let schedule = Schedule { seconds: 10, warmup_seconds: 1, rounds: 3 };
        Report { schedule, connections: 64, body_bytes: 128, rows: rows.map(row).into() }
    }

    fn rows(error: &[&str]) -> [(&'static str, Vec<Sample>); 3] {
        let bare = vec![sample(90.0, &[], &[]); 3];
        // The ratios of the rounds are 0.5, 0.25 and 0.4; the ratio of the medians would be 0.5.
        let ours = [[5.0, 5.0], [10.0, 10.0], [20.0, 20.0]].map(|cpu| sample(20.0, &cpu, error));
        let peer = [[10.0, 10.0], [40.0, 40.0], [50.0, 50.0]].map(|cpu| sample(10.0, &cpu, &[]));
        [("bare", bare), ("ours", ours.into()), ("peer", peer.into())]
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let report = report(rows(&[]));
        let json = report.json();
        assert_eq!(json["ratios"][0], json!({"of": "ours / peer", "cpu_per_request": 0.4, "requests_per_second": 2.0}));
        assert_eq!(json["targets"][1]["cpu_us_per_request"], json!(20.0));
        assert_eq!(json["targets"][1]["proxies"][0]["rss_mib"], json!(2.0));
        assert_eq!(json["targets"][0]["cpu_us_per_request"], Value::Null);
        assert!(report.is_valid() && !report.text().contains("INVALID"));
    }

    #[test]
    fn an_error_spoils_its_row_and_the_ratio() {
        let report = report(rows(&["Non-2xx or 3xx responses: 1"]));
        assert!(!report.is_valid());
        assert_eq!(report.json()["ratios"], json!([]));
        assert_eq!(report.json()["targets"][1]["valid"], json!(false));
        assert!(report.text().contains("INVALID: ours: round 1: Non-2xx or 3xx responses: 1"), "{}", report.text());
    }

    #[test]
    fn medians() {
        for (values, expected) in [(vec![3.0, 1.0, 2.0], 2.0), (vec![4.0, 1.0], 2.5), (vec![7.0], 7.0)] {
            assert_eq!(median(values), expected);
        }
        assert!(median(Vec::new()).is_nan());
    }
}
