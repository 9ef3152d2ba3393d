//! `starling chaos` as people use it: plans, verdicts, reports, interruptions.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use starling_chaos::wait_for;
use starling_tests::{binary, chaos, skip};
use tokio::process::{Child, Command};

const LIMIT: Duration = Duration::from_secs(120);

/// Short, with a fault of a process and one of the network.
const SHORT: &str = r#"
about = "Short."

[mesh]
nodes = 3
services = [{ name = "orders", instances = 2 }]

[load]
rate = 60
calm = "2s"

[[step]]
name = "one is cut off"
hold = "4s"
faults = [{ partition = { victims = "an instance of orders" } }]

[[step]]
name = "one dies"
hold = "3s"
faults = [{ kill = { victims = "an instance of orders" } }]
"#;

fn plan_in(dir: &Path, text: &str) -> String {
    let path = dir.join("short.toml");
    std::fs::write(&path, text).unwrap();
    path.to_string_lossy().into_owned()
}

fn results(report: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(report.join("results.json")).unwrap()).unwrap()
}

#[tokio::test]
async fn a_bad_plan_is_told_by_line_and_nothing_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [
        ("kill = { victims = \"any 9\" }", ":8: kill: any 9: the mesh has only 3"),
        ("kil = { victims = \"any 1\" }", ":11: unknown variant `kil`"),
        ("kill = { victims = \"any 1\", back = \"1h\" }", ":8: kill: back: must be above 0 and shorter than"),
    ];
    for (fault, expected) in rows {
        let text = format!(
            "about = \"x\"\n\n[mesh]\nnodes = 3\nservices = [{{ name = \"orders\", instances = 2 }}]\n\n\n[[step]]\nname = \"s\"\nhold = \"5s\"\nfaults = [{{ {fault} }}]\n"
        );
        let plan = plan_in(dir.path(), &text);
        for command in ["check", "run"] {
            let (code, _, error) = chaos(dir.path(), &[command, &plan]).await;
            assert_eq!(code, 2, "{command} {fault}: {error}");
            assert!(error.contains(expected), "{command} {fault}: {error}");
        }
    }
    let (code, _, error) = chaos(dir.path(), &["run", "nothing-of-that-name"]).await;
    assert!(code == 2 && error.contains("plans are smoke, kill"), "{code} {error}");
    let (code, _, error) = chaos(dir.path(), &["run", "addresses", "--backend", "sim"]).await;
    assert!(code == 2 && error.contains("the simulation has no processes"), "{code} {error}");
    assert!(!dir.path().join("chaos-report").exists());
}

#[tokio::test]
async fn a_run_holds_and_its_report_can_be_judged_and_compared_again() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan_in(dir.path(), SHORT);
    let (code, out, error) = chaos(dir.path(), &["run", &plan, "--backend", "relay"]).await;
    assert_eq!(code, 0, "{out}{error}");
    assert!(out.contains("held: 2 faults acted"), "{out}");
    let report = dir.path().join("chaos-report/short");
    let said = results(&report);
    assert_eq!(said["valid"], true, "{said}");
    assert!(said["faults"].as_array().unwrap().iter().all(|fault| fault["acted"] == "acted"), "{said}");
    assert!(said["calls"].as_u64().unwrap() > 500, "{said}");
    let page = std::fs::read_to_string(report.join("report.html")).unwrap();
    for part in ["Nodes, as the others show them", "Calls by door", "Slowest answers", "starling chaos run"] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("http://") && !page.contains("https://"), "nothing is loaded from elsewhere");
    let report = report.to_string_lossy();
    let (code, again, _) = chaos(dir.path(), &["judge", &report]).await;
    assert!(code == 0 && again.contains("held: 2 faults acted"), "{again}");
    let (code, same, _) = chaos(dir.path(), &["diff", &report, &report]).await;
    assert!(code == 0 && same.contains("every check came out the same"), "{same}");
    assert_nothing_left(dir.path());
}

#[tokio::test]
async fn the_simulation_replays_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let mut digests = Vec::new();
    for seed in ["7", "7", "8"] {
        let args = ["run", "partition", "--backend", "sim", "--nodes", "30", "--seed", seed];
        let (code, out, error) = chaos(dir.path(), &args).await;
        assert_eq!(code, 0, "{out}{error}");
        let said = results(&dir.path().join("chaos-report/partition"));
        let checks = said["checks"].as_array().unwrap();
        let invariants = checks.iter().find(|check| check["name"] == "no invariant was broken").unwrap();
        digests.push(invariants["detail"].as_str().unwrap().to_string());
    }
    assert_eq!(digests[0], digests[1]);
    assert_ne!(digests[0], digests[2]);
}

