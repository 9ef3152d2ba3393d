//! Faults that are people: clients that never move, strangers at the mesh port, holders of a revoked key, a clone; and the
//! operator who loads an edge's file again and again.

mod stuck;

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::Request;
use starling_protocol::admin::{Key, Member};

use self::stuck::Crowd;
use super::{active::copy_dir, mesh::Mesh};
use crate::{
    Process,
    history::{Entry, Event, Recorder},
    load::Door,
    plan::{DoorKind, Fault},
    self_signed,
    stage::Place,
};

/// How long a revoked key may still be taken.
const REVOKED_WITHIN: Duration = Duration::from_secs(2);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Mesh ports of processes beside a node, in the node's namespace; admin API and outbound listener come after.
const BESIDE: u16 = 7444;
const BESIDE_THAT: u16 = 7454;
/// Numbers of calls that are not the load's.
const NONCES: u64 = 1 << 48;
/// Calls with the key, strangers' attempts: so often.
const PERIOD: Duration = Duration::from_millis(250);

/// What such a fault has going on.
pub(crate) enum Probing {
    Clone { _process: Process, addr: SocketAddr, of: String },
    Stuck(Crowd),
    Strangers { last: Instant, refused: usize, tried: usize, victims: Vec<usize>, token: String, _foreign: Process },
    Revoked { door: Box<Door>, good_before: bool, revoked: Instant, last: Instant, refused: usize },
    Reload,
}

/// Whether a call, as a service lists it, is one of these and none of the load's.
pub(super) fn is_of_a_probe(call: &str) -> bool {
    call.split('/').filter_map(|part| part.parse::<u64>().ok()).any(|number| number >= NONCES)
}

impl Probing {
    pub(super) async fn begin(fault: &Fault, victims: &[usize], mesh: &mut Mesh) -> Result<Self> {
        match fault {
            Fault::Clone { .. } => {
                let at = *victims.first().context("nobody to clone")?;
                let (process, addr) = clone_of(mesh, at)?;
                Ok(Self::Clone { _process: process, addr, of: mesh.nodes[at].name.clone() })
            }
            Fault::Stuck { clients, .. } => Ok(Self::Stuck(Crowd::gather(mesh, victims, *clients)?)),
            Fault::Strangers { .. } => {
                let foreign = foreigner(mesh, victims[0]).await?;
                let token = mesh.token(&[]).await?;
                let (last, victims) = (Instant::now() - PERIOD, victims.to_vec());
                Ok(Self::Strangers { last, refused: 0, tried: 0, victims, token, _foreign: foreign })
            }
            Fault::KeyRevoked { .. } => revoke(mesh, *victims.first().context("no edge")?).await,
            _ => Ok(Self::Reload),
        }
    }

