//! Who is hit: a role, filled from the seed at the moment of injection.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How many of which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Victims {
    /// How many; `None` for all of them.
    pub count: Option<usize>,
    /// Of which.
    pub role: Role,
}

/// What a victim is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Any node that is no edge.
    Any,
    /// Any node that serves nothing and is not a seed.
    Idle,
    /// Half of all nodes, rounded down.
    Half,
    /// All nodes but that many.
    AllBut(usize),
    /// An edge.
    Edge,
    /// A node that may admit others.
    Issuer,
    /// A node that others start from.
    Seed,
    /// A node that serves the service.
    Instance(String),
    /// That node.
    Named(String),
    /// Nobody of the mesh: those who call edges from outside. Only their links can be hit.
    Clients,
}

/// What clients from outside are called among victims.
pub const CLIENTS: &str = "clients";

const HINT: &str = "such as `any 2`, `half`, `all`, `all but 2`, `an edge`, `an issuer`, `all seeds`, `an instance of orders`, \
                    `2 instances of orders`, `node n3`, `the clients`";

impl FromStr for Victims {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let number = |word: &str| word.parse::<usize>().ok().filter(|n| *n > 0);
        let some = |count, role| Ok(Self { count: Some(count), role });
        let all = |role| Ok(Self { count: None, role });
        match words[..] {
            ["all"] => all(Role::Any),
            ["half"] => all(Role::Half),
            ["all", "but", n] if number(n).is_some() => all(Role::AllBut(number(n).unwrap_or(1))),
            ["any"] => some(1, Role::Any),
            ["any", n] if number(n).is_some() => some(number(n).unwrap_or(1), Role::Any),
            ["idle"] => some(1, Role::Idle),
            ["a" | "an" | "the", "edge"] => some(1, Role::Edge),
            ["a" | "an" | "the", "issuer"] => some(1, Role::Issuer),
            ["a" | "an" | "the", "seed"] => some(1, Role::Seed),
            ["all", "edges"] => all(Role::Edge),
            ["all", "issuers"] => all(Role::Issuer),
            ["all", "seeds"] => all(Role::Seed),
            ["an", "instance", "of", service] => some(1, Role::Instance(service.into())),
            ["all", "instances", "of", service] => all(Role::Instance(service.into())),
            [n, "instances", "of", service] if number(n).is_some() => {
                some(number(n).unwrap_or(1), Role::Instance(service.into()))
            }
            ["the", "clients"] => some(1, Role::Clients),
            ["node", name] => some(1, Role::Named(name.into())),
            _ => Err(format!("{text:?} names no victims; write {HINT}")),
        }
    }
}

impl TryFrom<String> for Victims {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Victims> for String {
    fn from(victims: Victims) -> Self {
        victims.to_string()
    }
}

impl fmt::Display for Victims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.role, self.count) {
            (Role::Any, None) => f.write_str("all"),
            (Role::Any, Some(n)) => write!(f, "any {n}"),
            (Role::Idle, _) => f.write_str("idle"),
            (Role::Half, _) => f.write_str("half"),
            (Role::AllBut(n), _) => write!(f, "all but {n}"),
            (Role::Edge, None) => f.write_str("all edges"),
            (Role::Edge, _) => f.write_str("an edge"),
            (Role::Issuer, None) => f.write_str("all issuers"),
            (Role::Issuer, _) => f.write_str("an issuer"),
            (Role::Seed, None) => f.write_str("all seeds"),
            (Role::Seed, _) => f.write_str("a seed"),
            (Role::Instance(service), None) => write!(f, "all instances of {service}"),
            (Role::Instance(service), Some(1)) => write!(f, "an instance of {service}"),
            (Role::Instance(service), Some(n)) => write!(f, "{n} instances of {service}"),
            (Role::Named(name), _) => write!(f, "node {name}"),
            (Role::Clients, _) => write!(f, "the {CLIENTS}"),
        }
    }
}
