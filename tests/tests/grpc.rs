//! gRPC through the mesh: a server and a client from PyPI, in all four kinds, with what its users rely on.

use std::time::Duration;

use starling_chaos::{Cluster, NodeSpec, Process, free_port, wait_for};
use starling_tests::{binary, client_script, is_known, listening, python, run};

#[tokio::test]
async fn grpc_works_in_all_kinds_with_deadlines_and_cancellation() {
    let Some(python) = python() else { return };
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (script, addr) = (client_script("grpc_echo.py"), free_port());
    // It ends each connection after half a second, as servers behind balancers do.
    let port = addr.port().to_string();
    let args = [&script, "serve", "--port", &port, "--connection-age-ms", "500"];
    let server = Process::start(&python, args, &cluster.dir().join("grpc.log")).unwrap();
    listening(addr).await;
    cluster.add(&NodeSpec::named("a").serving(format!("grpc={addr},protocol=h2c"))).await.unwrap();
    is_known(&cluster, "seed", "grpc", 1).await;

    let door = cluster.node("seed").outbound.to_string();
    let (ok, out, err) = run(&python, &[&script, "call", "--target", &door, "--authority", "grpc.mesh.internal"]);
    assert!(ok, "{out} {err}");
    let results: serde_json::Value = serde_json::from_str(&out).unwrap();
    for call in ["unary", "server-stream", "client-stream", "bidi", "fail", "deadline", "cancel", "many"] {
        assert_eq!(results[call]["ok"], true, "{results}");
    }
    // What was given up, by its deadline and by its caller, has ended at the service, too.
    wait_for("the service is told", Duration::from_secs(30), || async {
        match server.log().matches("ended Hang").count() {
            2 => Ok(()),
            ended => Err(format!("{ended} of 2")),
        }
    })
    .await
    .unwrap();

    // A fault of the mesh reaches a gRPC caller as a gRPC status.
    let args = [&script, "call", "--target", &door, "--authority", "nothing.mesh.internal", "--only", "unary"];
    let (ok, out, err) = run(&python, &args);
    assert!(!ok && format!("{out}{err}").contains("UNIMPLEMENTED"), "{out} {err}");
}

/// As grpcurl does it: what there is, and how to speak to it, is asked of the service itself.
#[tokio::test]
async fn a_client_that_knows_nothing_finds_its_way_by_reflection() {
    let Some(python) = python() else { return };
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (script, addr) = (client_script("grpc_by_reflection.py"), free_port());
    let args = [&script, "serve", "--port", &addr.port().to_string()];
    let _server = Process::start(&python, args, &cluster.dir().join("grpc.log")).unwrap();
    listening(addr).await;
    cluster.add(&NodeSpec::named("a").serving(format!("clock={addr},protocol=h2c"))).await.unwrap();
    is_known(&cluster, "seed", "clock", 1).await;
    let door = cluster.node("seed").outbound.to_string();
    let (ok, out, err) = run(&python, &[&script, "call", "--target", &door, "--authority", "clock.mesh.internal"]);
    assert!(ok, "{out} {err}");
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    let services = ["grpc.reflection.v1alpha.ServerReflection", "time.Clock"];
    assert_eq!(told, serde_json::json!({"services": services, "methods": ["time.Clock.Add"], "sum": 42}));
}
