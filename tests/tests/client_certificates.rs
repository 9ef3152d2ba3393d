//! Callers that show certificates of an authority of the operator's own, over every protocol.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, free_port, wait_for};
use starling_tests::{Front, binary, is_known, nginx_at, program, run};

/// For whatever is waited for.
const LIMIT: Duration = Duration::from_secs(60);
const HOST: &str = "api.example.com";

/// Issues certificates to callers, and revokes them.
struct Authority(Issuer<'static, KeyPair>, String);

/// A certificate and its key, in PEM.
type Shown = (String, String);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self(Issuer::new(params, key), pem)
    }

    fn issue(&self, name: &str, serial: u64, change: impl FnOnce(&mut CertificateParams)) -> Shown {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(serial.into());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// Puts a list of revoked certificates into a file, in one step.
    fn revoke(&self, serials: &[u64], file: &Path) {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2026, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2026, 1, 1),
            next_update: date_time_ymd(2090, 1, 1),
            crl_number: SerialNumber::from(serials.len() as u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let new = file.with_extension("new");
        std::fs::write(&new, list.signed_by(&self.0).unwrap().pem().unwrap()).unwrap();
        std::fs::rename(new, file).unwrap();
    }
}

struct Stage {
    cluster: Cluster,
    authority: Authority,
    crl: PathBuf,
    listen: SocketAddr,
    cert: PathBuf,
    _service: Process,
}

const ACME: u64 = 1;
const REVOKED: u64 = 2;
const OTHER: u64 = 9;

impl Stage {
    /// `None` if a part is missing.
    async fn set() -> Option<Self> {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let (authority, addr) = (Authority::new("Partners"), free_port());
        let answer = "$http_starling_consumer|$http_client_cert|$http_client_cert_chain|";
        let server = format!("listen {addr}; location / {{ return 200 \"{answer}\"; }}");
        let service = nginx_at(&cluster.dir().join("told"), addr, &server).await?;
        cluster.add(&NodeSpec::named("a").serving(format!("told={addr}"))).await.unwrap();
        let (ca, crl) = (cluster.dir().join("partners.pem"), cluster.dir().join("partners.crl"));
        std::fs::write(&ca, &authority.1).unwrap();
        authority.revoke(&[REVOKED], &crl);
        let Front { listen, cert, sections } = Front::new(cluster.dir(), HOST, "");
        let rules = format!(
            r#"
[client_certificate]
ca = {ca:?}
crl = {crl:?}
[[route]]
service = "told"
auth = ["client-certificate"]
forward_client_certificate = true
plan = "few"
[[route]]
path = "/acme"
service = "told"
auth = ["client-certificate"]
client_names = ["acme"]
[[route]]
path = "/either"
service = "told"
auth = ["api-key", "client-certificate"]
[[route]]
path = "/public"
service = "told"
auth = []
[[plan]]
name = "few"
quota = "1000/day"
"#
        );
        cluster.add_edge("edge", &(sections + &rules)).await.unwrap();
        is_known(&cluster, "edge", "told", 1).await;
        Some(Self { cluster, authority, crl, listen, cert, _service: service })
    }

    fn client(&self, shown: Option<&Shown>) -> Client {
        let client = Client::trusting(&self.cert).unwrap();
        match shown {
            Some((chain, key)) => client.showing(chain, key),
            None => client,
        }
    }

    async fn ask(&self, door: Door, shown: Option<&Shown>, path: &str) -> Answer {
        let request = Request::get(format!("https://{HOST}{path}"))
            .header("client-cert", ":made up:")
            .header("client-cert-chain", ":made up:");
        self.client(shown).send(door, self.listen, request.body(Bytes::new()).unwrap()).await.unwrap()
    }
}

