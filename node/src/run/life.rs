//! What a new life of a node begins with.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use starling_gossip::Announcement;
use starling_protocol::{Capabilities, NodeKind, Phase, ServiceRecord};

use crate::{
    config::Config,
    identity::{Identity, authority::SharedAuthority, unix_now},
    inbound::condition::at_first,
    state::{StateDir, StateError},
    takeover::Health,
};

const PEERS: &str = "peers.json";
const PEERS_VERSION: u32 = 1;

/// Addresses of former peers, on disk.
#[derive(Serialize, Deserialize)]
struct PeersFile {
    version: u32,
    peers: Vec<SocketAddr>,
}

/// Higher than in any former life, also when the clock was set back; stored before anything is sent.
pub(super) fn next_generation(state: &StateDir) -> Result<u64, StateError> {
    /// Others refuse what is further ahead of their clocks, so nobody has believed such a life.
    const MAX_AHEAD_S: u64 = 24 * 3600;
    let last: u64 = state.read_text("generation")?.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let now = unix_now();
    let next = if last > now + MAX_AHEAD_S { now } else { now.max(last + 1) };
    state.write("generation", next.to_string().as_bytes())?;
    Ok(next)
}

pub(super) fn remembered_peers(state: &StateDir) -> Vec<SocketAddr> {
    // A damaged list costs nothing but the way back through former peers.
    let bytes = state.read(PEERS).ok().flatten();
    let file: Option<PeersFile> = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    file.filter(|file| file.version == PEERS_VERSION).map(|file| file.peers).unwrap_or_default()
}

pub(crate) fn keep_peers(state: &StateDir, peers: &[SocketAddr]) {
    let file = PeersFile { version: PEERS_VERSION, peers: peers.to_vec() };
    state.keep(PEERS, &serde_json::to_vec(&file).expect("addresses are JSON"));
}

/// The zone that the certificate binds this node to, or else the configured one.
pub(super) fn zone_of(config: &Config, identity: &Identity) -> String {
    let bound = identity.grants().zone;
    if bound.is_empty() { config.node.zone.clone() } else { bound }
}

pub(super) fn announcement(
    config: &Config,
    kind: NodeKind,
    identity: &Identity,
    authority: &SharedAuthority,
    known: &[Health],
) -> Announcement {
    Announcement {
        name: identity.name().clone(),
        kind,
        zone: zone_of(config, identity),
        services: config
            .service
            .iter()
            .map(|service| {
                let mut record = ServiceRecord::new(service.name.clone(), service.protocol.0);
                record.state = at_first(service, known);
                service.tell(&mut record);
                record
            })
            .collect(),
        phase: Phase::Up,
        cert_expires: identity.validity().1,
        issuer: authority.as_ref().map(|a| a.proof(identity.id())),
        speaks: Capabilities::own(env!("CARGO_PKG_VERSION")),
    }
}
