//! The edge: every policy over HTTP/1.1, 2 and 3.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use starling_chaos::{Answer, Client, Cluster, Door, NodeSpec, Process, free_port, self_signed, wait_for};
use starling_protocol::admin::{self, Key, Route};
use starling_tests::{binary, client_script, nginx, program, python, run, sample};

const HOST: &str = "api.example.com";

struct Public {
    cluster: Cluster,
    addr: SocketAddr,
    cert: PathBuf,
    key_file: PathBuf,
    client: Client,
    key: String,
    jwt: EncodingKey,
    _services: Vec<Process>,
}

/// An edge in front of `orders` (v1 and v2) and `web` (nginx).
async fn start() -> Option<Public> {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    let dir = cluster.dir().to_path_buf();
    let mut services = Vec::new();
    for version in ["v1", "v2"] {
        let (process, addr) = sample(&dir, version).await;
        services.push(process);
        let service = format!("orders={addr},version={version}");
        cluster.add(&NodeSpec::named(&format!("orders-{version}")).serving(service)).await.unwrap();
    }
    let (web, addr) = nginx(&dir).await?;
    services.push(web);
    cluster.add(&NodeSpec::named("web-1").serving(format!("web={addr}"))).await.unwrap();

    let (cert, key_file, jwks) = (dir.join("edge.pem"), dir.join("edge.key"), dir.join("jwks.json"));
    self_signed(&[HOST], &cert, &key_file).unwrap();
    let signing = rcgen::KeyPair::generate().unwrap();
    std::fs::write(&jwks, jwk_set(&signing)).unwrap();
    let (addr, redirect) = (free_port(), free_port());
    let sections = format!(
        r#"[edge]
listen = "{addr}"
redirect = "{redirect}"

[[certificate]]
hosts = ["{HOST}"]
cert = {cert:?}
key = {key_file:?}

[[route]]
host = "{HOST}"
path = "/orders"
service = "orders"
auth = ["api-key", "jwt"]
plan = "default"

[[route]]
path = "/web"
service = "web"
auth = []
strip_prefix = true

[[route]]
path = "/limited"
service = "web"
auth = ["api-key"]
plan = "small"

[[route]]
path = "/nobody"
service = "nobody"
auth = []

[[version]]
route = "/orders"
from = ["path", "header:x-api-version"]
default = "v1"
versions = {{ v1 = {{ deprecated = "2026-01-01", sunset = "2099-01-01" }}, v2 = {{}} }}

[[plan]]
name = "default"
rate = "1000/s"
burst = 1000

[[plan]]
name = "small"
rate = "6/h"
burst = 6

[jwt]
issuer = "https://id.example.com/"
audience = ["api"]
jwks = {jwks:?}
algorithms = ["ES256"]
"#
    );
    cluster.add_edge("edge", &sections).await.unwrap();
    cluster.converge().await.unwrap();
    let admin = format!("http://{}", cluster.node("edge").admin);
    let key =
        cluster.run(&["keys", "create", "--consumer", "acme", "--admin", &admin]).await.unwrap().trim().to_string();
    let jwt = EncodingKey::from_ec_der(&signing.serialize_der());
    let client = Client::trusting(&cert).unwrap();
    Some(Public { cluster, addr, cert, key_file, client, key, jwt, _services: services })
}

fn jwk_set(key: &rcgen::KeyPair) -> String {
    use jsonwebtoken::jwk::{
        AlgorithmParameters, CommonParameters, EllipticCurve, EllipticCurveKeyParameters, EllipticCurveKeyType, Jwk,
        JwkSet, KeyAlgorithm,
    };
    // An uncompressed point: 4, x, y.
    let point = key.public_key_raw();
    let part = |bytes: &[u8]| base64_url(bytes);
    let jwk = Jwk {
        common: CommonParameters {
            key_id: Some("k1".into()),
            key_algorithm: Some(KeyAlgorithm::ES256),
            ..CommonParameters::default()
        },
        algorithm: AlgorithmParameters::EllipticCurve(EllipticCurveKeyParameters {
            key_type: EllipticCurveKeyType::EC,
            curve: EllipticCurve::P256,
            x: part(&point[1..33]),
            y: part(&point[33..65]),
        }),
    };
    serde_json::to_string(&JwkSet { keys: vec![jwk] }).unwrap()
}

