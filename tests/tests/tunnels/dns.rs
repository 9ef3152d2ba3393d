//! A name server behind the mesh, over UDP and TCP on one port, as resolvers use it.

use starling_chaos::{Cluster, NodeSpec, Process, free_port};
use starling_tests::{binary, is_known, name_server, program, run};

/// dnsmasq beside one node, and a port of that name at another: where questions go.
async fn stage() -> Option<(Cluster, Process, std::net::SocketAddr)> {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (server, port) = (free_port(), free_port());
    // More than one packet holds, so that resolvers ask again over TCP.
    let long = (0..20).map(|n| format!("--txt-record=long.test,{n}{}", "x".repeat(200)));
    let knows = long.chain(["--address=/short.test/192.0.2.7".into()]);
    let process = name_server(cluster.dir(), server, knows).await?;
    let far = NodeSpec::named("far")
        .serving(format!("dns={server},protocol=udp"))
        .serving(format!("dns-tcp={server},protocol=tcp"));
    cluster.add(&far).await.unwrap();
    let near = [format!("dns={port},protocol=udp"), format!("dns-tcp={port},protocol=tcp")];
    let near = near.into_iter().fold(NodeSpec::named("near"), |node, upstream| node.flag("--upstream").flag(upstream));
    cluster.add(&near).await.unwrap();
    for service in ["dns", "dns-tcp"] {
        is_known(&cluster, "near", service, 1).await;
    }
    Some((cluster, process, port))
}

#[tokio::test]
async fn dig_asks_over_udp_and_again_over_tcp() {
    let Some(dig) = program("dig") else { return };
    let Some((_cluster, _server, port)) = stage().await else { return };
    let at = ["@127.0.0.1", "-p", &port.port().to_string()].map(String::from);
    let ask = |more: &[&str]| {
        let args: Vec<&str> = at.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let (fine, out, err) = run(&dig, &args);
        assert!(fine, "{more:?}: {out} {err}");
        out
    };
    assert_eq!(ask(&["+short", "any.short.test"]).trim(), "192.0.2.7");
    assert_eq!(ask(&["+short", "+tcp", "any.short.test"]).trim(), "192.0.2.7");
    let long = ask(&["+short", "+noedns", "TXT", "long.test"]);
    assert_eq!(long.lines().filter(|line| line.starts_with('"')).count(), 20, "{long}");
    let whole = ask(&["+noedns", "TXT", "long.test"]);
    assert!(whole.contains("(TCP)"), "{whole}");
}

#[tokio::test]
async fn of_ten_thousand_questions_none_is_lost() {
    let Some(dnsperf) = program("dnsperf") else { return };
    let Some((cluster, _server, port)) = stage().await else { return };
    let questions = cluster.dir().join("questions");
    std::fs::write(&questions, (0..10_000).map(|n| format!("n{n}.short.test A\n")).collect::<String>()).unwrap();
    let port = port.port().to_string();
    let args = ["-s", "127.0.0.1", "-p", &port, "-n", "1", "-q", "64", "-d", &questions.to_string_lossy()];
    let (fine, out, err) = run(&dnsperf, &args);
    assert!(fine, "{out} {err}");
    let figure = |what: &str| {
        let line = out.lines().find(|line| line.trim().starts_with(what)).unwrap_or_else(|| panic!("{what}: {out}"));
        line.split(':').nth(1).unwrap().split_whitespace().next().unwrap().parse::<u32>().unwrap()
    };
    assert_eq!((figure("Queries sent"), figure("Queries lost")), (10_000, 0), "{out}");
    assert!(out.contains("NOERROR 10000"), "{out}");
}
