//! `starling services`

use http::Method;
use starling_protocol::{ServiceState, admin::Service};

use crate::{
    Failure, admin,
    args::{ClientArgs, Output},
    output,
};

pub(crate) async fn run(args: &ClientArgs) -> Result<(), Failure> {
    let services: Vec<Service> = admin::ask(&args.admin, Method::GET, "/v1/services", None).await?;
    if args.output == Output::Json {
        return output::json(&services, false);
    }
    let wide = args.output == Output::Wide;
    let rows = services.iter().flat_map(|service| {
        service.instances.iter().map(move |i| {
            let state = match (i.state, i.ejected) {
                (_, true) => "ejected".to_string(),
                (ServiceState::Up, false) => i.status.to_string(),
                (state, false) => format!("{state:?}").to_lowercase(),
            };
            let mut row = vec![service.name.to_string(), service.version.clone(), i.node.clone(), state];
            if wide {
                row.extend([i.addr.to_string(), i.zone.clone(), i.protocol.to_string()]);
                row.extend([i.in_flight.to_string(), i.latency_us.map_or("-".into(), milliseconds)]);
                row.push(i.limit.map_or("-".into(), |limit| format!("{} ({} shed)", limit.calls, limit.shed)));
            }
            row
        })
    });
    let header =
        ["SERVICE", "VERSION", "NODE", "STATE", "ADDRESS", "ZONE", "PROTOCOL", "IN FLIGHT", "LATENCY", "LIMIT"];
    output::table(&header[..if wide { header.len() } else { 4 }], rows.collect());
    if wide {
        repeats(&services);
    }
    Ok(())
}

/// What calls of this node's were repeated, by service: the versions of one have that in common.
fn repeats(services: &[Service]) {
    let mut by_name: Vec<&Service> = services.iter().collect();
    by_name.dedup_by(|a, b| a.name == b.name);
    let rows: Vec<_> = (by_name.into_iter())
        .filter(|service| service.retries + service.hedges + service.retries_denied > 0)
        .map(|service| {
            let counts = [service.retries, service.hedges, service.retries_denied].map(|count| count.to_string());
            [vec![service.name.to_string()], counts.to_vec()].concat()
        })
        .collect();
    if !rows.is_empty() {
        println!();
        output::table(&["SERVICE", "RETRIES", "HEDGES", "DENIED"], rows);
    }
}

fn milliseconds(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}