fn base64_url(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        (0..=chunk.len()).for_each(|i| out.push(DIGITS[(word >> (18 - 6 * i)) as usize & 63] as char));
    }
    out
}

impl Public {
    async fn get(&self, door: Door, path: &str, fields: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder().uri(format!("https://{HOST}:{}{path}", self.addr.port()));
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let sent = self.client.send(door, self.addr, request.body(Bytes::new()).unwrap()).await;
        sent.unwrap_or_else(|e| panic!("{door:?} {path}: {e:#}"))
    }

    fn token(&self, claims: serde_json::Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("k1".into());
        jsonwebtoken::encode(&header, &claims, &self.jwt).unwrap()
    }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test]
async fn who_calls_is_asked_on_every_protocol() {
    let Some(edge) = start().await else { return };
    let claims = |exp: u64, aud: &str| serde_json::json!({"iss": "https://id.example.com/", "aud": aud, "sub": "alice", "exp": exp});
    let good = format!("Bearer {}", edge.token(claims(now() + 600, "api")));
    let expired = format!("Bearer {}", edge.token(claims(now() - 600, "api")));
    let other_audience = format!("Bearer {}", edge.token(claims(now() + 600, "else")));
    let bearer_key = format!("Bearer {}", edge.key);
    let other_digit = if edge.key.ends_with('0') { '1' } else { '0' };
    let wrong_key = format!("{}{other_digit}", &edge.key[..edge.key.len() - 1]);
    for door in Door::PUBLIC {
        for (fields, status) in [
            (&[][..], 401),
            (&[("x-api-key", edge.key.as_str())], 200),
            (&[("authorization", bearer_key.as_str())], 200),
            (&[("authorization", good.as_str())], 200),
            (&[("x-api-key", wrong_key.as_str())], 401),
            (&[("x-api-key", "sk_000000000000_00")], 401),
            (&[("authorization", expired.as_str())], 401),
            (&[("authorization", other_audience.as_str())], 401),
            (&[("authorization", "Basic eDp5")], 401),
        ] {
            let answer = edge.get(door, "/orders/7", fields).await;
            assert_eq!(answer.status, status, "{door:?} {fields:?}: {answer:?}");
            if status == 401 {
                assert!(answer.header("www-authenticate").starts_with("Bearer"), "{answer:?}");
                assert_eq!(answer.header("content-type"), "application/problem+json");
            }
        }
        let query = edge.get(door, &format!("/orders?x-api-key={}", edge.key), &[]).await;
        assert_eq!(query.status, 401, "a key in the query is no key");
        assert_eq!(edge.get(door, "/nowhere", &[]).await.status, 404);
        assert_eq!(edge.get(door, "/nobody", &[]).await.status, 404);
        let head = Request::head(format!("https://{HOST}:{}/nobody", edge.addr.port())).body(Bytes::new()).unwrap();
        let answer = edge.client.send(door, edge.addr, head).await.unwrap_or_else(|e| panic!("{door:?}: HEAD: {e:#}"));
        assert_eq!((answer.status, answer.body.len()), (404, 0), "{door:?}: no content for HEAD");
    }
    // Revoked is revoked, at once, on every protocol.
    let admin = format!("http://{}", edge.cluster.node("edge").admin);
    let keys = edge.cluster.run(&["keys", "list", "-o", "json", "--admin", &admin]).await.unwrap();
    let keys: Vec<Key> = serde_json::from_str(&keys).unwrap();
    assert_eq!((keys.len(), keys[0].key.clone()), (1, None), "a listed key shows no secret");
    let stored = std::fs::read_to_string(edge.cluster.node("edge").state.join("keys.json")).unwrap();
    assert!(!stored.contains(edge.key.rsplit('_').next().unwrap()), "the secret is not stored");
    edge.cluster.run(&["keys", "revoke", &keys[0].id, "--admin", &admin]).await.unwrap();
    for door in Door::PUBLIC {
        assert_eq!(edge.get(door, "/orders", &[("x-api-key", &edge.key)]).await.status, 401);
    }
}

