//! `cofferdam`: command line, daemon and control API. The only crate that names buses and ports.
//!
//! ```text
//! args     the command line · help  its examples and exit codes
//! control  documents of the control API
//! host     from addresses and files to bindings: the one place that knows buses and ports
//! drivers  from a device's id to the file of its driver
//! run      one binding in the foreground
//! daemon   the server: its socket, its end · api  its calls · follow  its event streams
//! takeover a new daemon in the place of the one that serves
//! link     the client's end of the socket · client, unload, events  the commands
//! devices  PCI functions and who has them, without a daemon · doctor  what this machine can do
//! serve    the daemon's connections and their bounds
//! show     what people read: tables, certificates, events, explanations · log  stderr, which holds up nobody
//! ```

mod api;
mod args;
mod client;
mod control;
mod daemon;
mod descriptors;
mod devices;
mod doctor;
mod drivers;
mod events;
mod follow;
mod help;
mod host;
mod link;
mod log;
mod run;
mod serve;
mod show;
mod signals;
mod takeover;
mod unload;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::args::{Cli, Command, PortCommand};
use crate::control::ErrorBody;

/// How long the end of the process waits for a stderr that takes nothing, and for one that is slow.
const LAST_WORDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = if matches!(cli.command, Command::Run(_) | Command::Daemon(_)) { "info" } else { "warn" };
    let json = wants_json(&cli.command);
    if let Err(error) = log::start(filter) {
        report(&ErrorBody::failed(format!("no log: {error}")), json);
        return ExitCode::FAILURE;
    }
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
        Command::Upgrade(args) => client::upgrade(args),
        Command::Rollback(args) => client::roll_back(args),
        Command::Restart(args) => client::restart(args),
        Command::Crashes(args) => client::crashes(args),
        Command::Devices(args) => devices::devices(args),
        Command::Bind(args) => devices::bind(args),
        Command::Unbind(args) => devices::unbind(args),
        Command::Doctor(args) => doctor::doctor(args),
    };
    let code = match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error, json);
            ExitCode::from(error.code.exit_code())
        }
    };
    let (stuck, slow) = LAST_WORDS;
    log::finish(stuck, slow);
    code
}

/// Diagnostics go to stderr; with `--json` a script also finds the error as a document there.
fn report(error: &ErrorBody, json: bool) {
    if json && let Ok(text) = serde_json::to_string(&serde_json::json!({ "error": error })) {
        log::say(&text);
        return;
    }
    let mut lines: Vec<String> = error.message.lines().map(|line| show::harmless(line).into_owned()).collect();
    // It was asked for beside the error, so it goes the same way.
    let explained = error.explanation.iter().flat_map(|explanation| show::explanation_lines(explanation));
    lines.extend(explained.map(|line| show::harmless(&line).into_owned()));
    log::say(&format!("cofferdam: {}", lines.join("\n")));
}

fn wants_json(command: &Command) -> bool {
    match command {
        Command::Run(args) => args.json,
        Command::Daemon(_) => false,
        Command::Load(args) => args.json,
        Command::Ls(args) => args.json,
        Command::Inspect(args) => args.json,
        Command::Handles(args) | Command::Why(args) | Command::Restart(args) | Command::Crashes(args) => args.json,
        Command::Revoke(args) => args.json,
        Command::Events(args) => args.json,
        Command::Port(args) => match &args.command {
            PortCommand::Attach(args) | PortCommand::Detach(args) => args.json,
        },
        Command::Unload(args) => args.json,
        Command::Upgrade(args) => args.json,
        Command::Rollback(args) => args.json,
        Command::Devices(args) => args.json,
        Command::Bind(args) => args.how.json,
        Command::Unbind(args) => args.how.json,
        Command::Doctor(args) => args.json,
    }
}
