//! `starling names`

use http::Method;
use starling_protocol::admin::{FreeName, OwnedName};

use crate::{
    Failure, admin,
    args::{NamesArgs, NamesCommand, Output},
    output,
};

pub(crate) async fn run(args: &NamesArgs) -> Result<(), Failure> {
    if let Some(NamesCommand::Free(free)) = &args.command {
        let body = serde_json::to_value(FreeName { name: free.name.clone() })?;
        let _: serde_json::Value = admin::ask(&free.client.admin, Method::POST, "/v1/names/free", Some(body)).await?;
        eprintln!("{} is free; a node that still has it cannot renew its certificate", free.name);
        return Ok(());
    }
    let names: Vec<OwnedName> = admin::ask(&args.client.admin, Method::GET, "/v1/names", None).await?;
    if args.client.output == Output::Json {
        return output::json(&names, false);
    }
    let row =
        |owned: &OwnedName| vec![owned.name.to_string(), owned.id.clone(), owned.since.clone(), owned.until.clone()];
    output::table(&["NAME", "KEY", "SINCE", "UNTIL"], names.iter().map(row).collect());
    Ok(())
}
