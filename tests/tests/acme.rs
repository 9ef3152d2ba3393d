//! Certificates that an authority issues: pebble, which is Let's Encrypt's server for tests, beside an edge.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use starling_chaos::{Client, Cluster, Door, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_protocol::admin::{Certificate, CertificateState};
use starling_tests::{binary, is_known, listening, name_server, program, sample};

/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);
const HOST: &str = "api.example.com";
const OTHER: &str = "www.example.com";

/// An authority that finds every name on this machine.
struct Authority {
    process: Process,
    _names: Process,
    /// Where it looks for names over HTTP, and over TLS.
    http: SocketAddr,
    tls: SocketAddr,
    dir: PathBuf,
    acme: SocketAddr,
    management: SocketAddr,
    dns: SocketAddr,
}

impl Authority {
    /// `None` if there is no pebble here. `settings` are its own, from the environment.
    async fn start(cluster: &Cluster, settings: &[(&str, &str)]) -> Option<Self> {
        Self::start_as(cluster, settings, serde_json::json!({})).await
    }

    /// The same with more in its file.
    async fn start_as(cluster: &Cluster, settings: &[(&str, &str)], more: serde_json::Value) -> Option<Self> {
        let pebble = program("pebble")?;
        let [http, tls, acme, management, dns] = std::array::from_fn(|_| free_port());
        let dir = cluster.dir().to_path_buf();
        self_signed(&["localhost"], &dir.join("pebble.pem"), &dir.join("pebble.key")).unwrap();
        let mut config = serde_json::json!({"pebble": {
            "listenAddress": acme, "managementListenAddress": management,
            "certificate": dir.join("pebble.pem"), "privateKey": dir.join("pebble.key"),
            "httpPort": http.port(), "tlsPort": tls.port(), "ocspResponderURL": "",
            "externalAccountBindingRequired": false, "retryAfter": {"authz": 1, "order": 1},
        }});
        config["pebble"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        std::fs::write(dir.join("pebble.json"), config.to_string()).unwrap();
        let names = name_server(&dir, dns, ["--address=/#/127.0.0.1".into()]).await?;
        let process = pebble_of(&pebble, &dir, dns, settings);
        listening(acme).await;
        Some(Self { process, _names: names, http, tls, dir, acme, management, dns })
    }

    /// Sets it up anew, at the same place: it keeps nothing on disk.
    async fn set_up_anew(&mut self) {
        self.process.kill().await.unwrap();
        self.process = pebble_of(&program("pebble").unwrap(), &self.dir, self.dns, &[]);
        listening(self.acme).await;
    }

    /// `acme = …` of an edge's file.
    fn acme(&self, more: &str) -> String {
        let ca = self.dir.join("pebble.pem");
        format!("{{ directory = \"https://localhost:{}/dir\", ca = {ca:?}{more} }}", self.acme.port())
    }

    /// A client that trusts what it issues.
    async fn client(&self) -> Client {
        let client = Client::trusting(&self.dir.join("pebble.pem")).unwrap();
        let request = Request::get("https://localhost/roots/0").body(Bytes::new()).unwrap();
        let root = client.send(Door::Http1, self.management, request).await.unwrap();
        let file = self.dir.join("root.pem");
        std::fs::write(&file, &root.body).unwrap();
        Client::trusting(&file).unwrap()
    }
}

fn pebble_of(pebble: &Path, dir: &Path, dns: SocketAddr, settings: &[(&str, &str)]) -> Process {
    let settings = settings.iter().map(|(name, value)| format!("{name}={value}"));
    let (config, dns) = (dir.join("pebble.json").display().to_string(), dns.to_string());
    let own = [pebble.display().to_string(), "-config".into(), config, "-dnsserver".into(), dns];
    Process::start(&program("env").unwrap(), settings.chain(own), &dir.join("pebble.log")).unwrap()
}

/// A service behind a node.
async fn service(cluster: &mut Cluster) -> Process {
    let (service, addr) = sample(cluster.dir(), "orders").await;
    cluster.add(&NodeSpec::named("a").serving(format!("orders={addr}"))).await.unwrap();
    service
}

/// An edge before it, with certificates from an authority.
async fn edge(cluster: &mut Cluster, name: &str, listen: SocketAddr, redirect: Option<SocketAddr>, certificates: &str) {
    let redirect = redirect.map(|addr| format!("redirect = \"{addr}\"")).unwrap_or_default();
    let route = "[[route]]\nservice = \"orders\"\nauth = []";
    let sections = format!("[edge]\nlisten = \"{listen}\"\n{redirect}\n{certificates}\n{route}\n");
    cluster.add_edge(name, &sections).await.unwrap();
    is_known(cluster, name, "orders", 1).await;
}

async fn certificates(cluster: &Cluster, edge: &str) -> Vec<Certificate> {
    let admin = format!("http://{}", cluster.node(edge).admin);
    let told = cluster.run(&["certificates", "--admin", &admin, "-o", "json"]).await.unwrap();
    serde_json::from_str(&told).unwrap()
}

/// Waits until each certificate is one that an authority issued.
async fn issued(cluster: &Cluster, edge: &str) {
    wait_for("they are issued", LIMIT, || async {
        let told = certificates(cluster, edge).await;
        let fine = !told.is_empty() && told.iter().all(|c| c.state == CertificateState::Valid);
        fine.then_some(()).ok_or_else(|| format!("{told:?} {}", cluster.node(edge).process.log()))
    })
    .await
    .unwrap();
}

async fn renew(cluster: &Cluster, edge: &str, host: &str) -> anyhow::Result<String> {
    let admin = format!("http://{}", cluster.node(edge).admin);
    cluster.run(&["certificates", "renew", host, "--admin", &admin]).await
}

/// The certificate that a client of HTTP/2 is shown.
async fn shown(client: &Client, at: SocketAddr, host: &str) -> Vec<u8> {
    let stream = client.connect_tls(at, host, b"h2").await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

/// Waits until a client is shown another certificate.
async fn changed(cluster: &Cluster, edge: &str, client: &Client, at: SocketAddr, host: &str, before: &[u8]) {
    wait_for("it is renewed", LIMIT, || async {
        let now = shown(client, at, host).await;
        (now != before).then_some(()).ok_or_else(|| cluster.node(edge).process.log())
    })
    .await
    .unwrap();
}

async fn works(client: &Client, at: SocketAddr, host: &str) {
    for door in Door::PUBLIC {
        let request = Request::get(format!("https://{host}/")).body(Bytes::new()).unwrap();
        assert_eq!(client.send(door, at, request).await.unwrap().status, 200, "{door:?} {host}");
    }
}

#[tokio::test]
async fn certificates_come_by_themselves_over_http_and_over_tls() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    // It refuses a good part of all nonces.
    let Some(authority) = Authority::start(&cluster, &[("PEBBLE_WFE_NONCEREJECT", "15")]).await else { return };
    let acme = authority.acme(", email = \"ops@example.com\"");
    let tls_alone = authority.acme(", challenge = \"tls-alpn-01\"");
    let sections = format!(
        "[[certificate]]\nhosts = [\"{HOST}\", \"b.example.com\"]\nacme = {acme}\n\
         [[certificate]]\nhosts = [\"{OTHER}\"]\nacme = {tls_alone}"
    );
    let _service = service(&mut cluster).await;
    edge(&mut cluster, "edge", authority.tls, Some(authority.http), &sections).await;
    issued(&cluster, "edge").await;
    let client = authority.client().await;
    for host in [HOST, "b.example.com", OTHER] {
        works(&client, authority.tls, host).await;
    }
    let log = cluster.node("edge").process.log();
    assert!(log.contains("no certificate was issued yet"), "that one stood in was not said");
    for challenge in ["http-01", "tls-alpn-01"] {
        assert!(log.contains(&format!("\"challenge\":\"{challenge}\"")), "{log}");
    }
    // Whoever looks for what is not asked goes where everybody goes.
    let path = "/.well-known/acme-challenge/unknown";
    assert_eq!(Client::plain().get(authority.http, HOST, path).await.unwrap().status, 308);

    // They outlive the process, however it ends.
    let [first, other] = [shown(&client, authority.tls, HOST).await, shown(&client, authority.tls, OTHER).await];
    cluster.kill("edge").await.unwrap();
    cluster.restart("edge").await.unwrap();
    assert_eq!(shown(&client, authority.tls, HOST).await, first);
    assert!(certificates(&cluster, "edge").await.iter().all(|c| c.state == CertificateState::Valid));

    // A connection that is there notices nothing of a renewal, and the other certificate is left alone.
    let (kept, _endpoint) = client.connect_quic(authority.tls, HOST).await.unwrap();
    renew(&cluster, "edge", HOST).await.unwrap();
    changed(&cluster, "edge", &client, authority.tls, HOST, &first).await;
    assert!(kept.close_reason().is_none());
    assert_eq!(shown(&client, authority.tls, OTHER).await, other);
    // A name that is added takes nothing from the others, while its certificate is on its way.
    let file = cluster.dir().join("edge.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"b.example.com\"", "\"b.example.com\", \"c.example.com\"")).unwrap();
    wait_for("it is read", LIMIT, || async {
        shown(&client, authority.tls, HOST).await;
        let read = certificates(&cluster, "edge").await[0].hosts.len() == 3;
        read.then_some(()).ok_or_else(|| cluster.node("edge").process.log())
    })
    .await
    .unwrap();
    issued(&cluster, "edge").await;
    works(&client, authority.tls, "c.example.com").await;
    let refused = renew(&cluster, "edge", "nobody.example.com").await.unwrap_err().to_string();
    assert!(refused.contains("no certificate"), "{refused}");
}

