//! `starling check`

use std::path::Path;

use starling_node::config::{self, Config, Diagnostic};

use crate::{Failure, args::CheckArgs};

pub(crate) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let text = super::node::read_file(&args.file)?;
    let mut problems = problems(&text);
    problems.sort_by_key(|p| p.line);
    if problems.is_empty() {
        println!("{}: ok", args.file.display());
        return Ok(());
    }
    eprintln!("{}", render(&args.file, &problems));
    Err(Failure::check())
}

/// An edge's file is told from a node's by its public sections.
fn problems(text: &str) -> Vec<Diagnostic> {
    if text.lines().any(|line| line.trim_start().starts_with("[edge]")) {
        return match starling_edge::read_config(text) {
            (Some((_, sections)), _) => starling_edge::doubts(text, &sections),
            (None, problems) => problems,
        };
    }
    match config::read::<Config>(text) {
        (Some(config), _) => {
            let located = |(key, what): (String, String)| Diagnostic {
                line: config::line_of(text, &key),
                problem: format!("{key}: {what}"),
            };
            config.problems().into_iter().map(located).collect()
        }
        (None, found) => found,
    }
}

/// `file:line: problem`, one a line.
pub(crate) fn render(file: &Path, problems: &[Diagnostic]) -> String {
    let line = |p: &Diagnostic| match p.line {
        0 => format!("{}: {}", file.display(), p.problem),
        line => format!("{}:{line}: {}", file.display(), p.problem),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}
