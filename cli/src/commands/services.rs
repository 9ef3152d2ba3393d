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
                row.extend([i.addr.to_string(), i.zone.clone()]);
            }
            row
        })
    });
    let header = ["SERVICE", "VERSION", "NODE", "STATE", "ADDRESS", "ZONE"];
    output::table(&header[..if wide { 6 } else { 4 }], rows.collect());
    Ok(())
}
