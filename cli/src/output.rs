//! Tables and JSON on stdout.

use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

/// Prints one JSON document; on one line if more follow.
pub(crate) fn json(value: &impl Serialize, one_line: bool) -> Result<(), crate::Failure> {
    let text = if one_line { serde_json::to_string(value)? } else { serde_json::to_string_pretty(value)? };
    println!("{text}");
    Ok(())
}

/// Prints a table without borders.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for line in table.to_string().lines() {
        println!("{}", line.trim_end());
    }
}
