//! Starting in the place of a process that runs.

use std::path::{Path, PathBuf};

use starling_node::{Place, TAKEOVER_ENVIRONMENT, TAKEOVER_SOCKET};

use crate::Failure;

/// Starts in the place of the process that has started this one for that; in a new one otherwise. It is asked first of all, so that
/// the other one learns whatever goes wrong here.
pub(crate) async fn start_in_place<T>(start: impl AsyncFnOnce(&mut Place) -> Result<T, Failure>) -> Result<T, Failure> {
    let mut place = match std::env::var_os(TAKEOVER_ENVIRONMENT).map(PathBuf::from) {
        Some(socket) => Place::of_another(&socket).await?,
        None => Place::default(),
    };
    let started = start(&mut place).await;
    if let Err(error) = &started {
        place.give_up(&error.to_string()).await;
    }
    started
}

/// The place of the process that runs on that state directory, for one that is told by its arguments to take over.
pub(crate) async fn place_by_state(place: &mut Place, state: Option<&Path>) -> Result<(), Failure> {
    if place.predecessor().is_none() {
        let state = state.ok_or_else(|| Failure::failed("--take-over needs the state directory; give --state DIR"))?;
        *place = Place::of_another(&state.join(TAKEOVER_SOCKET)).await?;
    }
    Ok(())
}
