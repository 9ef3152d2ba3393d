//! `starling quota`

use http::Method;
use starling_protocol::admin::{QuotaOf, QuotaUse};

use crate::{
    Failure, admin,
    args::{Output, QuotaCommand},
    output,
};

pub(crate) async fn run(command: &QuotaCommand) -> Result<(), Failure> {
    let (args, path) = match command {
        QuotaCommand::Show(args) => (args, "/v1/quotas/show"),
        QuotaCommand::Reset(args) => (args, "/v1/quotas/reset"),
    };
    let body = serde_json::to_value(QuotaOf { consumer: args.consumer.clone(), address: args.address })?;
    let answer: serde_json::Value = admin::ask(&args.client.admin, Method::POST, path, Some(body)).await?;
    if let QuotaCommand::Reset(_) = command {
        let address = args.address.map(|address| address.to_string());
        eprintln!("{} begins anew on this edge", args.consumer.clone().or(address).unwrap_or_default());
        return Ok(());
    }
    let quotas: Vec<QuotaUse> = serde_json::from_value(answer)?;
    if args.client.output == Output::Json {
        return output::json(&quotas, false);
    }
    let row = |quota: &QuotaUse| {
        let resets = humantime::format_duration(std::time::Duration::from_secs(quota.resets_in_s)).to_string();
        vec![quota.plan.clone(), quota.period.clone(), quota.used.to_string(), quota.limit.to_string(), resets]
    };
    output::table(&["PLAN", "PERIOD", "USED", "OF", "RESETS IN"], quotas.iter().map(row).collect());
    Ok(())
}
