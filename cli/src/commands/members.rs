//! `starling members`

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use http::Method;
use starling_protocol::admin::{Member, MemberDetail, ObserverView};

use crate::{
    Failure, admin,
    args::{MembersArgs, Output},
    output,
};

const WATCH_PERIOD: Duration = Duration::from_millis(500);

pub(crate) async fn run(args: &MembersArgs) -> Result<(), Failure> {
    if args.from.is_some() {
        return compare(args).await;
    }
    let path = match args.client.output {
        // Under --watch, a round trip that has changed is no change.
        Output::Wide if !args.watch => "/v1/members?detail=true",
        _ => "/v1/members",
    };
    let mut last = None;
    loop {
        let mut members: Vec<Member> = admin::ask(&args.client.admin, Method::GET, path, None).await?;
        members.retain(|m| args.status.as_ref().is_none_or(|re| re.is_match(&m.status.to_string())));
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
                vec![name, m.status.to_string(), m.addr.to_string(), services(m), m.zone.clone()]
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
                    m.status.to_string(),
                    m.addr.to_string(),
                    services(m),
                    m.zone.clone(),
                    m.generation.to_string(),
                    m.incarnation.to_string(),
                    m.since.clone(),
                    detail(m, |d| d.heard_ms_ago.map(|ms| format!("{:.1} s", ms as f64 / 1000.0))),
                    m.suspected_by.join(","),
                    detail(m, |d| Some(d.connection.clone())),
                    detail(m, |d| d.rtt_us.map(|us| format!("{:.2} ms", us as f64 / 1000.0))),
                    detail(m, |d| d.root.as_ref().map(|root| root.chars().take(8).collect())),
                    detail(m, |d| (!d.refused.is_nothing()).then(|| d.refused.total().to_string())),
                    detail(m, |d| (!d.software.is_empty()).then(|| d.software.clone())),
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
                "HEARD",
                "SUSPECTED BY",
                "LINK",
                "RTT",
                "ROOT",
                "REFUSED",
                "VERSION",
                "CERT ENDS",
                "ID",
            ];
            output::table(&header, rows.collect());
        }
    }
    for twice in members {
        if let Some(other) = twice.also_at {
            eprintln!(
                "{}: two nodes run with its key ({}), at {} and {other}, because a state directory was copied; stop one, and let \
                 it join anew with an empty --state",
                twice.name, twice.id, twice.addr
            );
        }
    }
    if args.watch && args.client.output != Output::Json {
        println!();
    }
    Ok(())
}

fn detail(member: &Member, pick: impl Fn(&MemberDetail) -> Option<String>) -> String {
    member.detail.as_ref().and_then(pick).unwrap_or_else(|| "-".into())
}

/// Everybody's view of everybody: a row for each member that is seen, a column for each node that was asked.
async fn compare(args: &MembersArgs) -> Result<(), Failure> {
    let views: Vec<ObserverView> = admin::ask(&args.client.admin, Method::GET, "/v1/members?from=all", None).await?;
    let subjects: BTreeSet<&String> = views.iter().flat_map(|view| view.sees.keys()).collect();
    let asked = || views.iter().filter(|view| view.error.is_none());
    let differ = |subject: &String| {
        let seen: HashSet<_> = asked().map(|view| view.sees.get(subject)).collect();
        seen.len() > 1
    };
    let disputed = subjects.iter().filter(|subject| differ(subject)).count();
    if args.client.output == Output::Json {
        output::json(&views, false)?;
    } else {
        let header: Vec<&str> =
            ["MEMBER"].into_iter().chain(views.iter().map(|v| v.observer.as_str())).chain([""]).collect();
        let row = |subject: &&String| {
            let seen = views.iter().map(|view| match (&view.error, view.sees.get(*subject)) {
                (Some(_), _) => "?".to_string(),
                (None, Some(status)) => status.to_string(),
                (None, None) => "-".to_string(),
            });
            let mark = if differ(subject) { "<- differs" } else { "" };
            [(*subject).clone()].into_iter().chain(seen).chain([mark.to_string()]).collect()
        };
        output::table(&header, subjects.iter().map(row).collect());
    }
    for view in views.iter().filter(|view| view.error.is_some()) {
        eprintln!("{} could not be asked: {}", view.observer, view.error.as_deref().unwrap_or_default());
    }
    match disputed {
        0 => eprintln!("{} views agree about {} members", asked().count(), subjects.len()),
        _ => eprintln!("{} views differ about {disputed} of {} members", asked().count(), subjects.len()),
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
