//! `starling edge`

use starling_edge::Edge;

use crate::{Failure, args::EdgeArgs, logging};

pub(crate) async fn run(args: &EdgeArgs) -> Result<(), Failure> {
    logging::start();
    super::node::follow_parent();
    super::node::raise_descriptors();
    let text = super::node::read_file(&args.config)?;
    let (config, problems) = starling_edge::read_config(&text);
    let Some((mut config, sections)) = config else {
        return Err(Failure::failed(super::check::render(&args.config, &problems)));
    };
    if args.token.is_some() {
        config.node.token = args.token.clone().map(Into::into);
    }
    let patience = config.node.drain_timeout;
    let listen = sections.edge.listen;
    let edge = Edge::start(&config, sections, args.config.clone()).await?;
    tracing::info!(name = %edge.node().name(), public = %listen, mesh_port = %edge.node().listen(), told = %edge.node().advertise(), "edge is up");
    super::node::until_done(edge.node(), patience).await
}
