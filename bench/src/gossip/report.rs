//! What the rounds add up to: a row for each system at each size.

use serde_json::{Value, json};

use super::measurement::{Sample, Schedule};
use super::mesh::POLL_INTERVAL;
use super::system::System;
use crate::report::median;
use crate::table::Table;

/// Everything a run found out.
pub(crate) struct Report {
    schedule: Schedule,
    rows: Vec<Row>,
}

/// One system at one size.
pub(crate) struct Row {
    name: &'static str,
    version: String,
    nodes: u16,
    /// A sample for each round that did not fail.
    pub(crate) samples: Vec<Sample>,
    /// What failed; a row with any is not to be trusted.
    pub(crate) problems: Vec<String>,
}

impl Row {
    /// A row without any samples yet.
    pub(crate) fn new(system: &System, nodes: u16) -> Self {
        let (name, version) = (system.name, system.version.clone());
        Self { name, version, nodes, samples: Vec::new(), problems: Vec::new() }
    }

    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of).collect())
    }

    /// Over all values of all rounds.
    fn pooled(&self, of: impl Fn(&Sample) -> &[f64]) -> Spread {
        Spread::of(self.samples.iter().flat_map(of).copied().collect())
    }

    fn converged_s(&self) -> Spread {
        self.pooled(|sample| std::slice::from_ref(&sample.converged_s))
    }

    fn kills_s(&self) -> Spread {
        self.pooled(|sample| &sample.kills_s)
    }

    fn resident_mib(&self) -> Spread {
        self.pooled(|sample| &sample.resident_mib)
    }

    fn gap_s(&self) -> f64 {
        self.samples.iter().map(|sample| sample.gap_s).fold(f64::NAN, f64::max)
    }
}

/// Not numbers, both, when there are no values.
struct Spread {
    median: f64,
    highest: f64,
}

impl Spread {
    fn of(values: Vec<f64>) -> Self {
        Self { highest: values.iter().copied().fold(f64::NAN, f64::max), median: median(values) }
    }
}

impl Report {
    /// Takes the rows in the order in which they are to be shown.
    pub(crate) fn new(rows: Vec<Row>, schedule: Schedule) -> Self {
        Self { schedule, rows }
    }

    /// Whether no round failed.
    pub(crate) fn is_valid(&self) -> bool {
        self.rows.iter().all(|row| row.problems.is_empty())
    }

    /// For people: a table, and anything that went wrong.
    pub(crate) fn text(&self) -> String {
        let headings = [
            "system",
            "agents",
            "all see all s",
            "worst",
            "kill known s",
            "worst",
            "B/s",
            "CPU ms/s",
            "RSS MiB",
            "max",
            "poll gap ms",
            "other CPU",
            "",
        ];
        let mut table = Table::new(&headings);
        for row in &self.rows {
            table.push(cells(row));
        }
        let Schedule { rounds, rest_seconds, kills } = self.schedule;
        let mut text = format!(
            "{rest_seconds} s at rest and {kills} kills a round, polled every {} ms; medians over rounds: \
             {rounds}\n\n{table}\n",
            POLL_INTERVAL.as_millis()
        );
        let mut versions: Vec<String> =
            self.rows.iter().map(|row| format!("{}: {}\n", row.name, row.version)).collect();
        versions.sort();
        versions.dedup();
        text += &versions.concat();
        for row in &self.rows {
            for problem in &row.problems {
                text += &format!("INVALID: {} with {} agents: {problem}\n", row.name, row.nodes);
            }
        }
        text
    }

    /// For programs: the same, and each round.
    pub(crate) fn json(&self) -> Value {
        let Schedule { rounds, rest_seconds, kills } = self.schedule;
        json!({
            "rounds": rounds,
            "rest_seconds": rest_seconds,
            "kills": kills,
            "poll_interval_ms": POLL_INTERVAL.as_millis() as u64,
            "rows": self.rows.iter().map(row_json).collect::<Vec<_>>(),
        })
    }
}

fn cells(row: &Row) -> Vec<String> {
    let two = |spread: Spread, digits| [number(spread.median, digits), number(spread.highest, digits)];
    let mut cells = vec![row.name.to_owned(), row.nodes.to_string()];
    cells.extend(two(row.converged_s(), 2));
    cells.extend(two(row.kills_s(), 2));
    cells.push(number(row.median(|sample| sample.bytes_per_second), 0));
    cells.push(number(row.median(|sample| sample.cpu_ms_per_second), 2));
    cells.extend(two(row.resident_mib(), 1));
    cells.push(number(row.gap_s() * 1000.0, 0));
    cells.push(number(row.median(|sample| sample.elsewhere) * 100.0, 0) + " %");
    cells.push(if row.problems.is_empty() { String::new() } else { "INVALID".to_owned() });
    cells
}