#[tokio::test]
async fn what_goes_wrong_is_said_and_tried_again() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some(mut authority) = Authority::start(&cluster, &[]).await else { return };
    // It looks where nobody is.
    let (listen, redirect) = (free_port(), free_port());
    let sections = format!("[[certificate]]\nhosts = [\"{HOST}\"]\nacme = {}", authority.acme(""));
    let _service = service(&mut cluster).await;
    edge(&mut cluster, "edge", listen, Some(redirect), &sections).await;
    let told = async |cluster: &Cluster, failures: u32, what: &str| {
        wait_for("it has failed", LIMIT, || async {
            let told = certificates(cluster, "edge").await;
            let issuance = told[0].issuance.clone().ok_or("it has not begun")?;
            let error = issuance.error.unwrap_or_default();
            let fine =
                issuance.failures == failures && error.contains(what) && told[0].state == CertificateState::StandIn;
            fine.then_some(()).ok_or_else(|| format!("{} {error}", issuance.failures))
        })
        .await
        .unwrap();
    };
    told(&cluster, 1, "port 80 of that name").await;
    // The other way is tried next; nor does that one work.
    renew(&cluster, "edge", HOST).await.unwrap();
    told(&cluster, 2, "port 443 of that name").await;
    // Meanwhile there is a certificate, of nobody.
    let client = authority.client().await;
    assert!(client.connect_tls(listen, HOST, b"h2").await.is_err());
    let admin = cluster.node("edge").admin;
    let ready = Client::plain().get(admin, &admin.to_string(), "/readyz").await.unwrap();
    assert_eq!(ready.status, 200);
    // How it stands is known after a restart, and an authority that is down is named.
    authority.process.kill().await.unwrap();
    cluster.kill("edge").await.unwrap();
    cluster.restart("edge").await.unwrap();
    wait_for("it is known how it stands", LIMIT, || async {
        let issuance = certificates(&cluster, "edge").await[0].issuance.clone();
        issuance.filter(|issuance| issuance.failures == 2).map(drop).ok_or("not yet".to_string())
    })
    .await
    .unwrap();
    renew(&cluster, "edge", HOST).await.unwrap();
    told(&cluster, 3, &format!("cannot connect to localhost:{}", authority.acme.port())).await;
}

