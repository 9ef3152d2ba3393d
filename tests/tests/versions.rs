//! One mesh of two versions: this one, and the one of the commit that the file `older` beside this package's manifest names.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use starling_chaos::{Cluster, NodeSpec, wait_for};
use starling_protocol::admin::{Document, MemberStatus, Status};
use starling_tests::{binary, call, sample};

const LIMIT: Duration = Duration::from_secs(120);
/// Of issuers whose certificates are renewed while the test waits.
const SHORT_LIVED: &str = "[node]\ncert_ttl = \"30s\"\n";

/// The binary of the older version, built beside this one's; `None` says why there is none.
fn older() -> Option<PathBuf> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let commit = std::fs::read_to_string(package.join("older")).expect("a file that names a commit");
    let commit = commit.trim();
    let built = binary().ancestors().nth(2).expect("a target directory").join("older").join(commit);
    let (source, target) = (built.join("source"), built.join("target"));
    let program = target.join("debug/starling");
    if program.exists() {
        return Some(program);
    }
    let git = |args: &[&str]| {
        let mut git = Command::new("git");
        git.args(args).current_dir(package.join("..")).stderr(Stdio::null());
        git
    };
    let known = git(&["cat-file", "-e", &format!("{commit}^{{commit}}")]).status();
    if !known.is_ok_and(|status| status.success()) {
        // A copy without a history is whole, too: nothing can be installed that would change it.
        eprintln!("skipped: the history of commit {commit} is not at hand");
        return None;
    }
    std::fs::create_dir_all(&source).expect("the directory can be made");
    let archive = built.join("source.tar");
    let written = git(&["archive", "--output", &archive.to_string_lossy(), commit]).status();
    assert!(written.is_ok_and(|status| status.success()), "git archive {commit}");
    let unpacked = Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&source).status();
    assert!(unpacked.is_ok_and(|status| status.success()), "tar -xf {}", archive.display());
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "--package", "starling"]).current_dir(&source);
    let done = build.env("CARGO_TARGET_DIR", &target).status();
    assert!(done.is_ok_and(|status| status.success()), "commit {commit} does not build");
    Some(program)
}

/// A token of that issuer for a node that serves `service`.
async fn token_of(cluster: &Cluster, issuer: &str, service: &str) -> String {
    let (state, seed) = (cluster.node(issuer).state.display().to_string(), cluster.node(issuer).mesh.to_string());
    let args = ["token", "create", "--state", &state, "--seed", &seed, "--service", service];
    cluster.run(&args).await.unwrap().trim().to_string()
}

/// Waits until that node has another certificate than it has now.
async fn renewed(cluster: &Cluster, node: &str) {
    let status = async || cluster.admin::<Status>(node, "/v1/status").await;
    let before = status().await.unwrap().cert_expires;
    wait_for(&format!("{node} is renewed"), LIMIT, || async {
        match status().await {
            Ok(now) if now.cert_expires != before => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
}

/// Publishes by the command line at hand, through that node, and waits until all `observers` have it as that version.
async fn publish(cluster: &Cluster, through: &str, version: u64, observers: &[&str]) {
    let file = cluster.dir().join("rules.toml");
    std::fs::write(&file, format!("edition = {version}\n")).unwrap();
    let (file, keys) = (file.display().to_string(), cluster.node("seed").state.display().to_string());
    let admin = format!("http://{}", cluster.node(through).admin);
    let args = ["documents", "publish", &file, "--kind", "rules", "--state", &keys, "--admin", &admin];
    cluster.run(&args).await.unwrap();
    for observer in observers {
        wait_for(&format!("{observer} has version {version}"), LIMIT, || async {
            let held: Vec<Document> = cluster.admin(observer, "/v1/documents").await.map_err(|e| e.to_string())?;
            let fine = held.iter().any(|document| document.version == version);
            fine.then_some(()).ok_or_else(|| format!("{held:?}"))
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn an_older_version_and_this_one_make_one_mesh() {
    let Some(older) = older() else { return };
    let newer = binary();
    let mut cluster = Cluster::start(&older).await.unwrap();
    let (_old_service, old_addr) = sample(cluster.dir(), "old-service").await;
    let (_new_service, new_addr) = sample(cluster.dir(), "new-service").await;
    let file = cluster.dir().join("short-lived.toml");
    std::fs::write(&file, SHORT_LIVED).unwrap();

    // An issuer of either version; the one that made the mesh goes.
    for (version, name) in [(older.as_path(), "old-issuer"), (newer, "new-issuer")] {
        let token = cluster.token(&["--issuer"]).await.unwrap();
        cluster.switch(version);
        let issuer = NodeSpec::named(name).flag("--config").flag(file.display().to_string());
        cluster.add_with_token(&issuer, &token).await.unwrap();
    }
    cluster.converge().await.unwrap();
    cluster.kill("seed").await.unwrap();

    // Each joins at the issuer of the other version, calls the other's service,
    cluster.switch(newer);
    let for_old = token_of(&cluster, "new-issuer", "old-service").await;
    cluster.switch(&older);
    let for_new = token_of(&cluster, "old-issuer", "new-service").await;
    let old = NodeSpec::named("old").serving(format!("old-service={old_addr}"));
    cluster.add_with_token(&old, &for_old).await.unwrap();
    cluster.switch(newer);
    let new = NodeSpec::named("new").serving(format!("new-service={new_addr}"));
    cluster.add_with_token(&new, &for_new).await.unwrap();
    cluster.converge().await.unwrap();
    for (caller, service) in [("old", "new-service"), ("new", "old-service")] {
        let answer = call(cluster.node(caller).outbound, service, "/").await;
        assert_eq!(answer.text(), format!("hello from {service}\n"), "{caller} calls {service}");
    }

    // and is renewed by it.
    for (issuer, version, other, renews) in
        [("old-issuer", older.as_path(), "new-issuer", "new"), ("new-issuer", newer, "old-issuer", "old")]
    {
        cluster.kill(other).await.unwrap();
        renewed(&cluster, renews).await;
        cluster.switch(if version == newer { &older } else { newer });
        cluster.restart(other).await.unwrap();
        cluster.wait_status(issuer, other, MemberStatus::Alive).await.unwrap();
    }
    cluster.converge().await.unwrap();

    // Documents go both ways.
    cluster.switch(&older);
    publish(&cluster, "old", 1, &["old", "new", "old-issuer", "new-issuer"]).await;
    cluster.switch(newer);
    publish(&cluster, "new", 2, &["old", "new", "old-issuer", "new-issuer"]).await;

    // Either is missed by the other when it stands still, and is back when it goes on.
    for (observer, subject) in [("old", "new"), ("new", "old")] {
        cluster.node(subject).process.signal("STOP").await.unwrap();
        cluster.wait_status(observer, subject, MemberStatus::Down).await.unwrap();
        cluster.node(subject).process.signal("CONT").await.unwrap();
        cluster.converge().await.unwrap();
    }

    // Each dies and comes back as the other version, over the same state.
    for (name, version) in [("old", newer), ("new", older.as_path())] {
        cluster.kill(name).await.unwrap();
        cluster.wait_status("old-issuer", name, MemberStatus::Down).await.unwrap();
        cluster.switch(version);
        cluster.restart(name).await.unwrap();
        cluster.converge().await.unwrap();
    }

    // A good-bye is understood.
    for (name, observers) in [("old", ["new", "old-issuer", "new-issuer"]), ("new", ["old-issuer"; 3])] {
        assert!(cluster.terminate(name).await.unwrap().success());
        for observer in observers {
            cluster.wait_status(observer, name, MemberStatus::Left).await.unwrap();
        }
    }
}
