//! `starling force-leave`

use base64::{Engine, engine::general_purpose::STANDARD};
use http::Method;
use starling_node::{Admin, StateDir};
use starling_protocol::{
    NodeId, Strike,
    admin::{Forget, Member},
    encode,
};

use crate::{Failure, admin, args::ForceLeaveArgs};

pub(crate) async fn run(args: &ForceLeaveArgs) -> Result<(), Failure> {
    let signed = match &args.state {
        Some(state) => Some(sign(args, state).await?),
        None => None,
    };
    let body = serde_json::to_value(Forget { node: args.node.clone(), prune: args.prune, signed })?;
    let _: serde_json::Value = admin::ask(&args.client.admin, Method::POST, "/v1/forget", Some(body)).await?;
    let what = if args.prune { "is not shown any more" } else { "is shown as left" };
    eprintln!("{} {what}; if it comes back, it is a member like any other", args.node);
    Ok(())
}

/// The strike, signed with the admin key of that directory; base64.
async fn sign(args: &ForceLeaveArgs, state: &std::path::Path) -> Result<String, Failure> {
    let key = Admin::require(&StateDir::existing(state)?)?;
    let members: Vec<Member> = admin::ask(&args.client.admin, Method::GET, "/v1/members", None).await?;
    let member = members.iter().find(|m| m.name == args.node || m.id == args.node);
    let member = member.ok_or_else(|| Failure::failed(format!("no member has the name or id {:?}", args.node)))?;
    let id: NodeId = member.id.parse().map_err(|_| Failure::failed("the node tells an id that is none"))?;
    let strike = Strike { id, generation: member.generation, prune: args.prune };
    Ok(STANDARD.encode(encode(&key.strike(&strike))))
}
