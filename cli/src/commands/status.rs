//! `starling status`

use http::Method;
use starling_protocol::admin::Status;

use crate::{
    Failure, admin,
    args::{ClientArgs, Output},
    output,
};

pub(crate) async fn run(args: &ClientArgs) -> Result<(), Failure> {
    let status: Status = admin::ask(&args.admin, Method::GET, "/v1/status", None).await?;
    if args.output == Output::Json {
        return output::json(&status, false);
    }
    let mut rows = vec![
        ("node", format!("{} ({:?}), {}", status.name, status.kind, status.phase).to_lowercase()),
        ("identity", status.spiffe_id),
        ("mesh port", format!("{} (told: {})", status.listen, status.advertise)),
        ("outbound", status.outbound.map_or("off".into(), |addr| addr.to_string())),
        ("members", format!("{} alive of {} known", status.members_alive, status.members)),
        ("issuers", format!("{} alive{}", status.issuers_alive, if status.issuer { ", this node is one" } else { "" })),
        ("certificate", format!("ends {}", status.cert_expires)),
        ("first to end", status.first_cert_expires),
        ("generation", status.generation.to_string()),
        ("in flight", status.in_flight.to_string()),
        ("up", format!("{} s, version {}", status.uptime_s, status.version)),
    ];
    rows.extend(status.predecessor.map(|pid| ("upgraded", format!("process {pid} still finishes what it has"))));
    rows.extend(status.unreachable_seeds.into_iter().map(|seed| ("unreachable", seed)));
    rows.extend(status.not_reached.into_iter().map(|why| ("not reached", why)));
    rows.extend(
        status.also_at.map(|addr| ("also at", format!("{addr}: another node runs with this one's key; stop one"))),
    );
    rows.extend(status.reload_error.into_iter().map(|error| ("last reload", error)));
    for (name, value) in rows {
        println!("{name:<13} {value}");
    }
    Ok(())
}
