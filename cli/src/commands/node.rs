//! `starling node`

use std::{net::SocketAddr, time::Duration};

use rustix::{
    event::{PollFd, PollFlags},
    process::{self, Pid, PidfdFlags, getpid, kill_process, pidfd_open},
};
use starling_node::{
    EXIT_WITH, Node, Place,
    config::{self, CheckedProtocol, Config, ServiceConfig, UpstreamConfig},
};
use starling_protocol::NodeKind;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{Failure, args::NodeArgs, commands::takeover, logging, service_manager};

pub(crate) async fn run(args: &NodeArgs) -> Result<(), Failure> {
    logging::start();
    follow_parent();
    raise_descriptors();
    let (node, patience) = takeover::start_in_place(async |place| start(args, place).await).await?;
    until_done(&node, patience).await
}

async fn start(args: &NodeArgs, place: &mut Place) -> Result<(Node, Duration), Failure> {
    let config = configuration(args)?;
    if args.take_over {
        takeover::place_by_state(place, config.node.state.as_deref()).await?;
    }
    let node = Node::start(&config, NodeKind::Node, place).await?;
    if args.config.is_some() {
        let (args, reconfigure) = (args.clone(), node.reconfigurer());
        node.set_reload(move || reconfigure(&configuration(&args).map_err(|e| e.to_string())?));
    }
    node.take_charge(place).await?;
    tracing::info!(name = %node.name(), mesh_port = %node.listen(), told = %node.advertise(), admin = %config.admin.listen, "node is up");
    Ok((node, config.node.drain_timeout))
}

/// Serves until a signal or the admin API ends it: SIGTERM and SIGINT drain, a second one exits now, SIGHUP reloads; or until
/// another process has taken over, and then finishes what it has.
pub(crate) async fn until_done(node: &Node, patience: Duration) -> Result<(), Failure> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    service_manager::ready();
    loop {
        tokio::select! {
            biased;
            pid = node.superseded() => {
                tracing::info!(pid, "another process has taken over; this one finishes what it has");
                return finish(node, [term, interrupt]).await;
            }
            _ = term.recv() => break,
            _ = interrupt.recv() => break,
            () = node.drain_asked() => break,
            _ = hang_up.recv() => {
                // Says itself in the log how it went.
                let _ = node.reload();
            }
        }
    }
    service_manager::stopping();
    tracing::info!("draining; a second signal exits now");
    tokio::select! {
        finished = node.drain(patience) => {
            tracing::info!(finished, "left the mesh");
            Ok(())
        }
        _ = term.recv() => Err(Failure::failed("exiting before the drain was done")),
        _ = interrupt.recv() => Err(Failure::failed("exiting before the drain was done")),
    }
}

/// Finishes what is under way, after another process has taken over. A signal hurries it, a second one exits now.
async fn finish(node: &Node, [mut term, mut interrupt]: [Signal; 2]) -> Result<(), Failure> {
    let hurry = CancellationToken::new();
    let finishing = node.finish_for_successor(hurry.cancelled());
    tokio::pin!(finishing);
    loop {
        tokio::select! {
            finished = &mut finishing => {
                tracing::info!(finished, "this process is done");
                return Ok(());
            }
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        if hurry.is_cancelled() {
            return Err(Failure::failed("exiting before all was finished"));
        }
        hurry.cancel();
    }
}

/// Takes as many file descriptors as the system lets: each connection is one, and the usual soft limit is 1024.
pub(crate) fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, current = limit.current, "cannot raise the limit of file descriptors");
    }
}

/// Ends with the process that started this one, or another one, if that one asks for it: a demo that is killed leaves nothing
/// behind.
pub(crate) fn follow_parent() {
    let Some(whom) = std::env::var_os(EXIT_WITH) else { return };
    let followed = match whom.to_str().and_then(|pid| Pid::from_raw(pid.parse().ok()?)) {
        Some(pid) => follow(pid),
        None => process::set_parent_process_death_signal(Some(process::Signal::KILL)),
    };
    if let Err(error) = followed {
        tracing::warn!(%error, "cannot follow the process that this one shall end with");
    }
}

