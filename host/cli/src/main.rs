//! `cofferdam`: command line, daemon and control API. The only crate that names buses and ports.
//!
//! ```text
//! args     the command line · help  its examples and exit codes
//! control  documents of the control API
//! host     from addresses and files to bindings: the one place that knows buses and ports
//! run      one binding in the foreground
//! daemon   the server: its socket, its end · api  its calls · follow  its event streams
//! link     the client's end of the socket · client, unload, events  the commands
//! show     what people read: tables, certificates, events, explanations
//! ```

mod api;
mod args;
mod client;
mod control;
mod daemon;
mod events;
mod follow;
mod help;
mod host;
mod link;
mod run;
mod show;
mod signals;
mod unload;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, PortCommand};
use crate::control::ErrorBody;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(&cli.command);
    let json = wants_json(&cli.command);
    let result = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Daemon(args) => daemon::run(args),
        Command::Load(args) => client::load(args),
        Command::Ls(args) => client::ls(args),
        Command::Inspect(args) => client::inspect(args),
        Command::Handles(args) => client::handles(args),
        Command::Revoke(args) => client::revoke(args),
        Command::Why(args) => client::why(args),
        Command::Events(args) => events::events(args),
        Command::Port(args) => client::port(args),
        Command::Unload(args) => unload::unload(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error, json);
            ExitCode::from(error.code.exit_code())
        }
    }
}

/// Diagnostics go to stderr; with `--json` a script also finds the error as a document there.
fn report(error: &ErrorBody, json: bool) {
    let mut stderr = std::io::stderr().lock();
    // Nothing can be done about a stderr that is closed.
    let _ = match serde_json::to_string(&serde_json::json!({ "error": error })) {
        Ok(text) if json => writeln!(stderr, "{text}"),
        _ => {
            let lines = error.message.lines().map(|line| show::harmless(line));
            writeln!(stderr, "cofferdam: {}", lines.collect::<Vec<_>>().join("\n"))
        }
    };
    // It was asked for beside the error, so it goes the same way.
    for line in error.explanation.iter().filter(|_| !json).flat_map(|explanation| show::explanation_lines(explanation))
    {
        let _ = writeln!(stderr, "{}", show::harmless(&line));
    }
}

fn wants_json(command: &Command) -> bool {
    match command {
        Command::Run(args) => args.json,
        Command::Daemon(_) => false,
        Command::Load(args) => args.json,
        Command::Ls(args) => args.json,
        Command::Inspect(args) => args.json,
        Command::Handles(args) | Command::Why(args) => args.json,
        Command::Revoke(args) => args.json,
        Command::Events(args) => args.json,
        Command::Port(args) => match &args.command {
            PortCommand::Attach(args) | PortCommand::Detach(args) => args.json,
        },
        Command::Unload(args) => args.json,
    }
}

fn start_log(command: &Command) {
    use tracing_subscriber::EnvFilter;
    let default = if matches!(command, Command::Run(_) | Command::Daemon(_)) { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("COFFERDAM_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
}
