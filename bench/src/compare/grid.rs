//! A table with a column for each target, and what it holds for each round.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::measurement::{Measured, Sample};
use crate::report::median;
use crate::table::Table;
use crate::target::Target;

/// Lines of figures, a column for each target. The first target is ours.
pub(super) struct Grid {
    title: String,
    columns: Vec<String>,
    /// Whether the columns after the first are peers that the first is compared with.
    compares: bool,
    lines: Vec<Line>,
    /// The shares of the machine that went to others while the samples were taken.
    elsewhere: Vec<f64>,
    notes: Vec<String>,
}

/// One figure of all targets.
struct Line {
    what: &'static str,
    cells: Vec<Cell>,
}

/// One figure of one target.
#[derive(Clone, Debug, Default)]
pub(super) struct Cell {
    /// A value for each round.
    values: Vec<f64>,
    /// What went wrong; with any, the values are not to be trusted.
    problems: Vec<String>,
}

impl Cell {
    /// The values of rounds in which nothing went wrong.
    pub(super) fn of(values: Vec<f64>) -> Self {
        Self { values, problems: Vec::new() }
    }

    fn median(&self) -> Option<f64> {
        (self.problems.is_empty() && !self.values.is_empty()).then(|| median(self.values.clone()))
    }

    /// The median of the rounds' ratios, so that a slow spell of the machine, which meets both, falls out.
    fn ratio(&self, to: &Self) -> Option<f64> {
        self.median().and(to.median())?;
        Some(median(self.values.iter().zip(&to.values).map(|(ours, theirs)| ours / theirs).collect()))
    }
}

impl Grid {
    /// A table of peers, with the ratios of ours to each.
    pub(super) fn of_peers(title: impl Into<String>, targets: &[Target]) -> Self {
        let columns = targets.iter().map(|target| target.name.to_owned()).collect();
        let notes = targets.iter().map(|target| format!("{}: {}", target.name, target.version)).collect();
        Self { title: title.into(), columns, compares: true, lines: Vec::new(), elsewhere: Vec::new(), notes }
    }

