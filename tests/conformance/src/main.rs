//! The suite on PCI functions, where there are some: in the virtual machines of `cargo xtask vm-test`.
//!
//! ```text
//! cofferdam-conformance --uio|--vfio --driver PATH --cache-dir FOLDER pci:ADDRESS...
//! ```
//!
//! The functions are virtio disks that the kernel serves at the moment, and whose content is nobody's: each case gets the first that suits its wish, handed over to uio or
//! vfio, and the kernel has it back afterwards. Prints a line for each case, what cannot be made on these functions among them, and how many ran.

mod pci;

use std::process::ExitCode;

use anyhow::{Context, bail};
use cofferdam_bus_pci::Via;

fn main() -> ExitCode {
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work() -> anyhow::Result<()> {
    let (mut via, mut driver, mut cache_dir, mut addresses) = (None, None, None, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--uio" => via = Some(Via::Uio),
            "--vfio" => via = Some(Via::Vfio),
            "--driver" => driver = arguments.next(),
            "--cache-dir" => cache_dir = arguments.next(),
            address if address.starts_with("pci:") => addresses.push(argument),
            other => bail!("{other}: not understood; see the head of tests/conformance/src/main.rs"),
        }
    }
    let bed = pci::Functions::find(
        via.context("--uio or --vfio?")?,
        driver.context("--driver PATH?")?.into(),
        cache_dir.context("--cache-dir FOLDER?")?.into(),
        &addresses,
    )?;
    let passed = cofferdam_conformance::run(&bed)?;
    println!("{passed} cases passed");
    Ok(())
}
