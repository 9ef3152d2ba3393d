//! `starling chaos`

mod inside;
mod search;

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use starling_chaos::{
    History, Options, Plan, Progress, Sabotage,
    history::Begin,
    judge::{Outcome, Verdict},
    plan::{self, Backend},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Failure,
    args::{BackendArg, ChaosCommand, ChaosRunArgs, ChaosSelfTestArgs},
    output,
};

/// Exit code of what cannot be told, and of plans that cannot be read.
const UNKNOWN: u8 = 2;

pub(crate) async fn run(command: ChaosCommand) -> Result<(), Failure> {
    match command {
        ChaosCommand::Run(args) => carry_out(&args).await,
        ChaosCommand::Plans => {
            let rows = plan::NAMES.iter().filter_map(|name| {
                let plan = Plan::named(name)?;
                Some(vec![name.to_string(), plan.steps.len().to_string(), plan.about])
            });
            output::table(&["PLAN", "STEPS", "SHOWS"], rows.collect());
            Ok(())
        }
        ChaosCommand::Show { plan } => {
            print!("{}", text_of(&plan)?.1);
            Ok(())
        }
        ChaosCommand::Check { file } => {
            let plan = read(&file.to_string_lossy())?.1;
            for backend in Backend::ALL {
                match plan.cannot(backend).as_slice() {
                    [] => println!("{backend}: all of it"),
                    cannot => println!("{backend}: not {}", cannot.join("; not ")),
                }
            }
            Ok(())
        }
        ChaosCommand::Judge { dir } => {
            let history = History::read(&dir).map_err(unknown)?;
            let verdict = starling_chaos::judge(&history).map_err(unknown)?;
            starling_chaos::report::write(&dir, &history, &verdict).map_err(failed)?;
            tell(history.begin().map_err(unknown)?, &verdict, &dir);
            settle(&verdict)
        }
        ChaosCommand::Diff { one, other } => {
            let read = |dir: &Path| History::read(dir).map_err(unknown);
            print!("{}", starling_chaos::report::diff(&read(&one)?, &read(&other)?).map_err(unknown)?);
            Ok(())
        }
        ChaosCommand::SelfTest(args) => self_test(&args).await,
        ChaosCommand::Search(args) => search::search(&args),
        ChaosCommand::Promote { file, to } => search::promote(&file, &to),
        ChaosCommand::Service { listen, raw, name, ledger } => {
            super::node::follow_parent();
            starling_chaos::serve(listen, raw, &name, &ledger).await.map_err(failed)
        }
        ChaosCommand::LabCheck => starling_chaos::check_lab().map_err(|why| Failure::coded(UNKNOWN, why)),
    }
}

fn failed(error: anyhow::Error) -> Failure {
    Failure::failed(format!("{error:#}"))
}

fn unknown(error: anyhow::Error) -> Failure {
    Failure::coded(UNKNOWN, format!("{error:#}"))
}

/// Name and text of a shipped plan or a file.
fn text_of(plan: &str) -> Result<(String, String), Failure> {
    if let Some(text) = plan::shipped(plan) {
        return Ok((plan.into(), text.into()));
    }
    let path = Path::new(plan);
    if !path.exists() {
        let known = plan::NAMES.join(", ");
        let why = format!("no plan {plan:?}, and no such file; plans are {known}");
        return Err(Failure::coded(UNKNOWN, why));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::coded(UNKNOWN, format!("cannot read {plan}: {error}")))?;
    let name = path.file_stem().map_or("plan".into(), |stem| stem.to_string_lossy().into_owned());
    Ok((name, text))
}

fn read(plan: &str) -> Result<(String, Plan), Failure> {
    let (name, text) = text_of(plan)?;
    match Plan::parse(&text) {
        Ok(plan) => Ok((name, plan)),
        Err(problems) => Err(Failure::coded(UNKNOWN, problems_of(plan, &problems))),
    }
}

