//! Builds this test again with `--cfg loom`, in a target folder of its own, and runs it.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

pub(crate) fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        println!("models: test");
        return ExitCode::SUCCESS;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // target/<profile>/deps/models-<hash>: the folder for loom lies beside the profile's.
    let program = std::env::current_exe().expect("this program has a path");
    let target: PathBuf = program.ancestors().nth(3).expect("target/profile/deps").join("loom");
    let status = Command::new(cargo)
        .args(["test", "--quiet", "--release", "--package", "cofferdam-gate", "--test", "models", "--"])
        .args(std::env::args().skip(1))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("CARGO_TARGET_DIR", target)
        .env("RUSTFLAGS", "--cfg loom")
        // Half the time to build, and hardly more to run.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .expect("cargo starts");
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
