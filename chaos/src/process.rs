use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
};

/// A child process that dies with its owner, and whose output is kept in a file.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    access: PathBuf,
}

impl Process {
    /// Starts `program`. Its stderr goes to `log`, its stdout beside it with the ending `.out`.
    pub fn start<S: AsRef<OsStr>>(program: &Path, args: impl IntoIterator<Item = S>, log: &Path) -> Result<Self> {
        Self::spawn(program, args, log, Stdio::null())
    }

    /// The same, and it can be [told](Process::tell) things.
    pub(crate) fn start_listening<S: AsRef<OsStr>>(
        program: &Path,
        args: impl IntoIterator<Item = S>,
        log: &Path,
    ) -> Result<Self> {
        Self::spawn(program, args, log, Stdio::piped())
    }

    fn spawn<S: AsRef<OsStr>>(
        program: &Path,
        args: impl IntoIterator<Item = S>,
        log: &Path,
        input: Stdio,
    ) -> Result<Self> {
        let open = |path: &Path| std::fs::File::options().create(true).append(true).open(path);
        let access = log.with_extension("out");
        let child = Command::new(program)
            .args(args)
            .env("STARLING_EXIT_WITH_PARENT", "parent")
            .stdin(input)
            .stdout(open(&access)?)
            .stderr(open(log)?)
            // A Ctrl-C at the terminal is for the parent, which has things to do with its children before they end.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, log: log.to_path_buf(), access })
    }

    /// Process id; `None` once it has ended and was waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.context("kill")
    }

    /// Sends a signal by its name: `TERM`, `INT`, `HUP`, `STOP` or `CONT`.
    pub async fn signal(&self, name: &str) -> Result<()> {
        let signal = match name {
            "TERM" => Signal::TERM,
            "INT" => Signal::INT,
            "HUP" => Signal::HUP,
            "STOP" => Signal::STOP,
            "CONT" => Signal::CONT,
            other => bail!("no signal {other}"),
        };
        let pid = self.pid().context("the process has ended")?;
        send(pid, signal)
    }

    /// Writes a line to its stdin.
    pub(crate) async fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("nobody listens")?;
        stdin.write_all(format!("{line}\n").as_bytes()).await.context("the process does not listen any more")
    }

    /// Waits for its end, at most `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        Ok(tokio::time::timeout(limit, self.child.wait()).await.context("still running")??)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// How it has ended; `None` while it runs.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// What it wrote to stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What it wrote to stdout.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.access).unwrap_or_default()
    }
}

/// Sends a signal to a process of ours.
pub(crate) fn send(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process id")?;
    kill_process(pid, signal).with_context(|| format!("signal {signal:?} to {pid:?}"))
}

impl Drop for Process {
    /// Kills, and waits a moment for the end: whoever removes the directory next should find nobody writing into it.
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        for _ in 0..200 {
            if !self.is_running() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs a short command of the binary to its end: status, stdout, stderr.
pub async fn starling<S: AsRef<OsStr>>(
    binary: &Path,
    args: impl IntoIterator<Item = S>,
) -> Result<(ExitStatus, String, String)> {
    let output = Command::new(binary).args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(60), output)
        .await
        .context("the command does not end")?
        .with_context(|| format!("cannot run {}", binary.display()))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status, text(output.stdout), text(output.stderr)))
}
