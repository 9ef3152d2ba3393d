//! `starling ping`

use std::time::Duration;

use http::Method;
use starling_protocol::admin::{Ping, Pinged};

use crate::{
    Failure, admin,
    args::{Output, PingArgs},
    output,
};

const PAUSE: Duration = Duration::from_millis(200);

pub(crate) async fn run(args: &PingArgs) -> Result<(), Failure> {
    let mut times = Vec::new();
    for number in 1..=args.count {
        let body = serde_json::to_value(Ping { node: args.node.clone() })?;
        let pinged: Pinged = admin::ask(&args.client.admin, Method::POST, "/v1/ping", Some(body)).await?;
        times.push(pinged.rtt_us);
        match args.client.output {
            Output::Json => output::json(&pinged, true)?,
            _ => println!("{} ({}): {}", pinged.node, pinged.addr, milliseconds(pinged.rtt_us)),
        }
        if number < args.count {
            tokio::time::sleep(PAUSE).await;
        }
    }
    times.sort_unstable();
    let (least, median, most) = (times[0], times[times.len() / 2], times[times.len() - 1]);
    eprintln!(
        "{} answers; least {}, median {}, most {}",
        times.len(),
        milliseconds(least),
        milliseconds(median),
        milliseconds(most)
    );
    Ok(())
}

fn milliseconds(us: u64) -> String {
    format!("{:.3} ms", us as f64 / 1000.0)
}
