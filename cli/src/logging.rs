//! Logs: on stderr, for people on a terminal, JSON lines otherwise. `RUST_LOG` chooses what.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging for a long-running command.
pub(crate) fn start() {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,foca=warn,quinn=warn,h3=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        builder.with_ansi(std::env::var_os("NO_COLOR").is_none()).with_target(false).init();
    } else {
        builder.json().flatten_event(true).with_current_span(false).init();
    }
}
