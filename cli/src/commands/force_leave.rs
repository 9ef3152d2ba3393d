//! `starling force-leave`

use http::Method;
use starling_protocol::admin::Forget;

use crate::{Failure, admin, args::ForceLeaveArgs};

pub(crate) async fn run(args: &ForceLeaveArgs) -> Result<(), Failure> {
    let body = serde_json::to_value(Forget { node: args.node.clone(), prune: args.prune })?;
    let _: serde_json::Value = admin::ask(&args.client.admin, Method::POST, "/v1/forget", Some(body)).await?;
    let what = if args.prune { "is not shown any more" } else { "is shown as left" };
    eprintln!("{} {what}; if it comes back, it is a member like any other", args.node);
    Ok(())
}
