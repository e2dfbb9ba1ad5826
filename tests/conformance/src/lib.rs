//! One conformance suite for block drivers, which any transport can be put under.
//!
//! A transport's test implements [`Bed`]: it makes a fresh device for each case and says what it cannot make. [`run`] loads the driver component
//! through the real manager and goes through every case of [`CASES`]; a case that a bed cannot serve is named in the report, never passed over in silence.
//! Over the sim and over vhost-user it runs as tests (`tests/`); on PCI functions it is a program (`main.rs`), which scenarios of `tests/vm` run inside a virtual machine.
//!
//! ```text
//! bed      the device under test, made to a wish
//! client   a small client of the in-process handle
//! cases    what has to hold, a function each
//! leaving  and what has to hold when the driver leaves
//! ```

mod bed;
mod cases;
mod client;
mod leaving;

use std::time::Instant;

pub use bed::{Bed, Device, Wish, driver_path};
pub use client::Client;

/// One thing that has to hold.
pub struct Case {
    /// The claim.
    pub name: &'static str,
    /// The device that it needs.
    pub wish: fn() -> Wish,
    /// Shows it.
    pub check: fn(&mut bed::Fixture) -> anyhow::Result<()>,
}

/// Every case.
pub const CASES: &[&[Case]] = &[cases::CASES, leaving::CASES];

/// Goes through every case on `bed`; prints a line for each. Returns how many ran.
///
/// # Errors
/// The first failure of each case that failed, all in one message.
pub fn run(bed: &dyn Bed) -> anyhow::Result<usize> {
    let (mut passed, mut absent, mut failures) = (0, Vec::new(), Vec::new());
    for case in CASES.iter().copied().flatten() {
        let begin = Instant::now();
        match bed::with_fixture(bed, case) {
            Ok(true) => {
                println!("  {}: {} ... ok ({:.2} s)", bed.name(), case.name, begin.elapsed().as_secs_f64());
                passed += 1;
            }
            Ok(false) => absent.push(case.name),
            Err(error) => failures.push(format!("{}: {}: {error:#}", bed.name(), case.name)),
        }
    }
    for name in &absent {
        println!("  {}: {name} ... this device cannot be made so", bed.name());
    }
    anyhow::ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(passed)
}
