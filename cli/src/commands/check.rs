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

fn problems(text: &str) -> Vec<Diagnostic> {
    let (config, found) = config::read::<Config>(text);
    let Some(config) = config else { return found };
    located(text, config.problems())
}

/// Problems of a file that parses, with their lines.
pub(crate) fn located(text: &str, problems: Vec<(String, String)>) -> Vec<Diagnostic> {
    problems
        .into_iter()
        .map(|(key, what)| Diagnostic { line: config::line_of(text, &key), problem: format!("{key}: {what}") })
        .collect()
}

/// `file:line: problem`, one a line.
pub(crate) fn render(file: &Path, problems: &[Diagnostic]) -> String {
    let line = |p: &Diagnostic| match p.line {
        0 => format!("{}: {}", file.display(), p.problem),
        line => format!("{}:{line}: {}", file.display(), p.problem),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}
