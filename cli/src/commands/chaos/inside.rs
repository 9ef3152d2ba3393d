//! The lab's own process: in namespaces of its own, so that whatever becomes of it, nothing of it stays in the system.
//!
//! `unshare` makes them (network, mounts, process ids; and, for other users than root, users). The process outside waits, and
//! passes on that it was told to stop; when it is killed, the pipe between them breaks, and the one inside stops as well.

use std::{process::Stdio, sync::LazyLock};

use tokio::{
    process::Command,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use crate::Failure;

const INSIDE: &str = "STARLING_CHAOS_INSIDE";

/// Whether this process is the one inside.
pub(super) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    command.kill_on_drop(true);
    command
}

/// Whether it can be had here.
///
/// # Errors
/// Why not, and what to do.
pub(super) async fn check() -> Result<(), String> {
    if is_inside() {
        return Ok(());
    }
    let binary = std::env::current_exe().map_err(|e| e.to_string())?;
    let output = unshare().arg(binary).args(["chaos", "lab-check"]).env(INSIDE, "1").output().await;
    let output = output.map_err(|e| format!("cannot run `unshare` ({e}); install util-linux"))?;
    if output.status.success() {
        return Ok(());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    let error = error.trim().trim_start_matches("error: ").to_string();
    let what = match rustix::process::geteuid().is_root() {
        true => "the container or sandbox around forbids it",
        false => {
            "run as root, or allow it: sysctl kernel.unprivileged_userns_clone=1, sysctl \
             kernel.apparmor_restrict_unprivileged_userns=0, chmod 666 /dev/net/tun"
        }
    };
    Err(format!("{error}; {what}"))
}

/// Does this command again, inside.
pub(super) async fn again() -> Result<(), Failure> {
    let mut child = unshare()
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .stdin(Stdio::piped())
        // A Ctrl-C at the terminal is for the process outside, which passes it on.
        .process_group(0)
        .spawn()?;
    let mut pipe = child.stdin.take();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            // The end of the pipe is the word.
            _ = interrupt.recv() => drop(pipe.take()),
            _ = terminate.recv() => drop(pipe.take()),
        }
    };
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => Err(Failure::coded(u8::try_from(code).unwrap_or(1), "")),
        None => Err(Failure::coded(2, format!("the lab has ended early: {status}"))),
    }
}

/// Cancelled when somebody wants the run to stop.
pub(super) fn stop() -> CancellationToken {
    static STOP: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);
    let stop = STOP.clone();
    let told = stop.clone();
    if is_inside() {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            told.cancel();
        });
        return stop;
    }
    tokio::spawn(async move {
        let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            return;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        eprintln!("stopping: healing and cleaning up; the report will say that it is not whole");
        told.cancel();
    });
    stop
}