    /// What has to be tried again and again.
    pub(super) async fn go_on(&mut self, fault: usize, mesh: &Mesh, recorder: &Recorder) -> Result<()> {
        match self {
            Self::Strangers { last, refused, tried, victims, token, .. } if last.elapsed() >= PERIOD => {
                *last = Instant::now();
                let at = victims[*tried % victims.len()];
                let (what, good) = stranger(mesh, at, *tried, token).await?;
                *tried += 1;
                *refused += usize::from(good);
                recorder.note(Event::Probe { fault, what, good });
            }
            Self::Revoked { door, revoked, last, refused, .. } if last.elapsed() >= PERIOD => {
                *last = Instant::now();
                let service = mesh.nodes.iter().flat_map(|n| &n.services).next().context("no service")?.service.clone();
                let request = Request::builder().uri(format!("/call/{NONCES}")).body(Bytes::new())?;
                let answer = tokio::time::timeout(ATTEMPT_TIMEOUT, door.call(&service, request, &mut |_| {})).await;
                let status = answer.ok().and_then(Result::ok).map_or(0, |answer| answer.status);
                let is_refused = status == 401 || status == 403;
                *refused += usize::from(is_refused);
                let good = is_refused || revoked.elapsed() < REVOKED_WITHIN;
                let after = revoked.elapsed().as_secs_f64();
                let what = format!("a call with the revoked key, {after:.1} s after: {status}");
                recorder.note(Event::Probe { fault, what, good });
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn stage(&self) -> Result<String, String> {
        match self {
            Self::Clone { addr, of, .. } => Ok(format!("a copy of {of} runs at {addr}")),
            Self::Stuck(crowd) => crowd.stands(),
            Self::Strangers { tried: 0, .. } => Err("nobody tried".into()),
            Self::Strangers { tried, refused, .. } => Ok(format!("{tried} attempts, {refused} of them refused")),
            Self::Revoked { good_before: false, .. } => Err("the key was not good before".into()),
            Self::Revoked { .. } => Ok("the key was good, and was revoked".into()),
            Self::Reload => Err("nothing was loaded".into()),
        }
    }

    pub(super) fn product(&self, fault: usize, entries: &[Entry], mesh: &Mesh) -> Result<String, String> {
        match self {
            Self::Clone { of, .. } => {
                let mut nodes = mesh.nodes.iter().filter(|node| node.log().contains("run with one key"));
                let log = nodes.next().map(|node| format!("{} logs that two have the key of {of}", node.name));
                log.ok_or_else(|| "no node says that two have one key".into())
            }
            Self::Stuck(_) => Err("it is asked elsewhere".into()),
            Self::Revoked { refused, .. } if *refused > 0 => Ok(format!("{refused} calls with it were refused")),
            Self::Revoked { .. } => Err("no call with it was refused".into()),
            Self::Reload => {
                let calls =
                    entries.iter().filter(|e| matches!(&e.event, Event::Call(c) if c.door.is_public() && c.good()));
                match calls.count() {
                    0 => Err("no public call was answered".into()),
                    count => Ok(format!("{count} public calls were answered so far")),
                }
            }
            Self::Strangers { .. } => {
                let probes = entries
                    .iter()
                    .filter(|e| matches!(e.event, Event::Probe { fault: f, good: true, .. } if f == fault));
                match probes.count() {
                    0 => Err("nothing was refused".into()),
                    count => Ok(format!("{count} attempts were refused")),
                }
            }
        }
    }
}

/// A node of another mesh that is told to look for this one.
async fn foreigner(mesh: &Mesh, at: usize) -> Result<Process> {
    let state = mesh.dir.join("foreign");
    if !state.exists() {
        mesh.command_at(at, &["init", "--mesh", "other", "--state", &state.to_string_lossy()]).await?;
    }
    let seed = mesh.stage.mesh(mesh.nodes[at].slot).listen;
    Ok(start_beside(mesh, at, "foreign", &state, seed)?.0)
}

/// A copy of a node with all its state, at another address.
fn clone_of(mesh: &Mesh, at: usize) -> Result<(Process, SocketAddr)> {
    let node = &mesh.nodes[at];
    let state = mesh.dir.join(format!("{}-clone", node.name));
    copy_dir(&node.state, &state)?;
    let _ = std::fs::remove_file(state.join("lock"));
    start_beside(mesh, at, &node.name, &state, mesh.stage.mesh(0).advertise)
}

/// Starts a node that is none of the run's, where one of them is. Its process and its mesh address.
fn start_beside(mesh: &Mesh, at: usize, name: &str, state: &Path, seed: SocketAddr) -> Result<(Process, SocketAddr)> {
    let node = &mesh.nodes[at];
    let (args, addr) = args_beside(mesh, at, BESIDE, name, state, seed);
    let (binary, log) = (node.binary.clone(), state.with_extension("log"));
    Ok((node.place.within(move || Process::start(&binary, args, &log))?, addr))
}

/// What such a node is started with, and its mesh address.
fn args_beside(
    mesh: &Mesh,
    at: usize,
    port: u16,
    name: &str,
    state: &Path,
    seed: SocketAddr,
) -> (Vec<String>, SocketAddr) {
    let node = &mesh.nodes[at];
    let addr: SocketAddr = match node.place {
        Place::Host => crate::free_port(),
        Place::Namespace(_) => (mesh.stage.mesh(node.slot).listen.ip(), port).into(),
    };
    let (admin, outbound) = (mesh.stage.local(port + 1), mesh.stage.local(port + 2));
    let flags = [
        ("--name", name.to_string()),
        ("--state", state.to_string_lossy().into_owned()),
        ("--listen", addr.to_string()),
        ("--advertise", addr.to_string()),
        ("--admin", admin.to_string()),
        ("--outbound", outbound.to_string()),
        ("--seed", seed.to_string()),
    ];
    (std::iter::once("node".to_string()).chain(flags.into_iter().flat_map(|(f, v)| [f.to_string(), v])).collect(), addr)
}

/// One attempt of somebody who does not belong here: what it was, and whether it was refused.
async fn stranger(mesh: &Mesh, at: usize, number: usize, token: &str) -> Result<(String, bool)> {
    let node = &mesh.nodes[at];
    let to = mesh.stage.mesh(node.slot).listen;
    let name = &node.name;
    match number % 5 {
        0 => {
            let socket = tokio::net::UdpSocket::from_std(node.place.udp()?)?;
            for length in [1, 20, 1200, 1472] {
                let noise: Vec<u8> = (0..length).map(|i| (i * 31 + number) as u8).collect();
                let _ = socket.send_to(&noise, to).await;
            }
            // It has to bear it; there is nothing to refuse.
            let bears = mesh.admin(at, "/livez").await.is_ok();
            Ok((format!("noise to {name}"), bears))
        }
        1 => {
            let members: Vec<Member> = serde_json::from_slice(&mesh.admin(at, "/v1/members").await?)?;
            let found = members.iter().any(|m| m.name == "foreign");
            Ok((format!("a node of another mesh asks {name} to be let in"), !found))
        }
        2 => {
            let service = &mesh.nodes.iter().flat_map(|node| &node.services).next().context("no service")?.service;
            let (state, seed) = (mesh.dir.join("ungranted"), mesh.stage.mesh(0).advertise);
            let mut args = args_beside(mesh, at, BESIDE_THAT, "ungranted", &state, seed).0;
            args.extend(["--token".into(), token.into(), "--service".into(), format!("{service}=127.0.0.1:9")]);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let ended = tokio::time::timeout(ATTEMPT_TIMEOUT, mesh.command_at(at, &args)).await;
            let how = match ended {
                Ok(Err(error)) => format!("{error:#}"),
                Ok(Ok(_)) => "it ended well".into(),
                Err(_) => "it runs".into(),
            };
            let refused = how.contains("does not grant");
            Ok((format!("a newcomer to {name} would serve {service}, which its token does not grant: {how}"), refused))
        }
        kind => {
            let protocol: &[u8] = if kind == 3 { b"h3" } else { b"starling-gossip/1" };
            let certificate = kind == 4;
            let what = match certificate {
                true => format!("a certificate of its own making, as {}, at {name}", String::from_utf8_lossy(protocol)),
                false => format!("no certificate, as {}, at {name}", String::from_utf8_lossy(protocol)),
            };
            let refused = handshake(mesh, &node.place, to, protocol, certificate).await?;
            Ok((what, refused))
        }
    }
}

/// Whether a QUIC connection to a mesh port comes to nothing.
async fn handshake(mesh: &Mesh, from: &Place, to: SocketAddr, protocol: &[u8], certificate: bool) -> Result<bool> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(provider)));
    let mut config = match certificate {
        false => config.with_no_client_auth(),
        true => {
            let (cert, key) = (mesh.dir.join("stranger.pem"), mesh.dir.join("stranger.key"));
            self_signed(&["n1", "orders.mesh.internal"], &cert, &key)?;
            config.with_client_auth_cert(
                vec![CertificateDer::from_pem_file(&cert)?],
                PrivateKeyDer::from_pem_file(&key)?,
            )?
        }
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config)?;
    let runtime = quinn::default_runtime().context("no runtime")?;
    let mut endpoint = quinn::Endpoint::new(Default::default(), None, from.udp()?, runtime)?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    let tried = async {
        let connection = endpoint.connect(to, "stranger.mesh.internal")?.await?;
        // With TLS 1.3 a server's refusal of a certificate comes after the client's handshake.
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(b"\x01\x00").await?;
        let _ = receive.read(&mut [0; 16]).await?;
        anyhow::Ok(())
    };
    match tokio::time::timeout(ATTEMPT_TIMEOUT, tried).await {
        Ok(Ok(())) => Ok(false),
        Ok(Err(_)) | Err(_) => Ok(true),
    }
}

