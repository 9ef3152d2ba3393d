//! The plans that ship in the binary.

use super::Plan;

macro_rules! plans {
    ($($name:literal),* $(,)?) => {
        /// Names of the shipped plans.
        pub const NAMES: &[&str] = &[$($name),*];

        /// The file of a shipped plan.
        pub fn shipped(name: &str) -> Option<&'static str> {
            match name {
                $($name => Some(include_str!(concat!("../../plans/", $name, ".toml"))),)*
                _ => None,
            }
        }
    };
}

plans![
    "smoke",
    "kill",
    "partition",
    "flaky-network",
    "rolling-restart",
    "upgrade",
    "slow-neighbours",
    "overload",
    "certificates",
    "hostile-member",
    "addresses",
    "edges",
    "quotas",
    "disk",
    "thundering-herd",
    "versions",
    "soak",
    "everything",
    "self-test",
];

impl Plan {
    /// A shipped plan.
    ///
    /// # Panics
    /// If it cannot be read, which a test excludes.
    pub fn named(name: &str) -> Option<Self> {
        shipped(name).map(|text| Self::parse(text).expect("shipped plans are whole"))
    }
}
