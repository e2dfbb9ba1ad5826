//! The other tests once more under what a nightly compiler offers. What is not installed is
//! reported as not run, and is no failure.
//!
//! - AddressSanitizer: wherever there is a nightly compiler.
//! - ThreadSanitizer, over the portable form: with `--long`, and where the standard library's
//!   source is there, because reports about an uninstrumented one mean nothing.
//! - Miri, over the portable form: with `--long`, where it is installed.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("sanitizers: test");
        return ExitCode::SUCCESS;
    }
    let long = arguments.iter().any(|argument| argument == "--long");
    // target/<profile>/deps/sanitizers-<hash>: each tool gets a folder beside the profile's.
    let program = std::env::current_exe().expect("this program has a path");
    let target: PathBuf = program.ancestors().nth(3).expect("target/profile/deps").to_owned();
    let mut failed = false;
    for (name, outcome) in [
        ("AddressSanitizer", address(&target)),
        ("ThreadSanitizer", thread(&target, long)),
        ("Miri", miri(&target, long)),
    ] {
        match outcome {
            Ok(true) => println!("{name}: passed"),
            Ok(false) => {
                failed = true;
                println!("{name}: FAILED");
            }
            Err(why) => println!("{name}: not run: {why}"),
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// `cargo` of the nightly toolchain, through rustup's proxy.
fn nightly(target: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.arg("+nightly").current_dir(env!("CARGO_MANIFEST_DIR")).env("CARGO_TARGET_DIR", target);
    // What the outer cargo says about itself would make the inner one use its tools.
    for variable in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN", "CARGO_ENCODED_RUSTFLAGS", "LD_LIBRARY_PATH"] {
        command.env_remove(variable);
    }
    command.env("COFFERDAM_STRESS_SECONDS", "2");
    command
}

fn answers(mut command: Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn has_nightly(target: &Path) -> Result<(), &'static str> {
    if cfg!(not(all(target_arch = "x86_64", target_env = "gnu"))) {
        return Err("not set up for this machine");
    }
    let mut command = nightly(target);
    command.arg("--version");
    answers(command).map(|_| ()).ok_or("no nightly compiler")
}

fn passes(mut command: Command) -> bool {
    command.status().is_ok_and(|status| status.success())
}

fn address(target: &Path) -> Result<bool, &'static str> {
    has_nightly(target)?;
    let mut command = nightly(&target.join("address"));
    command
        .args(["test", "--quiet", "--target", TARGET, "--package", "cofferdam-gate"])
        .args(["--lib", "--test", "behaviour", "--test", "batch", "--test", "stress"])
        .env("RUSTFLAGS", "-Zsanitizer=address -Cunsafe-allow-abi-mismatch=sanitizer")
        // Slots are never freed, and some tests leak guards.
        .env("ASAN_OPTIONS", "detect_leaks=0");
    Ok(passes(command))
}

fn thread(target: &Path, long: bool) -> Result<bool, &'static str> {
    if !long {
        return Err("only with --long");
    }
    has_nightly(target)?;
    let mut sysroot = Command::new("rustc");
    sysroot.args(["+nightly", "--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN");
    let sysroot = answers(sysroot).ok_or("no nightly compiler")?;
    if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/std").exists() {
        return Err("no source of the standard library (rust-src)");
    }
    let mut command = nightly(&target.join("thread"));
    command
        .args(["test", "--quiet", "--target", TARGET, "-Zbuild-std", "--package", "cofferdam-gate"])
        .args(["--test", "behaviour", "--test", "batch", "--test", "stress"])
        .env("RUSTFLAGS", "-Zsanitizer=thread")
        // It sees no inline assembly: sections would be reported as races.
        .env("COFFERDAM_GATE", "xadd");
    Ok(passes(command))
}

fn miri(target: &Path, long: bool) -> Result<bool, &'static str> {
    let mut version = nightly(target);
    version.args(["miri", "--version"]);
    answers(version).ok_or("not installed")?;
    if !long {
        return Err("only with --long");
    }
    let mut command = nightly(&target.join("miri"));
    command
        .args(["miri", "test", "--package", "cofferdam-gate", "--test", "behaviour", "--test", "batch"])
        .env("MIRIFLAGS", "-Zmiri-disable-isolation -Zmiri-ignore-leaks");
    Ok(passes(command))
}