#[tokio::test]
async fn versions_are_picked_and_spoofed_fields_dropped_on_every_protocol() {
    let Some(edge) = start().await else { return };
    let key = ("x-api-key", edge.key.as_str());
    for door in Door::PUBLIC {
        for (path, version, instance) in
            [("/orders", "", "v1"), ("/v2/orders", "", "v2"), ("/orders/v2/7", "", "v2"), ("/orders", "v2", "v2")]
        {
            let fields = if version.is_empty() { vec![key] } else { vec![key, ("x-api-version", version)] };
            let answer = edge.get(door, path, &fields).await;
            assert_eq!(answer.text(), format!("hello from {instance}\n"), "{door:?} {path} {version}: {answer:?}");
            assert_eq!(answer.header("deprecation").starts_with('@'), instance == "v1", "{answer:?}");
        }
        assert_eq!(edge.get(door, "/orders", &[key, ("x-api-version", "v9")]).await.status, 400);
        assert_eq!(edge.get(door, "/v9/orders", &[key]).await.status, 404);

        let spoofed = [("starling-caller", "root"), ("x-forwarded-for", "1.2.3.4"), ("starling-consumer", "root")];
        let answer = edge.get(door, "/web/x", &spoofed).await;
        assert_eq!(answer.text(), "nginx api.example.com caller=edge consumer=\n", "{door:?}: {answer:?}");
        assert_eq!(edge.get(door, "/web", &[("x_forwarded_for", "1")]).await.status, 400, "underscore aliases");
        let alt_svc = answer.header("alt-svc");
        assert_eq!(alt_svc.is_empty(), door == Door::Http3, "{door:?} {alt_svc}");
        assert!(alt_svc.is_empty() || alt_svc.contains(&edge.addr.port().to_string()), "{alt_svc}");
        for path in ["/web/../orders", "/web/%2e%2e/orders", "/web//../orders"] {
            let status = edge.get(door, path, &[]).await.status;
            assert!(matches!(status, 400 | 401), "{door:?} {path} got past the policy of /orders: {status}");
        }
    }
    let routes: Vec<Route> = edge.cluster.admin("edge", "/v1/routes").await.unwrap();
    assert_eq!(routes.len(), 4);
    let log = edge.cluster.node("edge").process.output();
    for protocol in ["http/1.1", "h2", "h3"] {
        let line = log.lines().find(|l| l.contains(&format!("\"protocol\":\"{protocol}\""))).expect(protocol);
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["status"].is_u64() && line["request_id"].as_str().unwrap().len() == 36, "{line}");
    }
    assert!(!log.contains(&edge.key), "no secret in the log");
}

#[tokio::test]
async fn a_limit_is_one_limit_over_all_protocols() {
    let Some(edge) = start().await else { return };
    let mut statuses = Vec::new();
    for n in 0..9 {
        let answer = edge.get(Door::PUBLIC[n % 3], "/limited", &[("x-api-key", &edge.key)]).await;
        assert!(answer.header("ratelimit-policy").starts_with("\"small\";q=6"), "{answer:?}");
        if answer.status == 429 {
            assert!(answer.header("retry-after").parse::<u64>().unwrap() >= 1);
            assert!(answer.text().contains("quota-exceeded"), "{answer:?}");
        }
        if answer.status == 200 {
            assert!(answer.text().contains("consumer=acme\n"), "{answer:?}");
        }
        statuses.push(answer.status);
    }
    assert_eq!(statuses, [200, 200, 200, 200, 200, 200, 429, 429, 429]);
    for door in Door::PUBLIC {
        assert_eq!(
            edge.get(door, "/limited", &[("x-api-key", &edge.key), ("x-forwarded-for", "9.9.9.9")]).await.status,
            429
        );
    }
}

