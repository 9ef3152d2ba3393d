//! `starling edge`
use crate::{Failure, args::EdgeArgs};
pub(crate) async fn run(_: &EdgeArgs) -> Result<(), Failure> { Err(Failure::failed("later")) }
