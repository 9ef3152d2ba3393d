//! gRPC through the mesh: a server and a client from PyPI, trailers and streams included.

use starling_chaos::{Cluster, NodeSpec, Process, free_port};
use starling_tests::{binary, client_script, listening, python, run};

#[tokio::test]
async fn grpc_works_with_trailers_and_streams() {
    let Some(python) = python() else { return };
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let (script, addr) = (client_script("grpc_echo.py"), free_port());
    let args = [&script, "serve", "--port", &addr.port().to_string()];
    let _server = Process::start(&python, args, &cluster.dir().join("grpc.log")).unwrap();
    listening(addr).await;
    cluster.add(&NodeSpec::named("a").serving(format!("grpc={addr},protocol=h2c"))).await.unwrap();
    cluster.converge().await.unwrap();

    let door = cluster.node("seed").outbound.to_string();
    let (ok, out, err) = run(&python, &[&script, "call", "--target", &door, "--authority", "grpc.mesh.internal"]);
    assert!(ok, "{out} {err}");
    let results: serde_json::Value = serde_json::from_str(&out).unwrap();
    for call in ["unary", "server-stream", "bidi", "fail"] {
        assert_eq!(results[call]["ok"], true, "{results}");
    }

    // A fault of the mesh reaches a gRPC caller as a gRPC status.
    let args = [&script, "call", "--target", &door, "--authority", "nothing.mesh.internal", "--only", "unary"];
    let (ok, out, err) = run(&python, &args);
    assert!(!ok && format!("{out}{err}").contains("UNIMPLEMENTED"), "{out} {err}");
}
