//! A takeover as systemd asks for it: a real one, in namespaces of its own, with the unit of docs/operations.md.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use starling_chaos::{Client, Load, Process, free_port, wait_for};
use starling_protocol::admin::{MemberStatus, Status};
use starling_tests::{binary, program, run, sample, skip};

use super::{LIMIT, member, so_many_more};
use crate::Cluster;

const SYSTEMD: &str = "/lib/systemd/systemd";

/// A systemd, as the first process of its namespaces.
struct Manager {
    first: Option<Process>,
    /// As it is seen from here.
    pid: u32,
    cgroup: PathBuf,
}

impl Manager {
    /// Starts it with these units, of which `starling.target` is what it brings up. `None` skips.
    async fn start(dir: &Path, units: &[(&str, String)]) -> Option<Self> {
        let (unshare, _) = (program("unshare")?, program("nsenter")?);
        if !Path::new(SYSTEMD).exists() {
            skip("systemd is not installed");
            return None;
        }
        // A hierarchy of control groups, wherever the host has it.
        let groups = dir.join("cgroup");
        std::fs::create_dir(&groups).unwrap();
        if !run(&program("mount")?, &["-t", "cgroup2", "none", &groups.to_string_lossy()]).0 {
            skip("may not mount control groups");
            return None;
        }
        let cgroup = groups.join(format!("starling-test-{}", std::process::id()));
        std::fs::create_dir(&cgroup).unwrap();
        let own = dir.join("units");
        std::fs::create_dir(&own).unwrap();
        for (name, text) in units {
            std::fs::write(own.join(name), text).unwrap();
        }
        let script = format!(
            "set -e; echo $$ > {}/cgroup.procs; exec {} -C -m -p -i -u -f --kill-child --mount-proc sh -ec 'mount -t tmpfs \
             tmpfs /run; mkdir -p /run/systemd/system /run/lock; umount -l /sys/fs/cgroup 2>/dev/null || true; mount -t cgroup2 \
             cgroup2 /sys/fs/cgroup; cp {}/* /run/systemd/system/; export container=starling-test; exec {SYSTEMD} --system \
             --unit=starling.target --log-target=console'",
            cgroup.display(),
            unshare.display(),
            own.display()
        );
        let first = Process::start(Path::new("/bin/sh"), ["-c", &script], &dir.join("systemd.log")).unwrap();
        let outer = first.pid().unwrap();
        let children = format!("/proc/{outer}/task/{outer}/children");
        let is_up = || async {
            let pid = std::fs::read_to_string(&children).unwrap_or_default();
            let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.trim())).unwrap_or_default();
            if name.trim() == "systemd" { Ok(()) } else { Err(first.log()) }
        };
        wait_for("systemd starts", LIMIT, is_up).await.unwrap();
        let pid = std::fs::read_to_string(&children).unwrap().trim().parse().unwrap();
        Some(Self { first: Some(first), pid, cgroup })
    }

    /// `systemctl`, to its end: success, stdout, stderr.
    fn ctl(&self, args: &[&str]) -> (bool, String, String) {
        let pid = self.pid.to_string();
        run(&program("nsenter").unwrap(), &[&["-t", &pid, "-m", "-p", "systemctl"], args].concat())
    }

    fn property(&self, name: &str) -> String {
        self.ctl(&["show", "--value", "-p", name, "starling.service"]).1.trim().to_string()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // With it goes all that is in its namespaces.
        drop(self.first.take());
        let groups = self.cgroup.parent().unwrap().to_path_buf();
        for _ in 0..200 {
            let _ = Command::new("find")
                .args([self.cgroup.as_os_str(), "-depth".as_ref(), "-type".as_ref(), "d".as_ref()])
                .args(["-exec", "rmdir", "{}", ";"])
                .output();
            if !self.cgroup.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let _ = Command::new("umount").arg("-l").arg(groups).output();
    }
}

/// The unit as operators are shown it, with this test's paths.
fn unit(binary: &Path, config: &Path, socket: &Path) -> String {
    let docs = include_str!("../../../docs/operations.md");
    let (_, text) = docs.split_once("```ini\n").unwrap();
    let (text, _) = text.split_once("```").unwrap();
    let changes = [
        ("/usr/local/bin/starling", binary),
        ("/etc/starling/node.toml", config),
        ("/var/lib/starling/admin.sock", socket),
    ];
    let text = changes.iter().fold(text.to_string(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, &to.to_string_lossy())
    });
    // Nothing of a whole system is there.
    text.replace("[Service]\n", "DefaultDependencies=no\n\n[Service]\nRestartSec=100ms\n")
}

