//! Joining by hand: a node that says what it likes, and a seed that answers as it likes.

use std::{future::Future, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context, Result};
use aws_lc_rs::hmac;
use bytes::Bytes;
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use starling_protocol::{
    Answer, Application, Framed, Grant, Join, JoinToken, Refusal, SignedAnswer, alpn, decode, encode, frame_of,
};

use crate::{raw_h3, rogue::read_frame};

/// A key that asks for certificates.
pub struct Applicant {
    key: KeyPair,
}

impl Default for Applicant {
    fn default() -> Self {
        Self { key: KeyPair::generate().expect("the system has randomness") }
    }
}

impl Applicant {
    /// A certificate request for its key, DER.
    pub fn csr(&self) -> Bytes {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serialize_request(&self.key).expect("a P-256 key can sign").der().to_vec().into()
    }

    /// What a real node would send.
    pub fn join(&self, token: &JoinToken, name: &str) -> Join {
        let application = Application {
            version: Application::VERSION,
            claims: token.claims_bytes.clone(),
            name: name.parse().expect("a name"),
            services: Vec::new(),
            csr: self.csr(),
            issuer_csr: None,
        };
        prove(token, encode(&application))
    }

    /// Asks at a node, as a stranger, and returns what the issuer says: what it grants, or why not.
    pub async fn ask(&self, at: SocketAddr, token: &JoinToken, name: &str) -> Result<Result<Grant, Refusal>> {
        let (kind, body) = ask(at, Join::KIND, &encode(&self.join(token, name))).await?;
        verdict(kind, &body)
    }
}

/// An application, and the proof of the token's secret over it.
pub fn prove(token: &JoinToken, application: Vec<u8>) -> Join {
    let mut proof = [0; 32];
    let secret = hmac::Key::new(hmac::HMAC_SHA256, &token.secret);
    proof.copy_from_slice(hmac::sign(&secret, &Join::proven_bytes(&application)).as_ref());
    Join { application: application.into(), proof }
}

/// What an answer says, without a look at its signature.
pub fn verdict(kind: u64, body: &[u8]) -> Result<Result<Grant, Refusal>> {
    if kind == Refusal::KIND {
        return Ok(Err(decode(body)?));
    }
    anyhow::ensure!(kind == SignedAnswer::KIND, "an answer of kind {kind}");
    let answer: Answer = decode(&decode::<SignedAnswer>(body)?.body)?;
    match (answer.granted, answer.refused) {
        (Some(grant), None) => Ok(Ok(grant)),
        (None, Some(refusal)) => Ok(Err(refusal)),
        other => anyhow::bail!("{other:?}"),
    }
}

/// Sends one request over the join protocol without a certificate, and returns kind and body of the answer.
pub async fn ask(at: SocketAddr, kind: u64, body: &[u8]) -> Result<(u64, Bytes)> {
    let endpoint = raw_h3::endpoint(None, alpn::JOIN)?;
    let connection = endpoint.connect(at, "mesh.internal")?.await?;
    exchange(&connection, kind, body).await
}

/// One request and its answer.
pub async fn exchange(connection: &quinn::Connection, kind: u64, body: &[u8]) -> Result<(u64, Bytes)> {
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&frame_of(kind, body)).await?;
    send.finish()?;
    read_frame(&mut receive).await
}

/// Answers joins in the name of a real member, as it likes: `answer` makes kind and body out of those of the request.
pub fn seed<F>(
    state: &Path,
    answer: impl Fn(u64, Bytes) -> F + Send + Sync + 'static,
) -> Result<(SocketAddr, quinn::Endpoint)>
where
    F: Future<Output = (u64, Bytes)> + Send + 'static,
{
    let read = |name: &str| std::fs::read_to_string(state.join("identity").join(name)).context(name.to_string());
    let certificates = |pem: String| -> Result<Vec<CertificateDer<'static>>> {
        Ok(CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>()?)
    };
    let chain = [certificates(read("chain.pem")?)?, certificates(read("roots.pem")?)?].concat();
    let key = KeyPair::from_pem(&read("key.pem")?)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    tls.alpn_protocols = vec![alpn::JOIN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
    let server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let endpoint = quinn::Endpoint::server(server, ([127, 0, 0, 1], 0).into())?;
    let (accepting, answer) = (endpoint.clone(), Arc::new(answer));
    tokio::spawn(async move {
        while let Some(incoming) = accepting.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let connection = incoming.await.ok()?;
                let (mut send, mut receive) = connection.accept_bi().await.ok()?;
                let (kind, body) = read_frame(&mut receive).await.ok()?;
                let (kind, body) = answer(kind, body).await;
                send.write_all(&frame_of(kind, &body)).await.ok()?;
                send.finish().ok()?;
                connection.closed().await;
                Some(())
            });
        }
    });
    Ok((endpoint.local_addr()?, endpoint))
}
