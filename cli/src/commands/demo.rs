//! `starling demo`: a whole mesh on this machine, from this binary, as child processes.

mod check;

use std::{net::SocketAddr, path::PathBuf};

use starling_chaos::{Cluster, NodeSpec, Process, free_port, self_signed};
use tokio::signal::unix::{SignalKind, signal};

use crate::{Failure, args::DemoArgs, output};

/// The mesh of the demo and its services.
struct Demo {
    cluster: Cluster,
    /// The public address of its edge, and the certificate to trust.
    edge: SocketAddr,
    certificate: PathBuf,
    /// A key of the consumer `demo`.
    key: String,
    orders: Vec<String>,
    _services: Vec<Process>,
}

const HOST: &str = "api.demo.localhost";

pub(crate) async fn run(args: &DemoArgs) -> Result<(), Failure> {
    super::node::follow_parent();
    let started = std::time::Instant::now();
    let demo = tokio::select! {
        demo = Demo::start(args.nodes) => demo.map_err(failed)?,
        stopped = stop() => return stopped,
    };
    let took = started.elapsed().as_secs_f32();
    println!("a mesh of {} nodes is up in {took:.1} s, with no control plane\n", args.nodes + 3);
    if args.check {
        return tokio::select! {
            checked = check::run(demo) => checked,
            stopped = stop() => stopped.and(Err(Failure::failed("stopped before the check was done"))),
        };
    }
    demo.show().await.map_err(failed)?;
    println!("\nCtrl-C stops everything and leaves nothing behind.");
    stop().await
}

/// Resolves when the demo is told to stop; dropping it then takes every process and file along.
async fn stop() -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
        _ = terminate.recv() => Ok(()),
    }
}

fn failed(error: anyhow::Error) -> Failure {
    Failure::failed(format!("{error:#}"))
}

impl Demo {
    async fn start(nodes: u8) -> anyhow::Result<Self> {
        let binary = std::env::current_exe()?;
        let mut cluster = Cluster::start(&binary).await?;
        let mut services = Vec::new();
        let mut orders = Vec::new();
        let mut sample = |cluster: &Cluster, name: &str| -> anyhow::Result<SocketAddr> {
            let addr = free_port();
            let args = ["sample", "--listen", &addr.to_string(), "--name", name];
            services.push(Process::start(&binary, args, &cluster.dir().join(format!("{name}.service.log")))?);
            Ok(addr)
        };
        for n in 1..=nodes {
            let name = format!("orders-{n}");
            let addr = sample(&cluster, &name)?;
            // The last one serves the new version.
            let version = if n == nodes { "v2" } else { "v1" };
            cluster.add(&NodeSpec::named(&name).serving(format!("orders={addr},version={version}"))).await?;
            orders.push(name);
        }
        let addr = sample(&cluster, "users-1")?;
        cluster.add(&NodeSpec::named("users-1").serving(format!("users={addr}"))).await?;

        let (certificate, key) = (cluster.dir().join("edge.pem"), cluster.dir().join("edge.key"));
        self_signed(&[HOST, "localhost"], &certificate, &key)?;
        let edge = free_port();
        let sections = format!(
            r#"[edge]
listen = "{edge}"

[[certificate]]
hosts = ["{HOST}", "localhost"]
cert = {certificate:?}
key = {key:?}

[[route]]
path = "/orders"
service = "orders"
auth = ["api-key"]
plan = "default"
timeout = "30s"

[[route]]
path = "/users"
service = "users"
auth = []
plan = "small"

[[version]]
route = "/orders"
from = ["path", "header:x-api-version"]
default = "v1"
versions = {{ v1 = {{ deprecated = "2026-01-01", sunset = "2099-01-01" }}, v2 = {{}} }}

[[plan]]
name = "default"
rate = "1000/s"
burst = 1000
quota = "1000000/day"

[[plan]]
name = "small"
rate = "1/s"
burst = 5
"#
        );
        cluster.add_edge("edge", &sections).await?;
        cluster.converge().await?;
        let admin = format!("http://{}", cluster.node("edge").admin);
        let key = cluster.run(&["keys", "create", "--consumer", "demo", "--admin", &admin]).await?.trim().to_string();
        Ok(Self { cluster, edge, certificate, key, orders, _services: services })
    }

    async fn show(&self) -> anyhow::Result<()> {
        let members = self.cluster.members("seed").await?;
        let services = |m: &starling_protocol::admin::Member| {
            let names = m.services.iter().map(|s| format!("{} {}", s.name, s.version).trim_end().to_string());
            names.collect::<Vec<_>>().join(", ")
        };
        let rows = members.iter().map(|m| {
            vec![
                m.name.clone(),
                format!("{:?}", m.kind).to_lowercase(),
                m.status.to_string(),
                m.addr.to_string(),
                services(m),
            ]
        });
        output::table(&["NAME", "KIND", "STATUS", "ADDRESS", "SERVES"], rows.collect());
        let seed = self.cluster.node("seed");
        let (edge, key, cert) = (self.edge.port(), &self.key, self.certificate.display());
        let public = format!("--resolve {HOST}:{edge}:127.0.0.1 --cacert {cert}");
        println!("\neast-west, from any node to a service behind another:");
        println!("  curl -x {} http://orders.mesh.internal/", seed.outbound);
        println!("\nnorth-south, through the edge, over HTTP/1.1, 2 and 3 on one port:");
        println!("  curl {public} -H 'x-api-key: {key}' https://{HOST}:{edge}/orders");
        println!("  curl {public} -H 'x-api-key: {key}' https://{HOST}:{edge}/v2/orders");
        println!("  curl {public} -i https://{HOST}:{edge}/orders      # no key: 401");
        println!("\nlook around:");
        println!("  starling members --admin http://{} --watch", seed.admin);
        println!("  starling services --admin http://{}", seed.admin);
        println!("  curl http://{}/metrics", seed.admin);
        let admin = self.cluster.node("edge").admin;
        println!("  starling edge explain GET https://{HOST}/v2/orders --admin http://{admin}");
        println!("  starling quota show demo --admin http://{admin}");
        if let Some(pid) = self.cluster.node(&self.orders[0]).process.pid() {
            println!("\nbreak something:");
            println!("  kill -9 {pid}      # {}", self.orders[0]);
        }
        Ok(())
    }
}
