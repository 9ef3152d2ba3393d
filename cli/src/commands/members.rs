//! `starling members`

use std::time::Duration;

use http::Method;
use starling_protocol::admin::Member;

use crate::{
    Failure, admin,
    args::{MembersArgs, Output},
    output,
};

const WATCH_PERIOD: Duration = Duration::from_millis(500);

pub(crate) async fn run(args: &MembersArgs) -> Result<(), Failure> {
    let mut last = None;
    loop {
        let mut members: Vec<Member> = admin::ask(&args.client.admin, Method::GET, "/v1/members", None).await?;
        members.retain(|m| args.status.as_ref().is_none_or(|re| re.is_match(m.status.as_str())));
        members.retain(|m| args.service.as_ref().is_none_or(|name| m.services.iter().any(|s| s.name == *name)));
        if last.as_ref() != Some(&members) {
            print(&members, args)?;
        }
        if !args.watch {
            return Ok(());
        }
        last = Some(members);
        tokio::time::sleep(WATCH_PERIOD).await;
    }
}

fn print(members: &[Member], args: &MembersArgs) -> Result<(), Failure> {
    match args.client.output {
        Output::Json if args.watch => {
            // One object a line.
            members.iter().try_for_each(|m| output::json(m, true))?;
        }
        Output::Json => output::json(&members, false)?,
        Output::Table => {
            let rows = members.iter().map(|m| {
                let name = if m.is_self { format!("{}*", m.name) } else { m.name.clone() };
                vec![name, m.status.as_str().into(), m.addr.to_string(), services(m), m.zone.clone()]
            });
            output::table(&["NAME", "STATUS", "ADDRESS", "SERVICES", "ZONE"], rows.collect());
        }
        Output::Wide => {
            let rows = members.iter().map(|m| {
                let name = if m.is_self { format!("{}*", m.name) } else { m.name.clone() };
                let kind = format!("{:?}", m.kind).to_lowercase();
                vec![
                    name,
                    kind,
                    m.status.as_str().into(),
                    m.addr.to_string(),
                    services(m),
                    m.zone.clone(),
                    m.generation.to_string(),
                    m.incarnation.to_string(),
                    m.since.clone(),
                    m.cert_expires.clone().unwrap_or_default(),
                    m.id.clone(),
                ]
            });
            let header = [
                "NAME",
                "KIND",
                "STATUS",
                "ADDRESS",
                "SERVICES",
                "ZONE",
                "GENERATION",
                "INCARNATION",
                "SINCE",
                "CERT ENDS",
                "ID",
            ];
            output::table(&header, rows.collect());
        }
    }
    if args.watch && args.client.output != Output::Json {
        println!();
    }
    Ok(())
}

fn services(member: &Member) -> String {
    let names = member.services.iter().map(|s| match s.version.as_str() {
        "" => s.name.to_string(),
        version => format!("{}:{version}", s.name),
    });
    names.collect::<Vec<_>>().join(",")
}