#[tokio::test]
async fn an_account_that_is_not_known_any_more_is_made_anew() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some(mut authority) = Authority::start(&cluster, &[]).await else { return };
    let sections = format!("[[certificate]]\nhosts = [\"{HOST}\"]\nacme = {}", authority.acme(""));
    let _service = service(&mut cluster).await;
    edge(&mut cluster, "edge", authority.tls, Some(authority.http), &sections).await;
    issued(&cluster, "edge").await;
    authority.set_up_anew().await;
    renew(&cluster, "edge", HOST).await.unwrap();
    let client = authority.client().await;
    wait_for("the new one issues", LIMIT, || async {
        let stream = client.connect_tls(authority.tls, HOST, b"h2").await;
        stream.map(drop).map_err(|e| format!("{e} {}", cluster.node("edge").process.log()))
    })
    .await
    .unwrap();
    assert!(cluster.node("edge").process.log().contains("does not know our account"));
    assert_eq!(certificates(&cluster, "edge").await[0].issuance.as_ref().unwrap().failures, 0);
}

/// Several edges with the same names: one of them orders, any of them is looked at, and all of them have what comes of it.
#[tokio::test]
async fn a_fleet_has_one_certificate_for_a_name_and_nothing_to_share_it_on() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let Some(authority) = Authority::start(&cluster, &[("PEBBLE_AUTHZREUSE", "0")]).await else { return };
    let hosts: Vec<String> = (0..6).map(|n| format!("h{n}.example.com")).collect();
    let [over_http, over_tls] =
        ["http-01", "tls-alpn-01"].map(|kind| authority.acme(&format!(", challenge = {kind:?}")));
    let section = |(n, host): (usize, &String)| {
        let acme = if n % 2 == 0 { &over_http } else { &over_tls };
        format!("[[certificate]]\nhosts = [\"{host}\"]\nacme = {acme}\n")
    };
    let sections: String = hosts.iter().enumerate().map(section).collect();
    let _service = service(&mut cluster).await;
    // The authority comes to the first alone.
    let others = [free_port(), free_port()];
    edge(&mut cluster, "edge", authority.tls, Some(authority.http), &sections).await;
    for (name, listen) in ["edge-2", "edge-3"].into_iter().zip(others) {
        edge(&mut cluster, name, listen, Some(free_port()), &sections).await;
    }
    let client = authority.client().await;
    let all = [("edge", authority.tls), ("edge-2", others[0]), ("edge-3", others[1])];
    for (name, listen) in all {
        issued(&cluster, name).await;
        works(&client, listen, &hosts[0]).await;
    }
    // Each is one, whichever edge is asked.
    one_for_each(&cluster, &client, &all, &hosts).await;

    // One that comes later has them at once, and orders nothing.
    let late = free_port();
    edge(&mut cluster, "edge-4", late, Some(free_port()), &sections).await;
    issued(&cluster, "edge-4").await;
    for host in &hosts {
        assert_eq!(shown(&client, late, host).await, shown(&client, authority.tls, host).await, "{host}");
    }
    assert!(!cluster.node("edge-4").process.log().contains("a certificate was issued"));
    // One that orders is not looked at: the first shows for it what is looked for.
    for host in &hosts[..2] {
        let before = shown(&client, others[0], host).await;
        renew(&cluster, "edge-2", host).await.unwrap();
        changed(&cluster, "edge-2", &client, others[0], host, &before).await;
    }
    // Those that are left go on without the others.
    for name in ["edge-2", "edge-3", "edge-4"] {
        cluster.kill(name).await.unwrap();
    }
    let before = shown(&client, authority.tls, &hosts[0]).await;
    renew(&cluster, "edge", &hosts[0]).await.unwrap();
    changed(&cluster, "edge", &client, authority.tls, &hosts[0], &before).await;
}

