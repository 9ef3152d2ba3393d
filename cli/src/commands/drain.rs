//! `starling drain`, `starling leave`

use http::Method;

use crate::{Failure, admin, args::ClientArgs};

pub(crate) async fn run(args: &ClientArgs, path: &str) -> Result<(), Failure> {
    let _: serde_json::Value = admin::ask(&args.admin, Method::POST, path, None).await?;
    eprintln!("the node finishes what is under way, then leaves");
    Ok(())
}