#[tokio::test]
async fn a_binary_that_does_not_start_is_told_with_its_last_words() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan_in(dir.path(), SHORT);
    let fake = dir.path().join("fake");
    // It makes the mesh, and then does not run.
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = node ] && echo 'no such luck' >&2 && exit 3\nexec {} \"$@\"\n",
        binary().display()
    );
    std::fs::write(&fake, script).unwrap();
    std::fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let fake = fake.to_string_lossy();
    let (code, _, error) = chaos(dir.path(), &["run", &plan, "--backend", "relay", "--binary", &fake]).await;
    assert!(code == 2 && error.contains("n1 has ended") && error.contains("no such luck"), "{code} {error}");
    assert_nothing_left(dir.path());
}

/// A run that is under way: its first fault is on.
async fn under_way(dir: &Path, backend: &str) -> (Child, PathBuf) {
    let plan = plan_in(dir, &SHORT.replace("hold = \"4s\"", "hold = \"60s\""));
    let mut command = Command::new(binary());
    command.args(["chaos", "run", &plan, "--backend", backend]).current_dir(dir).env("TMPDIR", dir);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn();
    let history = dir.join("chaos-report/short/history.jsonl");
    // What is written comes in blocks; calls under a fault fill one soon.
    wait_for("the fault is on", LIMIT, || async {
        let text = std::fs::read_to_string(&history).map_err(|e| e.to_string())?;
        if text.contains("\"event\":\"inject\"") { Ok(()) } else { Err(format!("{} bytes", text.len())) }
    })
    .await
    .unwrap();
    (child.unwrap(), dir.join("chaos-report/short"))
}

async fn signal(child: &Child, name: &str) {
    let pid = child.id().unwrap().to_string();
    assert!(Command::new("kill").args([name, &pid]).status().await.unwrap().success());
}

/// Command lines of processes that name the directory.
fn processes_of(dir: &Path) -> Vec<String> {
    let dir = dir.to_string_lossy().into_owned();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(&dir)).collect()
}

fn left_in(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("starling-chaos-")).collect()
}

fn assert_nothing_left(dir: &Path) {
    assert_eq!(processes_of(dir), [""; 0]);
    assert!(left_in(dir).is_empty(), "{:?}", left_in(dir));
}

async fn interrupted(backend: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, report) = under_way(dir.path(), backend).await;
    signal(&child, "-INT").await;
    let status = tokio::time::timeout(LIMIT, child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(2));
    let said = results(&report);
    assert_eq!(said["valid"], "unknown", "{}", said["line"]);
    assert!(report.join("report.html").exists());
    assert_nothing_left(dir.path());
}

#[tokio::test]
async fn an_interrupted_run_heals_cleans_up_and_still_reports() {
    interrupted("relay").await;
}

async fn killed(backend: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, _) = under_way(dir.path(), backend).await;
    signal(&child, "-KILL").await;
    child.wait().await.unwrap();
    wait_for("every process has ended with its runner", LIMIT, || async {
        let left = processes_of(dir.path());
        if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
    })
    .await
    .unwrap();
    let left = left_in(dir.path());
    let (code, out, error) = chaos(dir.path(), &["run", "smoke", "--backend", "sim"]).await;
    assert_eq!(code, 0, "{out}{error}");
    assert!(left.iter().all(|path| error.contains(&*path.to_string_lossy())), "{left:?}: {error}");
    assert_nothing_left(dir.path());
}

#[tokio::test]
async fn what_a_killed_runner_leaves_is_removed_by_the_next() {
    killed("relay").await;
}

#[tokio::test]
async fn the_lab_runs_is_interrupted_and_killed_like_the_relay() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan_in(dir.path(), SHORT);
    let (code, out, error) = chaos(dir.path(), &["run", &plan, "--backend", "lab"]).await;
    if code == 2 && error.contains("`--backend relay` needs no privilege") {
        return skip(&format!("no lab here: {error}"));
    }
    assert_eq!(code, 0, "{out}{error}");
    assert!(out.contains("held: 2 faults acted"), "{out}");
    interrupted("lab").await;
    killed("lab").await;
}

/// Plans that a search has found, and that once did not hold.
#[tokio::test]
async fn plans_that_were_found_hold() {
    let dir = tempfile::tempdir().unwrap();
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("../chaos/plans/found");
    for entry in std::fs::read_dir(found).into_iter().flatten().flatten() {
        let plan = entry.path().to_string_lossy().into_owned();
        let (code, out, error) = chaos(dir.path(), &["run", &plan, "--backend", "sim"]).await;
        assert_eq!(code, 0, "{plan}: {out}{error}");
    }
}
