//! Starting in the place of a process that runs.

use std::path::{Path, PathBuf};

use starling_node::{Place, TAKEOVER_ENVIRONMENT, TAKEOVER_SOCKET};

use crate::Failure;

/// The place of the process that has started this one for that; a new one otherwise. Asked first of all, so that the other one
/// learns whatever goes wrong here.
pub(crate) async fn place_by_environment() -> Result<Place, Failure> {
    match std::env::var_os(TAKEOVER_ENVIRONMENT).map(PathBuf::from) {
        Some(socket) => Ok(Place::of_another(&socket).await?),
        None => Ok(Place::default()),
    }
}

/// The same, for a process that is told to take over by its arguments.
pub(crate) async fn place_by_state(place: &mut Place, state: Option<&Path>) -> Result<(), Failure> {
    if place.predecessor().is_none() {
        let state = state.ok_or_else(|| Failure::failed("--take-over needs the state directory; give --state DIR"))?;
        *place = Place::of_another(&state.join(TAKEOVER_SOCKET)).await?;
    }
    Ok(())
}