/// Takes any certificate: whoever knocks here does not ask who answers.
#[derive(Debug)]
struct AnyServer(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A key that is good, and then is revoked.
async fn revoke(mesh: &mut Mesh, edge: usize) -> Result<Probing> {
    let key = mesh.key(edge, "revoked").await?;
    let (addr, _) = mesh.nodes[edge].public.clone().context("no edge")?;
    let clients = mesh.stage.place(mesh.nodes.len());
    let door = mesh.public_door(DoorKind::EdgeHttp2, &mesh.nodes[edge].name, addr, &key, &clients)?;
    let service = mesh.nodes.iter().flat_map(|n| &n.services).next().context("no service")?.service.clone();
    let request = Request::builder().uri(format!("/call/{NONCES}")).body(Bytes::new())?;
    let answer = tokio::time::timeout(ATTEMPT_TIMEOUT, door.call(&service, request, &mut |_| {})).await??;
    let good_before = answer.status == 200;
    let admin = format!("http://{}", mesh.nodes[edge].admin);
    let keys = mesh.command_at(edge, &["keys", "list", "--admin", &admin, "-o", "json"]).await?;
    let keys: Vec<Key> = serde_json::from_str(&keys)?;
    let id = keys.into_iter().find(|key| key.consumer == "revoked").context("the key is not listed")?.id;
    mesh.command_at(edge, &["keys", "revoke", &id, "--admin", &admin]).await?;
    let now = Instant::now();
    Ok(Probing::Revoked { door: Box::new(door), good_before, revoked: now, last: now, refused: 0 })
}

/// Writes the edges' certificate and file anew, and has them loaded.
pub(super) async fn reload(mesh: &mut Mesh, edges: &[String], round: usize) -> Result<String> {
    mesh.write_public_certificate()?;
    for name in edges {
        let at = mesh.at(name)?;
        let file = mesh.nodes[at].state.with_extension("toml");
        let text = std::fs::read_to_string(&file)?;
        let text = text.split("\n# round").next().unwrap_or_default().to_string();
        std::fs::write(&file, format!("{text}\n# round {round}\n"))?;
        let process = mesh.nodes[at].process.as_ref().context("the edge does not run")?;
        process.signal("HUP").await?;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for name in edges {
        let at = mesh.at(name)?;
        let metrics = String::from_utf8_lossy(&mesh.admin(at, "/metrics").await?).into_owned();
        let success = metrics.lines().find(|line| line.starts_with("starling_config_reload_success"));
        if success.is_none_or(|line| !line.trim_end().ends_with(" 1")) {
            bail!("{name} did not take its file: {success:?}");
        }
    }
    Ok("the edges say that they took it".into())
}