#[tokio::test]
async fn a_certificate_lets_its_caller_in_over_every_protocol() {
    let Some(stage) = Stage::set().await else { return };
    let authority = &stage.authority;
    let acme = authority.issue("acme", ACME, |_| ());
    let umbrella = authority.issue("Umbrella Corp", 3, |_| ());
    let foreign = Authority::new("Partners").issue("acme", 4, |_| ());
    let revoked = authority.issue("revoked", REVOKED, |_| ());
    let ended = authority.issue("ended", 5, |params| {
        (params.not_before, params.not_after) = (date_time_ymd(2024, 1, 1), date_time_ymd(2024, 2, 1));
    });
    let server =
        authority.issue("server", 6, |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let nameless = authority.issue("a\u{e4}", 7, |_| ());
    for door in Door::PUBLIC {
        let answer = stage.ask(door, Some(&acme), "/").await;
        let body = answer.text();
        let mut told = body.split('|');
        assert_eq!((answer.status, told.next()), (200, Some("cert:acme")), "{door:?}: {body}");
        // RFC 9440 §2.2: the leaf in DER; and nothing of what the client said.
        let leaf = told.next().unwrap().trim_matches(':').to_owned();
        let pem = acme.0.lines().filter(|line| !line.starts_with("-----")).map(str::trim).collect::<String>();
        assert_eq!(
            (BASE64_STANDARD.decode(&leaf).unwrap(), told.next()),
            (BASE64_STANDARD.decode(pem).unwrap(), Some(""))
        );
        assert!(answer.header("ratelimit").contains("\"few-day\";r="), "{:?}", answer.headers);

        for (shown, path, status, what) in [
            (Some(&umbrella), "/", 200, "cert:Umbrella Corp"),
            (Some(&acme), "/acme", 200, "cert:acme||"),
            (Some(&umbrella), "/acme", 403, "Umbrella Corp, who may not use"),
            (Some(&acme), "/either", 200, "cert:acme||"),
            (None, "/either", 401, "credentials are needed"),
            (Some(&foreign), "/either", 401, "another authority"),
            (None, "/", 403, "a client certificate is needed"),
            (Some(&foreign), "/", 403, "another authority"),
            (Some(&revoked), "/", 403, "is revoked"),
            (Some(&ended), "/", 403, "has ended"),
            (Some(&server), "/", 403, "not for clients"),
            (Some(&nameless), "/", 403, "names nobody"),
            // Nobody asked for one there.
            (Some(&ended), "/public", 200, ""),
            (None, "/public", 200, ""),
        ] {
            let answer = stage.ask(door, shown, path).await;
            assert!(
                answer.status == status && answer.text().contains(what),
                "{door:?} {path}: {} {}, not {what}",
                answer.status,
                answer.text()
            );
            if path == "/public" {
                assert_eq!(answer.text(), "|||", "{door:?}");
            }
            let challenge = answer.header("www-authenticate");
            assert_eq!(challenge.is_empty(), status != 401, "{door:?} {path}: {challenge}");
        }
        // More than a handshake may bring is no certificate.
        let huge = authority.issue("huge", 8, |params| {
            let name = |n: usize| SanType::DnsName(format!("{n}.{}.example", "x".repeat(50)).try_into().unwrap());
            params.subject_alt_names = (0..400).map(name).collect();
        });
        let request = Request::get(format!("https://{HOST}/public")).body(Bytes::new()).unwrap();
        assert!(stage.client(Some(&huge)).send(door, stage.listen, request).await.is_err(), "{door:?}");
    }
    let routes: Vec<serde_json::Value> = stage.cluster.admin("edge", "/v1/routes").await.unwrap();
    assert!(
        routes.iter().any(|route| route["auth"] == serde_json::json!(["api-key", "client-certificate"])),
        "{routes:?}"
    );
}

/// curl, with TLS 1.2 as well, where a certificate goes another way.
#[tokio::test]
async fn curl_shows_its_certificate() {
    let Some(curl) = program("curl") else { return };
    let Some(stage) = Stage::set().await else { return };
    let (chain, key) = stage.authority.issue("acme", ACME, |_| ());
    let (cert, key_file) = (stage.cluster.dir().join("acme.pem"), stage.cluster.dir().join("acme.key"));
    std::fs::write(&cert, chain).unwrap();
    std::fs::write(&key_file, key).unwrap();
    for tls in ["1.2", "1.3"] {
        for http in ["--http1.1", "--http2"] {
            let resolve = format!("{HOST}:{}:{}", stage.listen.port(), stage.listen.ip());
            let url = format!("https://{HOST}:{}/acme", stage.listen.port());
            let (ca, cert, key) = (stage.cert.to_string_lossy(), cert.to_string_lossy(), key_file.to_string_lossy());
            let args = [
                "-sS",
                http,
                "--tls-max",
                tls,
                "--cacert",
                &ca,
                "--cert",
                &cert,
                "--key",
                &key,
                "--resolve",
                &resolve,
                &url,
            ];
            let (fine, out, err) = run(&curl, &args);
            assert!(fine && out == "cert:acme|||", "TLS {tls} {http}: {out} {err}");
        }
    }
}

/// What is revoked opens nothing any more, on connections that are open either, and those of others live on.
#[tokio::test]
async fn what_is_revoked_is_out_at_once_on_open_connections() {
    let Some(stage) = Stage::set().await else { return };
    let acme = stage.authority.issue("acme", ACME, |_| ());
    let other = stage.authority.issue("other", OTHER, |_| ());
    let mut open = Vec::new();
    for shown in [&acme, &other] {
        let stream = stage.client(Some(shown)).connect_tls(stage.listen, HOST, b"h2").await.unwrap();
        let (h2, driver) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(driver);
        let (connection, endpoint) = stage.client(Some(shown)).connect_quic(stage.listen, HOST).await.unwrap();
        let (mut driver, h3) = h3::client::new(h3_quinn::Connection::new(connection)).await.unwrap();
        tokio::spawn(async move { std::future::poll_fn(|cx| driver.poll_close(cx)).await });
        open.push((h2, h3, endpoint));
    }
    let mut ask = async |nth: usize| {
        let request = |body| Request::get(format!("https://{HOST}/")).body(body).unwrap();
        let (h2, h3, _) = &mut open[nth];
        let by_h2 = h2.send_request(request(Empty::<Bytes>::new())).await.unwrap().status().as_u16();
        let (head, _) = request(Empty::<Bytes>::new()).into_parts();
        let mut stream = h3.send_request(Request::from_parts(head, ())).await.unwrap();
        stream.finish().await.unwrap();
        [by_h2, stream.recv_response().await.unwrap().status().as_u16()]
    };
    assert_eq!([ask(0).await, ask(1).await], [[200; 2]; 2]);
    stage.authority.revoke(&[REVOKED, ACME], &stage.crl);
    let begun = std::time::Instant::now();
    while ask(0).await != [403; 2] {
        assert!(begun.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(ask(1).await, [200; 2]);
    assert_eq!(stage.ask(Door::Http1, Some(&acme), "/").await.status, 403);

    // Whatever else is wrong with the file, what is revoked is out.
    let file = stage.cluster.dir().join("edge.toml");
    let whole = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, whole.replace("[[plan]]", "[[plam]]")).unwrap();
    stage.authority.revoke(&[REVOKED, ACME, OTHER], &stage.crl);
    while ask(1).await != [403; 2] {
        assert!(begun.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    std::fs::write(&file, whole).unwrap();
    stage.authority.revoke(&[REVOKED, ACME], &stage.crl);
    while ask(1).await != [200; 2] {
        assert!(begun.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // A list that cannot be read changes nothing, and is told.
    std::fs::write(&stage.crl, "nonsense").unwrap();
    wait_for("it is told", LIMIT, || async {
        let status: serde_json::Value = stage.cluster.admin("edge", "/v1/status").await.unwrap();
        let told = status["reload_error"].to_string();
        told.contains("client_certificate.crl").then_some(()).ok_or(told)
    })
    .await
    .unwrap();
    assert_eq!([ask(0).await, ask(1).await], [[403; 2], [200; 2]]);
}

#[tokio::test]
async fn an_edge_without_its_authorities_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let Front { sections, .. } = Front::new(dir.path(), HOST, "");
    let route = "[[route]]\nservice = \"s\"\nauth = [\"client-certificate\"]\n";
    let file = dir.path().join("edge.toml");
    for (more, want) in [
        (route.to_owned(), "route[0].auth: \"client-certificate\" needs [client_certificate] with ca"),
        (
            format!("{route}[client_certificate]\nca = \"/nowhere/ca.pem\""),
            "client_certificate.ca: /nowhere/ca.pem: it cannot be read",
        ),
        (format!("{route}[client_certificate]\nca = {:?}", dir.path().join("edge.key")), "it has no certificate"),
        (format!("{route}client_names = []"), "must not be empty"),
        (
            "[[route]]\nservice = \"s\"\nauth = []\nclient_names = [\"a\"]\nforward_client_certificate = true"
                .to_owned(),
            "route[0].forward_client_certificate: no caller shows one here",
        ),
    ] {
        std::fs::write(&file, format!("{sections}{more}")).unwrap();
        let (fine, out, err) = run(binary(), &["check", &file.to_string_lossy()]);
        assert!(!fine && format!("{out}{err}").contains(want), "{more}: {out}{err}");
    }
}
