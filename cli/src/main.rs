//! The one binary. Arguments here, one file per command beside, everything worth testing alone in the libraries.

mod admin;
mod args;
mod commands;
mod logging;
mod output;
mod service_manager;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::Parser;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(cli.command));
    // Tasks that are still there have nothing left to say.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("error: {}", failure.message);
            }
            ExitCode::from(failure.code)
        }
    }
}

async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Demo(args) => commands::demo::run(&args).await,
        Command::Sample(args) => commands::sample::run(&args).await,
        Command::Init(args) => commands::init::run(&args),
        Command::Token { command: args::TokenCommand::Create(args) } => commands::token::create(&args),
        Command::Node(args) => commands::node::run(&args).await,
        Command::Edge(args) => commands::edge::run(&args).await,
        Command::Members(args) => commands::members::run(&args).await,
        Command::Services(args) => commands::services::run(&args).await,
        Command::Status(args) => commands::status::run(&args).await,
        Command::Documents(args) => commands::documents::run(&args).await,
        Command::Ping(args) => commands::ping::run(&args).await,
        Command::ForceLeave(args) => commands::force_leave::run(&args).await,
        Command::Names(args) => commands::names::run(&args).await,
        Command::Upgrade(args) => commands::upgrade::run(&args).await,
        Command::Drain(args) => commands::drain::run(&args, "/v1/drain").await,
        Command::Leave(args) => commands::drain::run(&args, "/v1/leave").await,
        Command::Certificates(args) => commands::certificates::run(&args).await,
        Command::Quota { command } => commands::quota::run(&command).await,
        Command::Keys { command } => commands::keys::run(&command).await,
        Command::Check(args) => commands::check::run(&args),
        Command::Chaos { command } => commands::chaos::run(command).await,
        Command::Completions { shell } => {
            commands::completions(shell);
            Ok(())
        }
    }
}

/// How a command fails: what the person reads, and the exit code of the contract.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    /// 1: it did not work.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1 }
    }

    /// That code, with whatever is to be said.
    pub(crate) fn coded(code: u8, message: impl Into<String>) -> Self {
        Self { message: message.into(), code }
    }

    /// 3: no node answers.
    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 3 }
    }

    /// 4: a check failed, and has said so already.
    pub(crate) fn check() -> Self {
        Self { message: String::new(), code: 4 }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Some libraries repeat the cause in their own text.
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        Self::failed(message)
    }
}