    /// A table of ours alone in several cases.
    pub(super) fn of_cases(title: impl Into<String>, columns: Vec<String>) -> Self {
        Self {
            title: title.into(),
            columns,
            compares: false,
            lines: Vec::new(),
            elsewhere: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds a line with a cell for each column.
    pub(super) fn push(&mut self, what: &'static str, cells: Vec<Cell>) {
        assert_eq!(cells.len(), self.columns.len(), "a cell for each column");
        self.lines.push(Line { what, cells });
    }

    /// Adds a line of what each sample holds.
    pub(super) fn push_measured(&mut self, what: &'static str, measured: &[Measured], of: impl Fn(&Sample) -> f64) {
        let cell = |measured: &Measured| Cell {
            values: measured.samples.iter().map(&of).collect(),
            problems: measured.problems.clone(),
        };
        self.elsewhere.extend(measured.iter().flat_map(|measured| &measured.samples).map(|sample| sample.elsewhere));
        self.push(what, measured.iter().map(cell).collect());
    }

    /// Whether nothing went wrong.
    pub(super) fn is_valid(&self) -> bool {
        self.lines.iter().flat_map(|line| &line.cells).all(|cell| cell.problems.is_empty())
    }

    /// The median of a figure of a target, if there is one that is to be trusted.
    pub(super) fn median(&self, what: &str, column: &str) -> Option<f64> {
        self.cell(what, column)?.median()
    }

    /// The ratio of ours to that of a peer.
    pub(super) fn ratio(&self, what: &str, peer: &str) -> Option<f64> {
        self.line(what)?.cells[0].ratio(self.cell(what, peer)?)
    }

    /// The ratios of ours to those of all peers that have a figure to be trusted.
    pub(super) fn ratios(&self, what: &str) -> Vec<f64> {
        let Some(Line { cells, .. }) = self.line(what) else { return Vec::new() };
        cells.iter().skip(1).filter_map(|theirs| cells[0].ratio(theirs)).collect()
    }

    /// The lowest median of a figure among the peers.
    pub(super) fn lowest_of_peers(&self, what: &str) -> Option<f64> {
        let medians = self.line(what)?.cells.iter().skip(1).filter_map(Cell::median);
        medians.min_by(f64::total_cmp)
    }

    fn line(&self, what: &str) -> Option<&Line> {
        self.lines.iter().find(|line| line.what == what)
    }

    fn cell(&self, what: &str, column: &str) -> Option<&Cell> {
        let index = self.columns.iter().position(|name| name == column)?;
        self.line(what).map(|line| &line.cells[index])
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let peers: &[String] = if self.compares { &self.columns[1..] } else { &[] };
        let mut headings = vec![self.title.clone()];
        headings.extend(self.columns.iter().cloned());
        headings.extend(peers.iter().map(|peer| format!("/ {peer}")));
        let mut table = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
        for line in &self.lines {
            let mut cells = vec![line.what.to_owned()];
            cells.extend(line.cells.iter().map(|cell| {
                if cell.problems.is_empty() { cell.median().map_or_else(dash, number) } else { "INVALID".to_owned() }
            }));
            let ratio = |cell: &Cell| line.cells[0].ratio(cell).map_or_else(dash, |ratio| format!("{ratio:.2}"));
            cells.extend(line.cells[1..].iter().take(peers.len()).map(ratio));
            table.push(cells);
        }
        let mut text = table.to_string();
        // One thing that went wrong spoils several lines.
        let mut told = BTreeSet::new();
        for line in &self.lines {
            for (column, cell) in self.columns.iter().zip(&line.cells) {
                for problem in cell.problems.iter().filter(|problem| told.insert((column, *problem))) {
                    text += &format!("INVALID: {column}: {problem}\n");
                }
            }
        }
        if let Some(highest) = self.elsewhere.iter().copied().reduce(f64::max) {
            let usual = median(self.elsewhere.clone());
            text += &format!("other CPU: {:.0} % as a rule, {:.0} % at most\n", usual * 100.0, highest * 100.0);
        }
        for note in &self.notes {
            text += &format!("{note}\n");
        }
        text
    }

    /// For programs: the same, and every round.
    pub(super) fn json(&self) -> Value {
        let line = |line: &Line| {
            let cell = |(column, cell): (&String, &Cell)| {
                json!({
                    "target": column,
                    "median": cell.median(),
                    "ratio": self.compares.then(|| line.cells[0].ratio(cell)).flatten(),
                    "rounds": cell.values,
                    "problems": cell.problems,
                })
            };
            json!({"what": line.what, "targets": self.columns.iter().zip(&line.cells).map(cell).collect::<Vec<_>>()})
        };
        json!({"title": self.title, "lines": self.lines.iter().map(line).collect::<Vec<_>>(), "other_cpu": self.elsewhere, "notes": self.notes})
    }
}

/// A number with three digits that mean something.
pub(super) fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    if value.is_nan() { dash() } else { format!("{value:.digits$}") }
}

/// What stands where there is no number.
pub(super) fn dash() -> String {
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(theirs: Cell) -> Grid {
        let mut grid = Grid::of_cases("t", vec!["ours".to_owned(), "peer".to_owned()]);
        grid.compares = true;
        grid.push("cpu", vec![Cell::of(vec![5.0, 10.0, 20.0]), theirs]);
        grid
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let grid = grid(Cell::of(vec![10.0, 40.0, 50.0]));
        // The ratio of the medians would be 0.25, as that of the second round is.
        assert_eq!(grid.ratio("cpu", "peer"), Some(0.4));
        assert_eq!((grid.ratios("cpu"), grid.ratios("rate")), (vec![0.4], vec![]));
        assert_eq!(grid.median("cpu", "ours"), Some(10.0));
        assert_eq!(grid.lowest_of_peers("cpu"), Some(40.0));
        assert_eq!(grid.text(), "t    ours  peer  / peer\ncpu  10.0  40.0    0.40\n");
        assert_eq!(grid.json()["lines"][0]["targets"][1]["ratio"], json!(0.4));
    }

    #[test]
    fn a_problem_spoils_its_cell_and_the_ratio() {
        let grid = grid(Cell { values: vec![1.0], problems: vec!["round 1: timeout".to_owned()] });
        assert!(!grid.is_valid());
        assert_eq!(
            (grid.median("cpu", "peer"), grid.ratio("cpu", "peer"), grid.lowest_of_peers("cpu")),
            (None, None, None)
        );
        let text = grid.text();
        assert!(text.contains("INVALID: peer: round 1: timeout") && !text.contains("1.00"), "{text}");
    }

    #[test]
    fn numbers_keep_three_digits() {
        for (value, expected) in [(0.123, "0.12"), (45.67, "45.7"), (14_400.4, "14400"), (f64::NAN, "-")] {
            assert_eq!(number(value), expected);
        }
    }
}