fn number(value: f64, digits: usize) -> String {
    if value.is_nan() { "-".to_owned() } else { format!("{value:.digits$}") }
}

fn row_json(row: &Row) -> Value {
    let round = |sample: &Sample| {
        let resident = Spread::of(sample.resident_mib.clone());
        json!({
            "converged_s": sample.converged_s,
            "kills_s": sample.kills_s,
            "bytes_per_second": sample.bytes_per_second,
            "cpu_ms_per_second": sample.cpu_ms_per_second,
            "rss_mib": resident.median,
            "rss_mib_max": resident.highest,
            "poll_gap_s": sample.gap_s,
            "other_cpu": sample.elsewhere,
        })
    };
    let (converged, kills, resident) = (row.converged_s(), row.kills_s(), row.resident_mib());
    json!({
        "system": row.name,
        "version": row.version,
        "agents": row.nodes,
        "valid": row.problems.is_empty(),
        "converged_s": converged.median,
        "converged_worst_s": converged.highest,
        "kill_known_s": kills.median,
        "kill_known_worst_s": kills.highest,
        "bytes_per_second": row.median(|sample| sample.bytes_per_second),
        "cpu_ms_per_second": row.median(|sample| sample.cpu_ms_per_second),
        "rss_mib": resident.median,
        "rss_mib_max": resident.highest,
        "poll_gap_s": row.gap_s(),
        "other_cpu": row.median(|sample| sample.elsewhere),
        "problems": row.problems,
        "rounds": row.samples.iter().map(round).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, kills_s: &[&[f64]], problems: &[&str]) -> Row {
        let sample = |kills_s: &&[f64]| Sample {
            converged_s: kills_s[0] / 2.0,
            kills_s: kills_s.to_vec(),
            bytes_per_second: 100.0,
            cpu_ms_per_second: 1.5,
            resident_mib: vec![10.0, 12.0, 20.0],
            elsewhere: 0.25,
            gap_s: 0.06,
        };
        Row {
            name,
            version: format!("{name} 1"),
            nodes: 20,
            samples: kills_s.iter().map(sample).collect(),
            problems: problems.iter().map(|problem| (*problem).to_owned()).collect(),
        }
    }

    fn report(rows: Vec<Row>) -> Report {
        Report::new(rows, Schedule { rounds: 2, rest_seconds: 30, kills: 3 })
    }

    #[test]
    fn kills_of_all_rounds_count_alike() {
        let report = report(vec![row("ours", &[&[2.0, 9.0, 4.0], &[6.0, 1.0]], &[]), row("peer", &[&[2.0]], &[])]);
        let rows = &report.json()["rows"];
        assert_eq!([&rows[0]["kill_known_s"], &rows[0]["kill_known_worst_s"]], [&json!(4.0), &json!(9.0)]);
        assert_eq!([&rows[0]["converged_s"], &rows[0]["converged_worst_s"]], [&json!(2.0), &json!(3.0)]);
        assert_eq!([&rows[0]["rss_mib"], &rows[0]["rss_mib_max"]], [&json!(12.0), &json!(20.0)]);
        assert_eq!(rows[0]["rounds"][1]["kills_s"], json!([6.0, 1.0]));
        assert!(report.is_valid() && !report.text().contains("INVALID"));
        assert_eq!(report.text().matches("ours: ours 1").count(), 1);
    }

    #[test]
    fn a_failed_round_spoils_its_row_only() {
        let report = report(vec![row("ours", &[], &["round 1: not within 120 s"]), row("peer", &[&[2.0]], &[])]);
        let (text, json) = (report.text(), report.json());
        assert!(!report.is_valid());
        assert_eq!([&json["rows"][0]["valid"], &json["rows"][1]["valid"]], [&json!(false), &json!(true)]);
        assert_eq!(json["rows"][0]["kill_known_s"], Value::Null);
        assert!(text.contains("INVALID: ours with 20 agents: round 1: not within 120 s"), "{text}");
        assert!(!text.contains("NaN"), "{text}");
    }
}
