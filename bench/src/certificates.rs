//! A throwaway CA, and what it signed for the peers.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::process;

const OPENSSL: &str = include_str!("../openssl.cnf");

/// A directory with `NAME.pem` and `NAME.key`, P-256, for the `ca`, the sides `a` and `b` of a pair, and the public `edge`.
pub(crate) struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    /// Makes all of them in a new directory in `scratch`.
    pub(crate) fn make(scratch: &Path) -> Result<Self> {
        let openssl = process::require("openssl", "apt-get install -y openssl")?;
        let dir = scratch.join("certificates");
        std::fs::create_dir(&dir)?;
        std::fs::write(dir.join("openssl.cnf"), OPENSSL).context("write openssl.cnf")?;
        for name in ["ca", "a", "b", "edge"] {
            let mut command = process::bound(&openssl);
            command
                .current_dir(&dir)
                .args(["req", "-x509", "-config", "openssl.cnf", "-extensions", name, "-days", "2", "-nodes"])
                .args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", &format!("/CN={name}")])
                .args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.pem")]);
            if name != "ca" {
                command.args(["-CA", "ca.pem", "-CAkey", "ca.key"]);
            }
            process::run("openssl req (OpenSSL 3 or later)", &mut command)?;
        }
        Ok(Self { dir })
    }

    /// The directory, for a template.
    pub(crate) fn dir(&self) -> String {
        self.dir.display().to_string()
    }

    /// A certificate with its key below it, as HAProxy wants them.
    pub(crate) fn both(&self, name: &str) -> Result<String> {
        let part = |ending: &str| std::fs::read_to_string(self.dir.join(format!("{name}.{ending}")));
        Ok(part("pem")? + &part("key")?)
    }
}
