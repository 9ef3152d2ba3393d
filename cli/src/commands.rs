//! One module per command.

pub(crate) mod certificates;
pub(crate) mod chaos;
pub(crate) mod check;
pub(crate) mod demo;
pub(crate) mod documents;
pub(crate) mod drain;
pub(crate) mod edge;
pub(crate) mod force_leave;
pub(crate) mod init;
pub(crate) mod keys;
pub(crate) mod members;
pub(crate) mod names;
pub(crate) mod node;
pub(crate) mod ping;
pub(crate) mod quota;
pub(crate) mod sample;
pub(crate) mod services;
pub(crate) mod status;
pub(crate) mod takeover;
pub(crate) mod token;
pub(crate) mod upgrade;

/// `starling completions`
pub(crate) fn completions(shell: clap_complete::Shell) {
    use clap::CommandFactory;
    clap_complete::generate(shell, &mut crate::args::Cli::command(), "starling", &mut std::io::stdout());
}