fn problems_of(plan: &str, problems: &[plan::Problem]) -> String {
    let line = |problem: &plan::Problem| match problem.line {
        0 => format!("{plan}: {}", problem.what),
        line => format!("{plan}:{line}: {}", problem.what),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The plan with what the command line changes.
fn changed(args: &ChaosRunArgs) -> Result<(String, Plan), Failure> {
    let (name, mut plan) = read(&args.plan)?;
    plan.seed = args.seed.unwrap_or(plan.seed);
    plan.mesh.nodes = args.nodes.unwrap_or(plan.mesh.nodes);
    plan.duration = args.duration.or(plan.duration);
    let text = toml::to_string(&plan)?;
    // What was right in the file can be wrong with another number of nodes.
    match Plan::parse(&text) {
        Ok(plan) => Ok((name, plan)),
        Err(mut problems) => {
            problems.iter_mut().for_each(|problem| problem.line = 0);
            Err(Failure::coded(UNKNOWN, problems_of("with these flags", &problems)))
        }
    }
}

/// Where it runs: as asked, or the first that works. With a note why not elsewhere.
async fn backend(asked: Option<BackendArg>, plan: &Plan) -> Result<(Backend, Option<String>), Failure> {
    let asked = asked.map(|backend| match backend {
        BackendArg::Lab => Backend::Lab,
        BackendArg::Relay => Backend::Relay,
        BackendArg::Sim => Backend::Sim,
    });
    let mut notes = Vec::new();
    for backend in asked.map_or(Backend::ALL.to_vec(), |backend| vec![backend]) {
        if asked.is_none() && !plan.backends.is_empty() && !plan.backends.contains(&backend) {
            continue;
        }
        let skipped = plan.cannot(backend);
        if skipped.len() == plan.steps.iter().map(|step| step.faults.len()).sum::<usize>() {
            notes.push(format!("{backend} can do none of its faults ({})", skipped.join("; ")));
            continue;
        }
        match backend {
            Backend::Sim => return Ok((backend, None)),
            Backend::Lab => match inside::check().await {
                Ok(()) => return Ok((backend, None)),
                Err(why) => notes.push(format!("lab: {why}")),
            },
            Backend::Relay => {
                let note = (!notes.is_empty()).then(|| format!("{}; so relay, without privilege", notes.join("; ")));
                return Ok((backend, note));
            }
        }
    }
    let offer = if asked == Some(Backend::Lab) { "; `--backend relay` needs no privilege" } else { "" };
    Err(Failure::coded(UNKNOWN, format!("{}{offer}", notes.join("; "))))
}

async fn carry_out(args: &ChaosRunArgs) -> Result<(), Failure> {
    let (name, plan) = changed(args)?;
    let (backend, note) = backend(args.backend, &plan).await?;
    if backend == Backend::Lab && !inside::is_inside() {
        return inside::again().await;
    }
    for left in starling_chaos::sweep() {
        eprintln!("removed {}, which an earlier run has left", left.display());
    }
    if let Some(note) = note {
        eprintln!("{note}");
    }
    let stop = inside::stop();
    let mut codes = Vec::new();
    for round in 0..args.repeat {
        let mut plan = plan.clone();
        plan.seed += u64::from(round);
        let report = match args.repeat {
            1 => args.report.join(&name),
            _ => args.report.join(format!("{name}-{}", plan.seed)),
        };
        let seed = plan.seed;
        let replay = replay(args, seed, backend);
        let options = Options {
            name: name.clone(),
            plan,
            backend,
            binary: binary(args)?,
            other: args.other.clone(),
            report: report.clone(),
            keep: args.keep,
            replay,
            sabotage: Sabotage::None,
        };
        let verdict = once(&options, &stop).await?;
        codes.push(verdict.code());
        if stop.is_cancelled() {
            break;
        }
    }
    if codes.len() > 1 {
        let failed = codes.iter().filter(|code| **code == 1).count();
        let told = codes.iter().filter(|code| **code == 2).count();
        println!("failed {failed} of {}, unknown {told}", codes.len());
    }
    // A violation weighs more than a doubt.
    match codes.iter().copied().min_by_key(|code| [2, 0, 1][usize::from(*code)]) {
        Some(0) => Ok(()),
        code => Err(Failure::coded(code.unwrap_or(UNKNOWN), "")),
    }
}

/// Runs, judges, reports.
async fn once(options: &Options, stop: &CancellationToken) -> Result<Verdict, Failure> {
    let history = match options.backend {
        Backend::Sim => {
            let history = starling_simulation::run(&options.name, &options.plan, options.replay.clone());
            let history = history.map_err(unknown)?;
            history.write(&options.report).map_err(failed)?;
            history
        }
        Backend::Lab | Backend::Relay => starling_chaos::run(options, &Terminal, stop).await.map_err(unknown)?,
    };
    let verdict = starling_chaos::judge(&history).map_err(unknown)?;
    starling_chaos::report::write(&options.report, &history, &verdict).map_err(failed)?;
    tell(history.begin().map_err(unknown)?, &verdict, &options.report);
    Ok(verdict)
}

fn binary(args: &ChaosRunArgs) -> Result<PathBuf, Failure> {
    match &args.binary {
        Some(binary) => Ok(std::path::absolute(binary)?),
        None => Ok(std::env::current_exe()?),
    }
}

/// The command that does the same again.
fn replay(args: &ChaosRunArgs, seed: u64, backend: Backend) -> String {
    let mut command = format!("starling chaos run {} --seed {seed} --backend {backend}", args.plan);
    if let Some(nodes) = args.nodes {
        command.push_str(&format!(" --nodes {nodes}"));
    }
    if let Some(duration) = args.duration {
        command.push_str(&format!(" --duration {}", humantime::format_duration(duration).to_string().replace(' ', "")));
    }
    command
}

/// Progress goes to stderr: lines, and on a terminal one more that says how far it is.
struct Terminal;

/// To the start of the line, and nothing behind.
const AFRESH: &str = "\r\x1b[K";

impl Progress for Terminal {
    fn say(&self, line: &str) {
        let afresh = if std::io::stderr().is_terminal() { AFRESH } else { "" };
        eprintln!("{afresh}{line}");
    }

    fn now(&self, line: &str) {
        if std::io::stderr().is_terminal() {
            let line: String = line.chars().take(MOST_COLUMNS).collect();
            eprint!("{AFRESH}{line}");
        }
    }
}

/// A longer line would not go away.
const MOST_COLUMNS: usize = 110;

/// Prints what a run came to.
fn tell(begin: &Begin, verdict: &Verdict, report: &Path) {
    let seconds = |s: Option<f64>| s.map_or("-".into(), |s| format!("{s:.2} s"));
    let rows = verdict.faults.iter().map(|fault| {
        let victims =
            if fault.victims.len() > 3 { format!("{} nodes", fault.victims.len()) } else { fault.victims.join(",") };
        vec![
            format!("{}{}", fault.text, if victims.is_empty() { String::new() } else { format!(": {victims}") }),
            format!("{:?}", fault.acted).to_lowercase(),
            match fault.owed {
                0 => "-".into(),
                owed => format!("{:.2} %", fault.answered as f64 / owed as f64 * 100.0),
            },
            fault.p99_ms.map_or("-".into(), |ms| format!("{ms:.0} ms")),
            seconds(fault.detected),
            seconds(fault.healed),
            fault.lost.to_string(),
            fault.false_downs.to_string(),
        ]
    });
    output::table(&["FAULT", "", "ANSWERED", "P99", "SEEN", "HEALED", "LOST", "FALSE"], rows.collect());
    for check in verdict.complaints() {
        let step = check.step.and_then(|step| begin.plan.step(step));
        let place = step.map_or(String::new(), |step| format!(" [{}]", step.name));
        let outcome = if check.outcome == Outcome::Violated { "VIOLATED" } else { "unknown" };
        let at = check.at.map_or(String::new(), |at| format!(" at {at:.1} s"));
        println!("{outcome}{place} {}: {}{at}", check.name, check.detail);
    }
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let paint = match verdict.outcome {
        _ if !colour => "",
        Outcome::Held => "\x1b[32m",
        Outcome::Violated => "\x1b[31m",
        Outcome::Unknown => "\x1b[33m",
    };
    println!("{paint}{}{}", verdict.line, if colour { "\x1b[0m" } else { "" });
    println!("report: {}", report.join(starling_chaos::report::PAGE).display());
}

fn settle(verdict: &Verdict) -> Result<(), Failure> {
    match verdict.code() {
        0 => Ok(()),
        code => Err(Failure::coded(code, "")),
    }
}

/// Every sabotage must turn the verdict of a plan that holds without.
async fn self_test(args: &ChaosSelfTestArgs) -> Result<(), Failure> {
    let (name, plan) = read("self-test")?;
    let (backend, _) = backend(args.backend, &plan).await?;
    if backend == Backend::Lab && !inside::is_inside() {
        return inside::again().await;
    }
    let stop = inside::stop();
    let rows = [
        (Sabotage::None, Outcome::Held),
        (Sabotage::Switch, Outcome::Unknown),
        (Sabotage::LedgerLost, Outcome::Unknown),
        (Sabotage::LedgerTwice, Outcome::Violated),
        (Sabotage::Admin, Outcome::Violated),
        (Sabotage::Clock, Outcome::Unknown),
        (Sabotage::Load, Outcome::Unknown),
    ];
    let mut good = true;
    for (sabotage, expected) in rows {
        let options = Options {
            name: name.clone(),
            plan: plan.clone(),
            backend,
            binary: std::env::current_exe()?,
            other: None,
            report: args.report.join(format!("{sabotage:?}").to_lowercase()),
            keep: false,
            replay: "starling chaos self-test".into(),
            sabotage,
        };
        let history = starling_chaos::run(&options, &Terminal, &stop).await.map_err(unknown)?;
        let verdict = starling_chaos::judge(&history).map_err(unknown)?;
        starling_chaos::report::write(&options.report, &history, &verdict).map_err(failed)?;
        let right = verdict.outcome == expected;
        good &= right;
        println!("{} {sabotage:?}: {}", if right { "ok  " } else { "FAIL" }, verdict.line);
        if stop.is_cancelled() {
            return Err(Failure::coded(UNKNOWN, "stopped"));
        }
    }
    if good { Ok(()) } else { Err(Failure::failed("a sabotage went unnoticed, or the plan does not hold without one")) }
}
