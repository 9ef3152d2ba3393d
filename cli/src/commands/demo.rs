//! `starling demo`
use crate::{Failure, args::DemoArgs};
pub(crate) async fn run(_: &DemoArgs) -> Result<(), Failure> { Err(Failure::failed("later")) }