/// Ends with a process that is not the parent.
fn follow(pid: Pid) -> rustix::io::Result<()> {
    let other = pidfd_open(pid, PidfdFlags::empty())?;
    std::thread::spawn(move || {
        // Readable when it has ended (pidfd_open(2)).
        while rustix::event::poll(&mut [PollFd::new(&other, PollFlags::IN)], None).is_err() {}
        let _ = kill_process(getpid(), process::Signal::KILL);
    });
    Ok(())
}

/// File, then environment and flags.
fn configuration(args: &NodeArgs) -> Result<Config, Failure> {
    let mut config = match &args.config {
        Some(path) => {
            let text = read_file(path)?;
            let (config, problems) = config::read::<Config>(&text);
            match config {
                Some(config) => config,
                None => return Err(Failure::failed(super::check::render(path, &problems))),
            }
        }
        None => Config::default(),
    };
    let node = &mut config.node;
    macro_rules! override_with {
        ($($field:ident),*) => { $( if args.$field.is_some() { node.$field.clone_from(&args.$field); } )* };
    }
    override_with!(state, name, advertise, token_file);
    if let Some(token) = &args.token {
        node.token = Some(token.clone().into());
    }
    node.listen = args.listen.unwrap_or(node.listen);
    node.workers = args.workers.unwrap_or(node.workers);
    if let Some(zone) = &args.zone {
        node.zone.clone_from(zone);
    }
    if !args.seeds.is_empty() {
        node.seeds.clone_from(&args.seeds);
    }
    if !args.services.is_empty() {
        config.service.clone_from(&args.services);
    }
    if !args.upstreams.is_empty() {
        config.upstream.clone_from(&args.upstreams);
    }
    config.outbound.listen = args.outbound.or(config.outbound.listen);
    config.telemetry.otlp = args.otlp.clone().or(config.telemetry.otlp);
    config.telemetry.sample = args.sample.unwrap_or(config.telemetry.sample);
    config.admin.listen = args.admin.unwrap_or(config.admin.listen);
    Ok(config)
}

pub(crate) fn read_file(path: &std::path::Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|e| Failure::failed(format!("cannot read {}: {e}", path.display())))
}

/// `NAME=IP:PORT[,version=V][,protocol=P][,deprecated=DATE][,sunset=DATE][,link=URL]`
pub(crate) fn parse_service(text: &str) -> Result<ServiceConfig, String> {
    let (name, rest) = text.split_once('=').ok_or("use NAME=IP:PORT[,version=V][,protocol=http1|h2c|tcp|udp]")?;
    let mut parts = rest.split(',');
    let name = name.parse().map_err(|e: starling_protocol::InvalidName| e.to_string())?;
    let mut service = ServiceConfig::new(name, parse_addr(parts.next().unwrap_or_default())?);
    for part in parts {
        match part.split_once('=') {
            Some(("version", version)) => service.version = version.to_string(),
            Some(("protocol", protocol)) => service.protocol = CheckedProtocol(protocol.parse()?),
            Some(("deprecated", date)) => service.deprecated = Some(date.to_owned().try_into()?),
            Some(("sunset", date)) => service.sunset = Some(date.to_owned().try_into()?),
            Some(("link", link)) => service.link = Some(link.to_owned().try_into()?),
            _ => {
                let parts = "version=V, protocol=http1|h2c|tcp|udp, deprecated=DATE, sunset=DATE or link=URL";
                return Err(format!("unknown part {part:?}; use {parts}"));
            }
        }
    }
    Ok(service)
}

/// `SERVICE=IP:PORT[,protocol=P]`
pub(crate) fn parse_upstream(text: &str) -> Result<UpstreamConfig, String> {
    let (service, rest) = text.split_once('=').ok_or("use SERVICE=IP:PORT[,protocol=http|tcp|udp]")?;
    let service = service.parse().map_err(|e: starling_protocol::InvalidName| e.to_string())?;
    let mut parts = rest.split(',');
    let mut upstream = UpstreamConfig::new(service, parse_addr(parts.next().unwrap_or_default())?);
    for part in parts {
        match part.split_once('=') {
            Some(("protocol", protocol)) => upstream.protocol = protocol.parse()?,
            _ => return Err(format!("unknown part {part:?}; use protocol=http|tcp|udp")),
        }
    }
    Ok(upstream)
}

fn parse_addr(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not IP:PORT"))
}
