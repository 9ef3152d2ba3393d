//! `starling upgrade`

use std::time::Duration;

use http::Method;
use starling_protocol::admin::{Upgrade, Upgraded};

use crate::{
    Failure, admin,
    args::{Output, UpgradeArgs},
    output,
};

/// How long the new process may take to start, check everything and get to know the mesh.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) async fn run(args: &UpgradeArgs) -> Result<(), Failure> {
    // Of this command's directory, not of the node's.
    let binary = args.binary.as_ref().map(std::path::absolute).transpose()?;
    let body = serde_json::to_value(Upgrade { binary: binary.map(|path| path.to_string_lossy().into_owned()) })?;
    let upgraded: Upgraded =
        admin::ask_for(PATIENCE, &args.client.admin, Method::POST, "/v1/upgrade", Some(body)).await?;
    if args.client.output == Output::Json {
        return output::json(&upgraded, false);
    }
    let Upgraded { pid, version, predecessor } = upgraded;
    eprintln!("process {pid} (starling {version}) has taken over; {predecessor} finishes what it has");
    Ok(())
}
