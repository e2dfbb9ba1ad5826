//! The loom models of the gate, and the mutants that they kill.
//!
//! In the ordinary build this program builds itself once more with `--cfg loom` and runs that.
//! There, every model must pass with both mechanisms, and every mutant named beside it must
//! make it fail. Arguments, after `--`:
//!
//! - `--long`: a larger bound on preemptions, and the whole matrix of models and mutants, so
//!   that the table says of each mutant every model that kills it;
//! - any other word: only models whose name contains it.

#[cfg(loom)]
#[path = "models/batches.rs"]
mod batches;
#[cfg(not(loom))]
#[path = "models/drive.rs"]
mod program;
#[cfg(loom)]
#[path = "models/matrix.rs"]
mod program;
#[cfg(loom)]
#[path = "models/scenes.rs"]
mod scenes;

fn main() -> std::process::ExitCode {
    program::main()
}