async fn one_for_each(cluster: &Cluster, client: &Client, all: &[(&str, SocketAddr)], hosts: &[String]) {
    wait_for("all show the same", LIMIT, || async {
        for host in hosts {
            let first = shown(client, all[0].1, host).await;
            for (name, listen) in all {
                if shown(client, *listen, host).await != first {
                    return Err(format!("{name} has another one for {host}"));
                }
            }
        }
        Ok(())
    })
    .await
    .unwrap();
    let orders =
        all.iter().map(|(name, _)| cluster.node(name).process.log().matches("a certificate was issued").count());
    let orders: Vec<usize> = orders.collect();
    assert_eq!(orders.iter().sum::<usize>(), hosts.len(), "{orders:?}");
}

/// An authority that takes accounts only of whom it knows already.
#[tokio::test]
async fn an_account_is_bound_to_one_that_the_authority_knows() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    const KEY: &str = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
    let more = serde_json::json!({"externalAccountBindingRequired": true, "externalAccountMACKeys": {"ours": KEY}});
    let Some(authority) = Authority::start_as(&cluster, &[], more).await else { return };
    let _service = service(&mut cluster).await;
    let key = cluster.dir().join("eab.key");
    // One that the authority has given to nobody.
    std::fs::write(&key, KEY.to_lowercase()).unwrap();
    let acme = authority.acme(&format!(", eab = {{ kid = \"ours\", key_file = {key:?} }}"));
    let section = format!("[[certificate]]\nhosts = [\"{HOST}\"]\nacme = {acme}");
    edge(&mut cluster, "edge", authority.tls, None, &section).await;
    wait_for("it is told", LIMIT, || async {
        let told = &certificates(&cluster, "edge").await[0];
        let issuance = told.issuance.as_ref().and_then(|issuance| issuance.error.clone()).unwrap_or_default();
        issuance.contains("external account").then_some(()).ok_or(issuance)
    })
    .await
    .unwrap();
    // The right one is taken at the next try.
    std::fs::write(&key, format!("{KEY}\n")).unwrap();
    let admin = format!("http://{}", cluster.node("edge").admin);
    cluster.run(&["certificates", "renew", HOST, "--admin", &admin]).await.unwrap();
    issued(&cluster, "edge").await;
}

