//! `starling certificates`

use http::Method;
use starling_protocol::admin::{Certificate, CertificateState, RenewCertificate};

use crate::{
    Failure, admin,
    args::{CertificatesArgs, CertificatesCommand, Output},
    output,
};

pub(crate) async fn run(args: &CertificatesArgs) -> Result<(), Failure> {
    if let Some(CertificatesCommand::Renew(renew)) = &args.command {
        let body = serde_json::to_value(RenewCertificate { host: renew.host.clone() })?;
        let path = "/v1/certificates/renew";
        let _: serde_json::Value = admin::ask(&renew.client.admin, Method::POST, path, Some(body)).await?;
        eprintln!("the authority is asked; see `starling certificates` for how it goes");
        return Ok(());
    }
    let certificates: Vec<Certificate> = admin::ask(&args.client.admin, Method::GET, "/v1/certificates", None).await?;
    if args.client.output == Output::Json {
        return output::json(&certificates, false);
    }
    let row = |certificate: &Certificate| {
        let state = match certificate.state {
            CertificateState::Valid => "valid",
            CertificateState::Ended => "ended",
            CertificateState::StandIn => "stand-in",
        };
        let (next, error) = match &certificate.issuance {
            Some(issuance) => (issuance.next.clone(), issuance.error.clone().unwrap_or_default()),
            None => ("from files".into(), String::new()),
        };
        vec![certificate.hosts.join(", "), state.into(), certificate.until.clone().unwrap_or_default(), next, error]
    };
    output::table(&["HOSTS", "STATE", "UNTIL", "NEXT", "LAST ERROR"], certificates.iter().map(row).collect());
    Ok(())
}