#[tokio::test]
async fn certificates_and_policy_are_replaced_while_it_runs() {
    let Some(edge) = start().await else { return };
    self_signed(&[HOST], &edge.cert, &edge.key_file).unwrap();
    let fresh = Client::trusting(&edge.cert).unwrap();
    for door in Door::PUBLIC {
        wait_for("the new certificate", Duration::from_secs(60), || async {
            let request = Request::get(format!("https://{HOST}/web")).body(Bytes::new()).unwrap();
            fresh.send(door, edge.addr, request).await.map(|_| ()).map_err(|e| format!("{e:#}"))
        })
        .await
        .unwrap();
    }
    // A broken file is refused and the old policy stays; a good one is taken.
    let file = edge.cluster.dir().join("edge.toml");
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, good.replace("service = \"nobody\"", "servcie = \"nobody\"")).unwrap();
    edge.cluster.node("edge").process.signal("HUP").await.unwrap();
    wait_for("the refusal is told", Duration::from_secs(60), || async {
        let status: starling_protocol::admin::Status =
            edge.cluster.admin("edge", "/v1/status").await.map_err(|e| e.to_string())?;
        status.reload_error.map(|_| ()).ok_or_else(|| "no error yet".into())
    })
    .await
    .unwrap();
    let get = |path: &'static str| {
        let request = Request::get(format!("https://{HOST}{path}")).body(Bytes::new()).unwrap();
        let fresh = fresh.clone();
        async move { fresh.send(Door::Http2, edge.addr, request).await.unwrap().status }
    };
    assert_eq!(get("/web").await, 200);
    std::fs::write(&file, good.replace("path = \"/web\"", "path = \"/site\"")).unwrap();
    wait_for("the new route", Duration::from_secs(60), || async {
        let status = get("/site").await;
        if status == 200 { Ok(()) } else { Err(status.to_string()) }
    })
    .await
    .unwrap();
    assert_eq!(get("/web").await, 404);
}

#[tokio::test]
async fn curl_gets_the_same_over_http1_and_http2() {
    let Some(edge) = start().await else { return };
    let Some(curl) = program("curl") else { return };
    let (resolve, url) =
        (format!("{HOST}:{}:127.0.0.1", edge.addr.port()), format!("https://{HOST}:{}/web/", edge.addr.port()));
    let cert = edge.cert.to_string_lossy();
    for version in ["--http1.1", "--http2"] {
        let args =
            ["-sS", version, "--cacert", &cert, "--resolve", &resolve, "-w", " %{http_version} %{http_code}", &url];
        let (ok, out, err) = run(&curl, &args);
        let number = if version == "--http2" { "2" } else { "1.1" };
        assert!(ok && out.ends_with(&format!(" {number} 200")), "{out} {err}");
    }
}

