//! One conformance suite for drivers of every class, which any transport can be put under.
//!
//! A transport's test implements [`Bed`]: it makes a fresh device for each case and says what it cannot make. [`run`] loads the class's driver component
//! through the real manager and goes through the cases of the [`Class`]; a case that a bed cannot serve is named in the report, never passed over in silence.
//! Over the sim and over vhost-user it runs as tests (`tests/`); on PCI functions it is a program (`main.rs`), which scenarios of `tests/vm` run inside a virtual machine.
//!
//! On the other side of a network device and of a console's port is an echo, whatever the bed: what the driver sends comes back on the same pair of queues or port. A simulated
//! device does so itself, and what is opposite a PCI function is held by the program. What else the other side does (a link goes down, a port comes) is a [`Lever`].
//!
//! ```text
//! bed      the device under test, made to a wish
//! fixture  a driver that serves it
//! client   a small client of the in-process handle
//! common   what has to hold of every class: serving, leaving, and receiving where something arrives
//! block    what has to hold of disks
//! net      of network devices
//! stream   of consoles
//! entropy  of sources of entropy
//! ```

mod bed;
mod block;
mod client;
mod common;
mod entropy;
mod fixture;
mod net;
mod stream;

use std::time::Instant;

pub use bed::{Bed, Class, Connect, Device, Lever, Pull, Wish, driver_path};
pub use client::{Ask, Client};
pub use fixture::Fixture;

/// One thing that has to hold.
pub struct Case {
    /// The claim.
    pub name: &'static str,
    /// The device that it needs, of this class.
    pub wish: fn(Class) -> Wish,
    /// Shows it.
    pub check: fn(&mut Fixture<'_>) -> anyhow::Result<()>,
}

/// Every case of a class.
#[must_use]
pub fn cases(class: Class) -> Vec<&'static Case> {
    let parts: &[&[Case]] = match class {
        Class::Block => &[common::SERVING, common::LEAVING, block::CASES],
        Class::Net => &[common::SERVING, common::LEAVING, common::RECEIVING, net::CASES],
        Class::Stream => &[common::SERVING, common::LEAVING, common::RECEIVING, stream::CASES],
        Class::Entropy => &[common::SERVING, common::LEAVING, entropy::CASES],
    };
    parts.iter().copied().flatten().collect()
}

/// Goes through every case of `class` on `bed`; prints a line for each. Returns how many ran.
///
/// # Errors
/// The first failure of each case that failed, all in one message.
pub fn run(bed: &dyn Bed, class: Class) -> anyhow::Result<usize> {
    let (mut passed, mut absent, mut failures) = (0, Vec::new(), Vec::new());
    for case in cases(class) {
        let begin = Instant::now();
        match fixture::with(bed, class, case) {
            Ok(true) => {
                println!("  {}, {class}: {} ... ok ({:.2} s)", bed.name(), case.name, begin.elapsed().as_secs_f64());
                passed += 1;
            }
            Ok(false) => absent.push(case.name),
            Err(error) => failures.push(format!("{}, {class}: {}: {error:#}", bed.name(), case.name)),
        }
    }
    for name in &absent {
        println!("  {}, {class}: {name} ... this device cannot be made so", bed.name());
    }
    anyhow::ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_has_a_name_of_its_own_in_its_class() {
        for class in Class::ALL {
            let mut names: Vec<_> = cases(class).iter().map(|case| case.name).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{class}");
        }
    }
}
