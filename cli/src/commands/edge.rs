//! `starling edge`

use std::time::Duration;

use starling_edge::Edge;
use starling_node::Place;

use crate::{Failure, args::EdgeArgs, commands::takeover, logging};

pub(crate) async fn run(args: &EdgeArgs) -> Result<(), Failure> {
    logging::start();
    super::node::follow_parent();
    super::node::raise_descriptors();
    let (edge, patience) = takeover::start_in_place(async |place| start(args, place).await).await?;
    super::node::until_done(edge.node(), patience).await
}

async fn start(args: &EdgeArgs, place: &mut Place) -> Result<(Edge, Duration), Failure> {
    let text = super::node::read_file(&args.config)?;
    let (config, problems) = starling_edge::read_config(&text);
    let Some((mut config, sections)) = config else {
        return Err(Failure::failed(super::check::render(&args.config, &problems)));
    };
    if args.token.is_some() {
        config.node.token = args.token.clone().map(Into::into);
    }
    if args.take_over {
        takeover::place_by_state(place, config.node.state.as_deref()).await?;
    }
    let listen = sections.edge.listen;
    let edge = Edge::start(&config, sections, args.config.clone(), place).await?;
    edge.node().take_charge(place).await?;
    tracing::info!(name = %edge.node().name(), public = %listen, mesh_port = %edge.node().listen(), told = %edge.node().advertise(), "edge is up");
    Ok((edge, config.node.drain_timeout))
}