#[tokio::test]
async fn aioquic_and_broken_requests_over_http3() {
    let (Some(edge), Some(python)) = (start().await, python()) else { return };
    let script = client_script("h3.py");
    let url = format!("https://{HOST}:{}/orders/up", edge.addr.port());
    let (connect, cert, key) = (edge.addr.to_string(), edge.cert.to_string_lossy(), format!("x-api-key: {}", edge.key));
    let base = [&*script, &url, "--connect", &connect, "--ca", &cert, "--header", &key];
    let h3 = |more: &[&str]| {
        let (ok, out, err) = run(&python, &[&base, more].concat());
        let json: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}"));
        (ok, json)
    };
    let (ok, json) = h3(&[]);
    assert!(ok && json["status"] == 200 && json["protocol"] == "h3", "{json}");

    // A body that ends short of its length, and one that is reset, must not be answered as if they were whole.
    for how in ["--fin-after", "--abort-after"] {
        let data = "x".repeat(5000);
        let (_, json) = h3(&["--method", "POST", "--data", &data, how, "1000"]);
        assert_ne!(json["status"], 200, "{how}: {json}");
    }
    // Malformed heads: refused or reset, and the edge goes on.
    let authority = format!("{HOST}:{}", edge.addr.port());
    let head = |more: serde_json::Value| {
        let mut fields = vec![
            serde_json::json!([":method", "GET"]),
            serde_json::json!([":scheme", "https"]),
            serde_json::json!([":authority", authority]),
            serde_json::json!([":path", "/web/"]),
        ];
        fields.extend(more.as_array().unwrap().clone());
        serde_json::Value::from(fields).to_string()
    };
    for bad in [
        serde_json::json!([["connection", "close"]]),
        serde_json::json!([["te", "gzip"]]),
        serde_json::json!([["transfer-encoding", "chunked"]]),
        serde_json::json!([["host", "other.example.com"]]),
        serde_json::json!([["content-length", "1"], ["content-length", "2"]]),
    ] {
        let (_, json) = h3(&["--raw-headers", &head(bad.clone())]);
        assert_ne!(json["status"], 200, "{bad}: {json}");
    }
    let many: Vec<_> = (0..300).map(|n| serde_json::json!([format!("x-{n}"), "1"])).collect();
    let (_, json) = h3(&["--raw-headers", &head(many.into())]);
    assert_ne!(json["status"], 200, "{json}");
    let (ok, json) = h3(&["--parallel", "50"]);
    assert!(ok && json.as_array().unwrap().iter().all(|a| a["status"] == 200), "{json}");
    assert!(!edge.cluster.node("edge").process.log().contains("panicked"));
}

#[tokio::test]
async fn chromium_comes_over_http3() {
    let (Some(edge), Some(_), Some(python)) = (start().await, program("chromium"), program("python3")) else { return };
    let url = format!("https://{HOST}:{}/web/", edge.addr.port());
    let (connect, cert) = (edge.addr.to_string(), edge.cert.to_string_lossy());
    let args = [&*client_script("chromium_h3.py"), &url, "--connect", &connect, "--cert", &cert, "--via-alt-svc"];
    let (ok, out, err) = run(&python, &args);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}"));
    assert!(ok && json["protocol"] == "h3" && json["status"] == 200, "{json} {err}");
}

#[tokio::test]
async fn the_plain_port_leads_to_https() {
    let Some(edge) = start().await else { return };
    let file = std::fs::read_to_string(edge.cluster.dir().join("edge.toml")).unwrap();
    let redirect = file.lines().find_map(|l| l.strip_prefix("redirect = ")).unwrap().trim_matches('"').parse().unwrap();
    let request =
        Request::builder().method(Method::GET).uri(format!("http://{HOST}/web?q=1")).body(Bytes::new()).unwrap();
    let answer = Client::plain().send(Door::PlainHttp1, redirect, request).await.unwrap();
    assert_eq!(answer.status, 308);
    assert_eq!(answer.header("location"), format!("https://{HOST}:{}/web?q=1", edge.addr.port()));
}

