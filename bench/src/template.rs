//! Configuration files with `{{name}}` where the bench puts what it has found free, or made.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Writes `template`, with the values in place of their names, to a file in `dir`; gives its path.
pub(crate) fn write(dir: &Path, file: &str, template: &str, values: &[(&str, &dyn ToString)]) -> Result<PathBuf> {
    let text = fill(template, values).with_context(|| format!("fill {file}"))?;
    let path = dir.join(file);
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// The text with the values in place of their names.
pub(crate) fn fill(template: &str, values: &[(&str, &dyn ToString)]) -> Result<String> {
    let put = |text: String, (name, value): &(&str, &dyn ToString)| {
        text.replace(&format!("{{{{{name}}}}}"), &value.to_string())
    };
    let text = values.iter().fold(template.to_owned(), put);
    let unfilled = text.split_once("{{").map(|(_, rest)| rest.split("}}").next().unwrap_or_default());
    ensure!(unfilled.is_none(), "nothing to put for {}", unfilled.unwrap_or_default());
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_gets_its_value_or_is_an_error() {
        assert_eq!(fill("{{a}}:{{b}} {{a}}", &[("a", &1), ("b", &"x")]).unwrap(), "1:x 1");
        assert!(fill("{{a}} {{c}}", &[("a", &1)]).unwrap_err().to_string().ends_with(" c"));
    }
}
