//! Everything that is done to the workspace from outside `cargo build`: `cargo xtask COMMAND`.
//!
//! | module | command | what it does |
//! | --- | --- | --- |
//! | [`build`] | `build` | the binary `cofferdam` and the guest drivers |
//! | [`guests::elsewhere`] | `component` | a component of a driver's crate that is elsewhere |
//! | [`demo`] | `demo` | the main job, from a device to a certificate |
//! | [`check`] | `test` | the whole test run |
//! | [`mod@bench`] | `bench NAME` | one bench |
//! | [`vm`] | `vm-test` | the tests in a virtual machine |
//! | [`licences`] | `licences` | licence and duplicates policy |
//! | [`guests`], [`toolchain`] | (used by `build`) | components from guest crates |
//! | [`packages`], [`apt`] | (used by `test`) | programs of Debian that tests need |
//! | `rules` | (`cargo test -p xtask`) | what holds for the workspace as a whole |
//!
//! It depends on no crate of the host, so that it compiles before they do and keeps working while they do not.

mod apt;
mod bench;
mod build;
mod check;
mod demo;
mod guests;
mod interrupt;
mod licences;
mod metadata;
mod packages;
mod policy;
mod process;
#[cfg(test)]
mod rules;
mod step;
mod toolchain;
mod vm;
mod workspace;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Builds, shows, tests and measures Cofferdam.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build target/release/cofferdam and the guest drivers in target/drivers.
    Build,
    /// Make a component of a driver that is not in this workspace, as those in it are made.
    Component(guests::elsewhere::Options),
    /// Serve a virtio-blk device through a WebAssembly driver and unload it under load.
    Demo(demo::Options),
    /// Run every test there is.
    Test(check::Options),
    /// Boot virtual machines and run the tests of tests/vm in them.
    VmTest(vm::Options),
    /// Run one bench; without a name, list them.
    Bench {
        /// Which one.
        name: Option<String>,
        /// Handed to the bench program as they are.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Hold every dependency's licence and version against deny.toml.
    Licences,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Build => build::run(),
        Command::Component(options) => guests::elsewhere::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => check::run(&options),
        Command::VmTest(options) => vm::run(&options),
        Command::Bench { name, arguments } => bench::run(name.as_deref(), &arguments),
        Command::Licences => licences::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