/// Whoever comes to an edge that goes away can go elsewhere at once; who is there already is answered.
#[tokio::test]
async fn an_edge_that_goes_away_refuses_new_connections_over_every_protocol() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Some(mut edge) = start().await else { return };
    let mut kept = edge.client.connect_tls(edge.addr, HOST, b"http/1.1").await.unwrap();
    let head = format!("POST /web HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 4\r\n\r\n");
    kept.write_all(head.as_bytes()).await.unwrap();
    edge.cluster.node("edge").process.signal("TERM").await.unwrap();
    // A handshake that is answered, or not at all, would take longer.
    let refused = async |door| {
        let request = Request::get(format!("https://{HOST}/web")).body(Bytes::new()).unwrap();
        let asked = tokio::time::timeout(Duration::from_secs(5), edge.client.send(door, edge.addr, request)).await;
        match asked {
            Ok(Err(error)) if format!("{error:#}").contains("refused") => Ok(()),
            other => Err(format!("{door:?}: {other:?}")),
        }
    };
    for door in Door::PUBLIC {
        wait_for("it is refused", Duration::from_secs(10), || refused(door)).await.unwrap();
    }
    kept.write_all(b"body").await.unwrap();
    let mut answer = String::new();
    kept.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(edge.cluster.node_mut("edge").process.wait(Duration::from_secs(60)).await.unwrap().success());
}

/// And of what is explained, the same comes of the request itself.
#[tokio::test]
async fn an_operator_can_ask_where_a_request_would_go() {
    let Some(public) = start().await else { return };
    let admin = format!("http://{}", public.cluster.node("edge").admin);
    let explain = async |args: &[&str]| {
        let args = [&["edge", "explain"], args, &["--admin", &admin, "-o", "json"]].concat();
        let told = public.cluster.run(&args).await.unwrap();
        serde_json::from_str::<admin::Explanation>(&told).unwrap()
    };
    let url = |path: &str| format!("https://{HOST}{path}");
    let told = explain(&["get", &url("/v2/orders/1?q=a")]).await;
    let route = told.route.unwrap();
    assert_eq!(
        (route.path.as_str(), route.service.as_ref().map(|s| s.as_str()), route.plan.as_deref()),
        ("/orders", Some("orders"), Some("default"))
    );
    assert_eq!((told.path.as_deref(), told.version.as_deref()), (Some("/orders/1?q=a"), Some("v2")));
    assert_eq!((told.version_by.as_deref(), told.cost, told.limits.len()), (Some("path"), 1, 1));
    let told = explain(&["GET", &url("/orders"), "-H", "X-Api-Version: v1"]).await;
    assert_eq!((told.version.as_deref(), told.version_by.as_deref()), (Some("v1"), Some("header:x-api-version")));
    assert!(told.fields.iter().any(|(name, _)| name == "deprecation"), "{:?}", told.fields);
    let told = explain(&["GET", &url("/orders")]).await;
    assert_eq!((told.version.as_deref(), told.version_by.as_deref()), (Some("v1"), Some("the default")));
    let told = explain(&["GET", &url("/web/a%2e/../b")]).await;
    assert_eq!(told.path.as_deref(), Some("/b"), "as the service sees it");
    for (path, status) in [("/v9/orders", 404), ("/nowhere", 404), ("/web/%2e%2e/%2e%2e/x", 400)] {
        let told = explain(&["GET", &url(path)]).await;
        assert_eq!(told.refused.as_ref().map(|refused| refused.status), Some(status), "{path}: {told:?}");
        let request = Request::get(url(path)).header("x-api-key", &public.key).body(Bytes::new()).unwrap();
        let answer = public.client.send(Door::Http2, public.addr, request).await.unwrap();
        assert_eq!(answer.status, status, "{path}");
    }
    let table = public.cluster.run(&["edge", "explain", "GET", &url("/orders"), "--admin", &admin]).await.unwrap();
    assert!(table.contains("v1, by the default") && table.contains("api-key or jwt"), "{table}");
    for wrong in [&["GET", "/orders"][..], &["G ET", "https://a/"], &["GET", "https://a/", "-H", "no colon"]] {
        let args = [&["edge", "explain"], wrong, &["--admin", &admin]].concat();
        assert!(public.cluster.run(&args).await.is_err(), "{wrong:?}");
    }
}
