//! Child processes that cannot outlive the bench, and what the kernel says they used.

use std::ffi::OsStr;
use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Lines of a log that an error quotes.
const TAIL_LINES: usize = 15;

/// A running child; killed and reaped on drop.
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program`, with both outputs going to `NAME.log` in `dir`.
    ///
    /// Call it from the main thread only: the kernel kills the child when the *thread* that started it ends.
    pub(crate) fn start<A: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        args: impl IntoIterator<Item = A>,
        dir: &Path,
    ) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let child = bound(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {name} through setpriv (Debian package util-linux)"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// The name given at the start.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// How it ended, or `None` while it runs.
    pub(crate) fn exit(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("wait for {}", self.name))
    }

    /// An error with the end of its log if it has ended.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.exit()? {
            bail!("{} ended with {status}; the end of its log:\n{}", self.name, tail(&self.output()?));
        }
        Ok(())
    }

    /// Everything it has printed so far.
    pub(crate) fn output(&self) -> Result<String> {
        let bytes = std::fs::read(&self.log).with_context(|| format!("read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// User and system time so far, in clock ticks, over all its threads.
    pub(crate) fn cpu_ticks(&self) -> Result<u64> {
        let [user, system, ..] = cpu_fields(&read_proc(&format!("{}/stat", self.child.id()))?)?;
        Ok(user + system)
    }

    /// Asks it to end: SIGTERM. Whether it obeys is seen from [`Process::exit`].
    pub(crate) fn terminate(&self) -> Result<()> {
        self.signal("TERM")
    }

    /// The same as Ctrl-C: SIGINT.
    pub(crate) fn interrupt(&self) -> Result<()> {
        self.signal("INT")
    }

    fn signal(&self, name: &str) -> Result<()> {
        let mut kill = Command::new("sh");
        run("kill", kill.args(["-c", r#"kill -"$1" "$2""#, "sh", name, &self.child.id().to_string()])).map(drop)
    }

    /// What it holds in memory now, and held at most.
    pub(crate) fn memory(&self) -> Result<Memory> {
        Memory::parse(&read_proc(&format!("{}/status", self.child.id()))?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Resident memory of one process, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Memory {
    /// `VmRSS`.
    pub(crate) resident_kib: u64,
    /// `VmHWM`, the highest `VmRSS` so far.
    pub(crate) peak_kib: u64,
}

impl Memory {
    fn parse(status: &str) -> Result<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
            kib.with_context(|| format!("no {name} in /proc/PID/status"))
        };
        Ok(Self { resident_kib: field("VmRSS")?, peak_kib: field("VmHWM")? })
    }
}

/// User and system time, in ticks, of the bench itself and of the children it has waited for.
pub(crate) fn own_cpu_ticks() -> Result<u64> {
    Ok(cpu_fields(&read_proc("self/stat")?)?.iter().sum())
}

/// Busy and total time of the whole machine, in ticks.
pub(crate) fn machine_cpu_ticks() -> Result<(u64, u64)> {
    let stat = read_proc("stat")?;
    let line = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("no cpu line in /proc/stat")?;
    // user nice system idle iowait irq softirq steal; the guest fields after them are already part of user and nice.
    let fields: Vec<u64> = line.split_whitespace().take(8).map_while(|field| field.parse().ok()).collect();
    ensure!(fields.len() == 8, "short cpu line in /proc/stat");
    let total: u64 = fields.iter().sum();
    Ok((total - fields[3] - fields[4], total))
}

/// Clock ticks a second, the unit of the `ticks` above.
pub(crate) fn ticks_per_second() -> Result<f64> {
    let text = run("getconf", Command::new("getconf").arg("CLK_TCK"))?;
    text.trim().parse().with_context(|| format!("getconf CLK_TCK printed {text:?}"))
}

/// Utime, stime, cutime and cstime of a `/proc/PID/stat` line.
fn cpu_fields(stat: &str) -> Result<[u64; 4]> {
    // The command name, field 2, may itself hold blanks and brackets: count from the last bracket.
    let (_, rest) = stat.rsplit_once(')').context("no command name in /proc/PID/stat")?;
    let fields: Vec<u64> = rest.split_whitespace().skip(11).take(4).map_while(|field| field.parse().ok()).collect();
    fields.try_into().ok().context("short /proc/PID/stat")
}

fn read_proc(path: &str) -> Result<String> {
    std::fs::read_to_string(Path::new("/proc").join(path)).with_context(|| format!("read /proc/{path}"))
}

/// A command that the kernel kills when the bench ends, however that happens.
pub(crate) fn bound(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a short command to its end and gives its standard output; its standard error is in the error.
pub(crate) fn run(name: &str, command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    if !output.status.success() {
        bail!("{name} ended with {}:\n{}", output.status, tail(&String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name} printed bytes that are not UTF-8"))
}

/// Where a program is: on `PATH`, or in the system directories that an ordinary user's `PATH` leaves out.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from));
    dirs.map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Where a program is, or an error that names the command that installs it.
pub(crate) fn require(program: &str, install: &str) -> Result<PathBuf> {
    find(program).with_context(|| format!("{program} is not installed: {install}"))
}

/// Asks `ready` again and again until it says yes, for at most `limit`, while all `processes` live.
pub(crate) fn wait_until(
    what: &str,
    limit: Duration,
    processes: &mut [&mut Process],
    mut ready: impl FnMut() -> Result<()>,
) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let Err(last) = ready() else { return Ok(()) };
        for process in processes.iter_mut() {
            process.check_alive().with_context(|| format!("waiting for {what}"))?;
        }
        if Instant::now() >= end {
            let logs: Vec<_> =
                processes.iter().map(|p| Ok(format!("{}:\n{}", p.name, tail(&p.output()?)))).collect::<Result<_>>()?;
            bail!("{what}: not after {} s ({last:#}); the end of the logs:\n{}", limit.as_secs(), logs.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until something listens on that TCP address.
pub(crate) fn wait_for_listener(address: SocketAddr, limit: Duration, process: &mut Process) -> Result<()> {
    let what = format!("{} accepts connections", process.name);
    wait_until(&what, limit, &mut [process], || {
        let patience = Duration::from_secs(5);
        TcpStream::connect_timeout(&address, patience).map(drop).with_context(|| format!("connect to {address}"))
    })
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_fields_survive_any_command_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 11 22 33 44 20 0 1 0 5 6 7";
        assert_eq!(cpu_fields(stat).unwrap(), [11, 22, 33, 44]);
        assert!(cpu_fields("7 (a) S 1 7").is_err());
    }

    #[test]
    fn memory_is_read_from_status() {
        let status = "Name:\tx\nVmPeak:\t  999 kB\nVmHWM:\t  123 kB\nVmRSS:\t   45 kB\n";
        assert_eq!(Memory::parse(status).unwrap(), Memory { resident_kib: 45, peak_kib: 123 });
        assert!(Memory::parse("VmHWM: 1 kB\n").is_err());
    }

    #[test]
    fn a_busy_child_is_seen_and_dies_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let process =
            Process::start("busy", Path::new("/bin/sh"), ["-c", "echo up; while :; do :; done"], dir.path()).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while process.cpu_ticks().unwrap() < 5 {
            assert!(Instant::now() < end, "no CPU time seen");
        }
        assert!(process.memory().unwrap().resident_kib > 0);
        assert_eq!(process.output().unwrap(), "up\n");
        let proc_dir = PathBuf::from(format!("/proc/{}", process.child.id()));
        drop(process);
        assert!(!proc_dir.exists());
    }

    #[test]
    fn an_early_end_quotes_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut process =
            Process::start("brief", Path::new("/bin/sh"), ["-c", "echo no such thing; exit 3"], dir.path()).unwrap();
        let result = wait_until("never", Duration::from_secs(20), &mut [&mut process], || bail!("not yet"));
        let text = format!("{:#}", result.unwrap_err());
        assert!(text.contains("no such thing") && text.contains("exit status: 3"), "{text}");
    }
}
