//! `starling edge`

pub(super) mod publication;

use std::time::Duration;

use http::Method;
use starling_edge::Edge;
use starling_node::Place;
use starling_protocol::admin::{Explain, Explanation};

use crate::{
    Failure, admin,
    args::{EdgeArgs, EdgeCommand, ExplainArgs, Output, RunEdgeArgs},
    commands::takeover,
    logging, output,
};

pub(crate) async fn run(args: &EdgeArgs) -> Result<(), Failure> {
    match &args.command {
        Some(EdgeCommand::Explain(args)) => return explain(args).await,
        Some(EdgeCommand::Publish(args)) => return publication::publish(args).await,
        Some(EdgeCommand::Rollback(args)) => return publication::roll_back(args).await,
        None => {}
    }
    let args = &args.run;
    logging::start();
    super::node::follow_parent();
    super::node::raise_descriptors();
    let (edge, patience) = takeover::start_in_place(async |place| start(args, place).await).await?;
    super::node::until_done(edge.node(), patience).await
}

async fn start(args: &RunEdgeArgs, place: &mut Place) -> Result<(Edge, Duration), Failure> {
    let file = args.config.as_ref().ok_or_else(|| Failure::coded(2, "an edge needs its file: --config FILE"))?;
    let text = super::node::read_file(file)?;
    let (config, problems) = starling_edge::read_config(&text);
    let Some((mut config, sections)) = config else {
        return Err(Failure::failed(super::check::render(file, &problems)));
    };
    if args.token.is_some() {
        config.node.token = args.token.clone().map(Into::into);
    }
    if args.take_over {
        takeover::place_by_state(place, config.node.state.as_deref()).await?;
    }
    let listen = sections.edge.listen;
    let edge = Edge::start(&config, sections, file.clone(), place).await?;
    edge.node().take_charge(place).await?;
    tracing::info!(name = %edge.node().name(), public = %listen, mesh_port = %edge.node().listen(), told = %edge.node().advertise(), "edge is up");
    Ok((edge, config.node.drain_timeout))
}

async fn explain(args: &ExplainArgs) -> Result<(), Failure> {
    let field = |text: &String| {
        let (name, value) = text.split_once(':').ok_or_else(|| {
            Failure::coded(2, format!("{text:?} is no field of a request: write it as \"name: value\""))
        })?;
        Ok((name.trim().to_owned(), value.trim().to_owned()))
    };
    let headers = args.headers.iter().map(field).collect::<Result<_, Failure>>()?;
    let asked = Explain { method: args.method.to_uppercase(), url: args.url.clone(), headers };
    let body = Some(serde_json::to_value(asked)?);
    let told: Explanation = admin::ask(&args.client.admin, Method::POST, "/v1/explain", body).await?;
    if args.client.output == Output::Json {
        return output::json(&told, false);
    }
    let mut rows = Vec::new();
    let mut row = |what: &str, text: String| rows.push(vec![what.to_owned(), text]);
    if let Some(route) = &told.route {
        row("route", format!("{} {}", route.host, route.path));
        row("because", told.because.clone());
        if let Some(service) = &route.service {
            row("service", format!("{service}, as {} {}", told.method, told.path.clone().unwrap_or_default()));
        }
        if let Some(redirected) = &told.redirected {
            row("redirect", redirected.clone());
        }
        let auth = if route.auth.is_empty() { "nobody is asked".to_owned() } else { route.auth.join(" or ") };
        row("who", auth);
        if let (Some(version), Some(by)) = (&told.version, &told.version_by) {
            row("version", format!("{version}, by {by}"));
        }
        for (name, value) in &told.fields {
            row("", format!("{name}: {value}"));
        }
        if let Some(plan) = &route.plan {
            row("plan", format!("{plan}, of which it takes {}; a key's own plan goes before it", told.cost));
            told.limits.iter().for_each(|limit| row("", limit.clone()));
        }
    }
    if let Some(refused) = &told.refused {
        row("refused", format!("{}: {}", refused.status, refused.why));
    }
    output::table(&["REQUEST", &format!("{} {}", told.method, told.url)], rows);
    Ok(())
}
