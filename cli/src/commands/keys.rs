//! `starling keys`
use crate::{Failure, args::KeysCommand};
pub(crate) async fn run(_: &KeysCommand) -> Result<(), Failure> { Err(Failure::failed("later")) }
