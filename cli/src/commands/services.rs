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
    let has_ends = services.iter().any(|service| service.deprecated.is_some() || service.sunset.is_some());
    let rows = services.iter().flat_map(|service| {
        service.instances.iter().map(move |i| {
            let state = match (i.state, i.ejected) {
                (_, true) => "ejected".to_string(),
                (ServiceState::Up, false) => i.status.to_string(),
                (state, false) => format!("{state:?}").to_lowercase(),
            };
            let mut row = vec![service.name.to_string(), service.version.clone(), i.node.clone(), state];
            if has_ends {
                row.push(end_of(service));
            }
            if wide {
                row.extend([i.addr.to_string(), i.zone.clone(), i.protocol.to_string()]);
                row.extend([i.in_flight.to_string(), i.latency_us.map_or("-".into(), milliseconds)]);
                row.push(i.limit.map_or("-".into(), |limit| format!("{} ({} shed)", limit.calls, limit.shed)));
            }
            row
        })
    });
    let mut header = vec!["SERVICE", "VERSION", "NODE", "STATE"];
    header.extend(has_ends.then_some("VERSION IS"));
    if wide {
        header.extend(["ADDRESS", "ZONE", "PROTOCOL", "IN FLIGHT", "LATENCY", "LIMIT"]);
    }
    output::table(&header, rows.collect());
    if wide {
        repeats(&services);
    }
    Ok(())
}

/// What its nodes say of the end of a version.
fn end_of(service: &Service) -> String {
    let day = |date: &Option<String>| date.as_ref().map(|date| date.split('T').next().unwrap_or_default().to_owned());
    let (deprecated, sunset) = (day(&service.deprecated), day(&service.sunset));
    let ends = [deprecated.map(|d| format!("deprecated {d}")), sunset.map(|d| format!("gone {d}"))];
    match ends.into_iter().flatten().collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => "-".into(),
        ends => ends,
    }
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
