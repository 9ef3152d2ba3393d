//! `starling token create`

use starling_node::{Authority, StateDir, TokenRequest};
use starling_protocol::Grants;

use crate::{Failure, args::TokenArgs};

pub(crate) fn create(args: &TokenArgs) -> Result<(), Failure> {
    if !args.state.is_dir() {
        return Err(Failure::failed(format!(
            "{} is not a directory; give the one that `starling init` filled",
            args.state.display()
        )));
    }
    let authority = Authority::require(&StateDir::existing(&args.state)?)?;
    let token = authority.token(&TokenRequest {
        grants: Grants {
            services: args.services.clone(),
            edge: args.edge,
            issuer: args.issuer,
            names: args.names.clone(),
            zone: args.zone.clone(),
        },
        seeds: args.seeds.clone(),
        ttl: args.ttl,
        uses: args.uses,
    });
    println!("{token}");
    Ok(())
}
