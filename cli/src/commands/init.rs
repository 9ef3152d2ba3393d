//! `starling init`

use starling_node::{Authority, StateDir};

use crate::{Failure, args::InitArgs};

pub(crate) fn run(args: &InitArgs) -> Result<(), Failure> {
    let state = StateDir::open(&args.state)?;
    Authority::init(&state, &args.mesh)?;
    let dir = args.state.display();
    println!("mesh {} made in {dir}", args.mesh);
    eprintln!("next: run its first node    starling node --state {dir} --name seed-1");
    eprintln!("      let others join       starling token create --state {dir} --service NAME --seed HOST:7400");
    eprintln!("      keep the root offline move {dir}/root/key.pem away; only making more issuers needs it");
    Ok(())
}