/// An edge that is killed while it has a certificate issued goes on with that order.
#[tokio::test]
async fn an_order_is_gone_on_with_after_a_kill() {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    // So many seconds at most until it looks.
    let Some(authority) = Authority::start(&cluster, &[("PEBBLE_VA_SLEEPTIME", "6")]).await else { return };
    let _service = service(&mut cluster).await;
    let section = format!("[[certificate]]\nhosts = [\"{HOST}\"]\nacme = {}", authority.acme(""));
    edge(&mut cluster, "edge", authority.tls, Some(authority.http), &section).await;
    let kept = cluster.node("edge").state.join("acme");
    let begun = || {
        let files = std::fs::read_dir(&kept).into_iter().flatten().flatten().map(|file| file.path());
        files.filter(|file| file.to_string_lossy().ends_with(".order.json")).collect::<Vec<_>>()
    };
    wait_for("an order is begun", LIMIT, || async {
        (!begun().is_empty()).then_some(()).ok_or_else(|| "none".to_owned())
    })
    .await
    .unwrap();
    cluster.kill("edge").await.unwrap();
    let orders: Vec<String> = begun().iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    assert_eq!(orders.len(), 1, "{}", cluster.node("edge").process.log());
    cluster.restart("edge").await.unwrap();
    issued(&cluster, "edge").await;
    let log = cluster.node("edge").process.log();
    assert!(log.contains("goes on with an order that was begun"), "{log}");
    assert!(begun().is_empty(), "it has ended");
    let order: serde_json::Value = serde_json::from_str(&orders[0]).unwrap();
    let pair =
        std::fs::read_dir(&kept).unwrap().flatten().find(|file| file.path().extension().is_some_and(|e| e == "pem"));
    let pair = std::fs::read_to_string(pair.unwrap().path()).unwrap();
    let comes_of_it = pair.starts_with(order["key"].as_str().unwrap());
    assert!(comes_of_it || log.contains("the order that was begun comes to nothing"), "{log}");
    works(&authority.client().await, authority.tls, HOST).await;
}
