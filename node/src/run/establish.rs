//! The identity that a node starts with: stored, given by the local issuer, or for a token.

use std::{io, net::SocketAddr};

use starling_protocol::{JoinToken, Name, NodeKind};

use super::StartError;
use crate::{
    config::Config,
    identity::{
        Identity,
        authority::SharedAuthority,
        join::{Application, JoinError, join},
        load_or_create_key, tls, unix_now,
    },
    state::StateDir,
};

/// The stored identity, or one that the local issuer gives, or one for the token; and addresses that the mesh told.
pub(super) async fn establish_identity(
    config: &Config,
    kind: NodeKind,
    state: &StateDir,
    authority: &SharedAuthority,
) -> Result<(Identity, Vec<SocketAddr>), StartError> {
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
    let token = read_token(config)?;
    let is_fresh = |identity: &Identity| {
        // A certificate past its end and its grace cannot renew itself.
        unix_now() < identity.validity().1.saturating_add(tls::EXPIRED_GRACE.as_secs())
    };
    let may_be = |identity: &Identity| kind == NodeKind::Node || identity.is_edge();
    match stored {
        Some(stored) if missing(&stored).is_none() && may_be(&stored) && is_fresh(&stored) && authority.is_none() => {
            return Ok((stored, Vec::new()));
        }
        Some(stored) if authority.is_none() && token.is_none() => {
            if let Some(service) = missing(&stored) {
                return Err(StartError::NotGranted { name: stored.name().clone(), service });
            }
            if !may_be(&stored) {
                return Err(StartError::NotAnEdge { name: stored.name().clone() });
            }
            return Ok((stored, Vec::new()));
        }
        _ => {}
    }
    let name = config.node.name.clone().or(stored_name).unwrap_or_else(default_name);
    if let Some(authority) = authority {
        let key = load_or_create_key(state)?;
        let issued = authority.self_issue(&name, &services, kind == NodeKind::Edge, &key).map_err(JoinError::from)?;
        let (chain, root) = issued;
        return Ok((Identity::establish(state, key, chain, vec![root], provider)?, Vec::new()));
    }
    let token = token.ok_or_else(|| StartError::NoToken { path: state.path().display().to_string() })?;
    if kind == NodeKind::Edge && !token.claims.grants.edge {
        return Err(JoinError::from(starling_protocol::Refusal::NotGranted("an edge (--edge)".into())).into());
    }
    let application = Application { token: &token, name: &name, services: &services, seeds: &config.node.seeds };
    Ok(join(state, &application, provider).await?)
}

pub(super) fn read_token(config: &Config) -> Result<Option<JoinToken>, StartError> {
    let text = match (&config.node.token, &config.node.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => text,
            // It is for the first start only, and may be gone by the second.
            Err(e) if e.kind() == io::ErrorKind::NotFound && has_identity(config) => return Ok(None),
            Err(source) => return Err(StartError::TokenFile { path: path.clone(), source }),
        },
        (None, None) => return Ok(None),
    };
    Ok(Some(text.parse()?))
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
