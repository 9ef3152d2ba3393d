//! The identity that a node starts with: stored, given by the local issuer, or for a token.

use std::{io, net::SocketAddr};

use starling_protocol::{Grants, JoinToken, Name, NodeKind};

use super::StartError;
use crate::{
    config::Config,
    identity::{
        Identity,
        authority::SharedAuthority,
        join::{Bid, JoinError, Joined, join},
        load_or_create_key, tls, unix_now,
    },
    state::StateDir,
};

/// Who the node is, and what the mesh told it, if it has just joined.
pub(super) struct Established {
    pub(super) identity: Identity,
    pub(super) peers: Vec<SocketAddr>,
}

impl Established {
    fn alone(identity: Identity) -> Self {
        Self { identity, peers: Vec::new() }
    }
}

/// The stored identity, or one that the local issuer gives, or one for the token.
pub(super) async fn establish_identity(
    config: &Config,
    kind: NodeKind,
    state: &StateDir,
    authority: &SharedAuthority,
) -> Result<Established, StartError> {
    let provider = crate::identity::crypto_provider();
    let services: Vec<Name> = config.service.iter().map(|s| s.name.clone()).collect();
    let missing = |identity: &Identity| services.iter().find(|s| !identity.services().contains(s)).cloned();
    let stored = Identity::load(state, provider.clone())?;
    if let Some(stored) = &stored
        && config.node.name.as_ref().is_some_and(|name| name != stored.name())
    {
        return Err(StartError::OtherName { stored: stored.name().clone() });
    }
    let stored_name = stored.as_ref().map(|stored| stored.name().clone());
    let is_fresh = |identity: &Identity| {
        // A certificate past its end and its grace cannot renew itself.
        unix_now() < identity.validity().1.saturating_add(tls::EXPIRED_GRACE.as_secs())
    };
    let may_be = |identity: &Identity| kind == NodeKind::Node || identity.is_edge();
    match stored {
        Some(stored) if missing(&stored).is_none() && may_be(&stored) && is_fresh(&stored) && authority.is_none() => {
            return Ok(Established::alone(stored));
        }
        Some(stored) if authority.is_none() && !has_token(config) => {
            if let Some(service) = missing(&stored) {
                return Err(StartError::NotGranted { name: stored.name().clone(), service });
            }
            if !may_be(&stored) {
                return Err(StartError::NotAnEdge { name: stored.name().clone() });
            }
            return Ok(Established::alone(stored));
        }
        _ => {}
    }
    let name = config.node.name.clone().or(stored_name).unwrap_or_else(default_name);
    if let Some(authority) = authority {
        let key = load_or_create_key(state)?;
        let grants = Grants { services, edge: kind == NodeKind::Edge, ..Grants::default() };
        let (chain, root) = authority.self_issue(&name, &grants, &key).map_err(JoinError::from)?;
        return Ok(Established::alone(Identity::establish(state, key, chain, root, provider)?));
    }
    // Not before it is needed: a node that has joined starts whatever became of its token.
    let token = read_token(config)?.ok_or_else(|| StartError::NoToken { path: state.path().display().to_string() })?;
    if kind == NodeKind::Edge && !token.claims.grants.edge {
        return Err(JoinError::from(starling_protocol::Refusal::not_granted("an edge (--edge)")).into());
    }
    let zone = &token.claims.grants.zone;
    if !zone.is_empty() && !config.node.zone.is_empty() && *zone != config.node.zone {
        return Err(JoinError::from(starling_protocol::Refusal::not_granted(format!(
            "zone {}; it is for zone {zone}",
            config.node.zone
        )))
        .into());
    }
    let bid = Bid { token: &token, name: &name, services: &services, seeds: &config.node.seeds };
    let Joined { identity, peers } = join(state, &bid, provider).await?;
    Ok(Established { identity, peers })
}

pub(super) fn read_token(config: &Config) -> Result<Option<JoinToken>, StartError> {
    let text = match (&config.node.token, &config.node.token_file) {
        (Some(token), _) => token.expose().to_owned(),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => {
                warn_if_shared(path);
                text
            }
            // It is for the first start only, and may be gone by the second.
            Err(e) if e.kind() == io::ErrorKind::NotFound && has_identity(config) => return Ok(None),
            Err(source) => return Err(StartError::TokenFile { path: path.clone(), source }),
        },
        (None, None) => return Ok(None),
    };
    Ok(Some(text.parse()?))
}

/// Whether there is a token to join with.
fn has_token(config: &Config) -> bool {
    config.node.token.is_some() || config.node.token_file.as_ref().is_some_and(|path| path.exists())
}

/// Whoever can read a token can join.
fn warn_if_shared(path: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode() & 0o777);
    if mode & 0o077 != 0 {
        let (path, mode) = (path.display(), format!("{mode:o}"));
        tracing::warn!(%path, mode, "other users can read the token file, and so can join; chmod 600 it");
    }
}

pub(super) fn has_identity(config: &Config) -> bool {
    config.node.state.as_ref().is_some_and(|state| state.join("identity/chain.pem").exists())
}

/// First label of the host name, as far as it can be a name.
pub(super) fn default_name() -> Name {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let label = host.trim().split('.').next().unwrap_or_default().to_ascii_lowercase();
    label.parse().unwrap_or_else(|_| "node".parse().expect("a valid name"))
}