#[tokio::test]
async fn a_reload_is_an_upgrade_and_the_unit_stays_up() {
    let cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let (_service, addr) = sample(&dir, "orders").await;
    let (token, admin) = (cluster.token(&["--service", "orders"]).await.unwrap(), free_port());
    let (state, config, listen) = (dir.join("orders-1"), dir.join("orders-1.toml"), free_port());
    let text = format!(
        "[node]\nname = \"orders-1\"\nstate = {state:?}\nlisten = \"{}\"\nseeds = [\"{}\"]\ntoken = \"{token}\"\n\n[admin]\nlisten = \
         \"{admin}\"\n\n[outbound]\nlisten = \"{}\"\n\n[[service]]\nname = \"orders\"\naddr = \"{addr}\"\n",
        listen,
        cluster.seed(),
        free_port(),
    );
    std::fs::write(&config, &text).unwrap();
    let units = [
        ("starling.service", unit(binary(), &config, &state.join("admin.sock"))),
        ("starling.target", "[Unit]\nDefaultDependencies=no\nWants=starling.service\n".to_string()),
    ];
    let Some(manager) = Manager::start(&dir, &units).await else { return };
    let is_active = || async {
        let state = manager.property("ActiveState");
        if state == "active" { Ok(()) } else { Err(state) }
    };
    wait_for("the unit is up", LIMIT, is_active).await.unwrap();
    cluster.wait_status("seed", "orders-1", MemberStatus::Alive).await.unwrap();
    starling_tests::is_known(&cluster, "seed", "orders", 1).await;
    let load = Load::start(cluster.node("seed").outbound, "orders", 200);
    let mut main = manager.property("MainPID");
    // The next upgrade waits for the end of the process before.
    let is_alone = async || {
        wait_for("the process before ends", LIMIT, || async {
            let answer = Client::plain().get(admin, &admin.to_string(), "/v1/status").await;
            let status: Status =
                serde_json::from_slice(&answer.map_err(|e| e.to_string())?.body).map_err(|e| e.to_string())?;
            status.predecessor.map_or(Ok(()), |pid| Err(pid.to_string()))
        })
        .await
        .unwrap();
    };
    for _ in 0..2 {
        so_many_more(&load, 100).await;
        let (fine, _, said) = manager.ctl(&["reload", "starling.service"]);
        assert!(fine, "{said}");
        assert_eq!(manager.property("ActiveState"), "active");
        let now = manager.property("MainPID");
        assert_ne!((now.as_str(), now.as_str()), (main.as_str(), "0"), "another process is the main one");
        main = now;
        is_alone().await;
    }
    // What no reload of a running process can change changes with it: an address, too.
    let (before, mesh) = (listen.to_string(), free_port());
    let text = text.replace(&before, &mesh.to_string());
    std::fs::write(&config, &text).unwrap();
    assert!(manager.ctl(&["reload", "starling.service"]).0);
    wait_for("others know the new address", LIMIT, || async {
        let addr = member(&cluster, "seed", "orders-1").await.addr;
        if addr == mesh { Ok(()) } else { Err(addr.to_string()) }
    })
    .await
    .unwrap();
    main = manager.property("MainPID");
    is_alone().await;
    // A configuration with a mistake changes nothing, and whoever asked for it is told.
    std::fs::write(&config, format!("{text}colour = \"red\"\n")).unwrap();
    assert!(!manager.ctl(&["reload", "starling.service"]).0);
    assert_eq!((manager.property("ActiveState"), manager.property("MainPID")), ("active".to_string(), main.clone()));
    std::fs::write(&config, &text).unwrap();
    so_many_more(&load, 100).await;
    let tally = load.stop().await;
    assert_eq!(tally.failed, Vec::<String>::new(), "of {}", tally.good);
    // The new process is looked after as the first one was.
    assert!(manager.ctl(&["kill", "--kill-whom=main", "--signal=KILL", "starling.service"]).0);
    wait_for("it is started again", LIMIT, || async {
        let now = manager.property("MainPID");
        if now != main && now != "0" && manager.property("ActiveState") == "active" { Ok(()) } else { Err(now) }
    })
    .await
    .unwrap();
    assert!(manager.ctl(&["stop", "starling.service"]).0);
    assert_eq!((manager.property("ActiveState"), manager.property("Result")), ("inactive".into(), "success".into()));
    cluster.wait_status("seed", "orders-1", MemberStatus::Left).await.unwrap();
}
