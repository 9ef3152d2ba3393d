//! What must be impossible: reaching anything but the join protocol without a certificate of this mesh.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::crypto::rustls::QuicClientConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use starling_chaos::{Client, Cluster};
use starling_protocol::{CloseCode, admin::Status};
use starling_tests::{binary, rogue::AnyServer};

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Opens a connection as an outsider, tries to use it, and returns how the node ended it.
async fn intrude(mesh: SocketAddr, protocol: &[u8], identity: Option<Identity>) -> String {
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer::default()));
    let mut config = match identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let mut endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap())));
    let ended = async {
        let connection = match endpoint.connect(mesh, "mesh.internal").unwrap().await {
            Ok(connection) => connection,
            Err(error) => return error.to_string(),
        };
        let _ = connection.send_datagram(bytes::Bytes::from_static(b"ping"));
        if let Ok((mut send, mut receive)) = connection.open_bi().await {
            let _ = send.write_all(b"\x01\x00").await;
            let _ = send.finish();
            let answer = receive.read_to_end(1024).await;
            assert!(answer.as_ref().map_or(true, Vec::is_empty), "an answer came: {answer:?}");
        }
        connection.closed().await.to_string()
    };
    tokio::time::timeout(Duration::from_secs(60), ended).await.expect("the node ends the connection")
}

#[tokio::test]
async fn without_a_certificate_of_this_mesh_there_is_only_joining() {
    let cluster = Cluster::start(binary()).await.unwrap();
    let other = Cluster::start(binary()).await.unwrap();
    let mesh = cluster.node("seed").mesh;
    let foreign = || -> Identity {
        let dir = other.node("seed").state.join("identity");
        let chain = CertificateDer::pem_file_iter(dir.join("chain.pem")).unwrap().map(Result::unwrap).collect();
        (chain, PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap())
    };
    // Self-signed, with the names of a real node in it.
    let forged = || -> Identity {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://demo/node/seed".try_into().unwrap())];
        let cert = params.self_signed(&key).unwrap();
        (vec![cert.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    };
    for protocol in [&b"h3"[..], b"starling-gossip/1"] {
        let ended = intrude(mesh, protocol, None).await;
        let code = format!("(code {})", CloseCode::Unauthenticated as u32);
        assert!(ended.contains("certificate required") || ended.contains(&code), "{ended}");
        for identity in [foreign(), forged()] {
            let ended = intrude(mesh, protocol, Some(identity)).await;
            assert!(ended.contains("error 48") || ended.to_lowercase().contains("certificate"), "{ended}");
        }
    }
    assert!(intrude(mesh, b"smtp", None).await.contains("120"), "an unknown protocol is no_application_protocol");
    let status: Status = cluster.admin("seed", "/v1/status").await.unwrap();
    assert_eq!((status.members, status.in_flight), (1, 0));
}

#[tokio::test]
async fn a_web_page_cannot_reach_the_admin_api() {
    let cluster = Cluster::start(binary()).await.unwrap();
    let admin = cluster.node("seed").admin;
    let answer = Client::plain().get(admin, "rebound.example.com", "/v1/members").await.unwrap();
    assert_eq!(answer.status, 403, "{answer:?}");
    for (origin, status) in [("http://evil.example.com", 403), (&*format!("http://{admin}"), 202)] {
        let request = http::Request::post(format!("http://{admin}/v1/drain")).header("origin", origin);
        let request = request.body(bytes::Bytes::new()).unwrap();
        let answer = Client::plain().send(starling_chaos::Door::PlainHttp1, admin, request).await.unwrap();
        assert_eq!(answer.status, status, "{origin}: {answer:?}");
    }
}
