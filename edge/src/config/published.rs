//! What edges can have in common: routes, plans, versions and the issuer of tokens, published as one mesh document.

use serde::Deserialize;
use starling_node::config::{self, Diagnostic};

use super::{EdgeSections, Jwks, Jwt, Plan, Route, Version, check, located};

/// What is published: the same sections as in an edge's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Published {
    #[serde(default)]
    route: Vec<Route>,
    #[serde(default)]
    version: Vec<Version>,
    #[serde(default)]
    plan: Vec<Plan>,
    jwt: Option<Jwt>,
}

impl Published {
    const TABLES: [&str; 4] = ["route", "version", "plan", "jwt"];

    /// Reads a document, and checks it.
    ///
    /// # Errors
    /// All that is wrong with it, in words: it is not acted upon then.
    pub(crate) fn read(content: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(content).map_err(|_| "it is not UTF-8")?;
        let (published, mut problems) = config::read::<Self>(text);
        problems.extend(published.iter().flat_map(|published| located(text, published.problems())));
        match published {
            Some(published) if problems.is_empty() => Ok(published),
            _ => {
                let lines = problems.iter().map(|p| format!("line {}: {}", p.line, p.problem));
                Err(lines.collect::<Vec<_>>().join("; "))
            }
        }
    }

    /// In place of what an edge's own file has, which is nothing.
    pub(crate) fn fill(&self, own: &EdgeSections) -> EdgeSections {
        EdgeSections {
            route: self.route.clone(),
            version: self.version.clone(),
            plan: self.plan.clone(),
            jwt: self.jwt.clone(),
            ..own.clone()
        }
    }

    fn problems(&self) -> Vec<(String, String)> {
        let mut problems = check::common(&self.route, &self.version, &self.plan, self.jwt.as_ref());
        if let Some(jwt) = &self.jwt {
            let why = "a file is on one machine only, and this is for all edges";
            if let Jwks::File(_) = jwt.jwks {
                problems.push(("jwt.jwks".into(), format!("{why}: give the issuer's https:// URL")));
            }
            if jwt.ca.is_some() {
                problems.push(("jwt.ca".into(), format!("{why}: leave it out")));
            }
        }
        problems
    }
}

/// The document that has what edges can have in common of a file, which may have more.
///
/// # Errors
/// All that is wrong with these parts, with lines.
pub fn published(text: &str) -> Result<String, Vec<Diagnostic>> {
    let (sections, mut problems) = config::read_part::<Published>(text, |name| Published::TABLES.contains(&name));
    problems.extend(sections.iter().flat_map(|sections| located(text, sections.problems())));
    let whole = |why: String| vec![Diagnostic { line: 0, problem: why }];
    if sections.is_none() || !problems.is_empty() {
        return Err(problems);
    }
    let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| whole(e.message().to_owned()))?;
    table.retain(|name, _| Published::TABLES.contains(&name));
    toml::to_string(&table).map_err(|e| whole(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
[node]
name = "edge-1"
[edge]
listen = "0.0.0.0:443"
[[certificate]]
hosts = ["a.example"]
acme = {}
[[plan]]
name = "p"
quota = ["10/day", "100/7d"]
[[route]]
path = "/orders"
service = "orders"
auth = []
plan = "p"
[[version]]
route = "/orders"
from = ["path"]
versions = "mesh"
"#;

    #[test]
    fn what_is_published_of_a_file_is_read_by_edges() {
        let document = published(FILE).unwrap();
        assert!(!document.contains("edge-1") && !document.contains("certificate"), "{document}");
        let read = Published::read(document.as_bytes()).unwrap();
        assert_eq!((read.route.len(), read.plan.len(), read.version.len()), (1, 1, 1));
        assert_eq!(published(&document).unwrap(), document);
    }

    #[test]
    fn what_cannot_be_published_says_where() {
        for (more, key, line) in [
            ("[[route]]\npath = \"/x\"\nservice = \"s\"\nauth = []\nplan = \"q\"", "route[1].plan", 25),
            ("[[route]]\npath = \"/x\"\nservice = \"s\"", "auth", 21),
            (
                "[jwt]\nissuer = \"i\"\naudience = [\"a\"]\njwks = \"/etc/keys.json\"\nalgorithms = [\"ES256\"]",
                "jwt.jwks",
                24,
            ),
            ("[[plan]]\nname = \"r\"\nrat = \"1/s\"", "rat", 23),
        ] {
            let problems = published(&format!("{FILE}{more}")).unwrap_err();
            let found = problems.iter().find(|p| p.problem.contains(key)).unwrap_or_else(|| panic!("{problems:?}"));
            assert_eq!(found.line, line, "{found:?}");
        }
        for bad in [&b"\xff"[..], b"[[route]]", b"later = 1", b"[edge]\nlisten = \"1.1.1.1:1\""] {
            assert!(Published::read(bad).is_err(), "{bad:?}");
        }
    }
}
