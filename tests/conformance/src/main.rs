//! The suite on PCI functions, where there are some: in the virtual machines of `cargo xtask vm-test`.
//!
//! ```text
//! cofferdam-conformance --uio|--vfio [--class block|net|stream|entropy] --driver PATH --cache-dir FOLDER [--peer PORT] pci:ADDRESS...
//! ```
//!
//! The functions are virtio devices of the class (without a word, disks) that the kernel serves at the moment: each case gets the first that suits its wish, handed over to uio
//! or vfio, and the kernel has it back afterwards. The content of disks is nobody's. At the other end of a network device's cable is an interface of the kernel's that is up, the
//! only one; at the other end of a console's port 1 is the kernel's `--peer` (`/dev/vport1p1`). On both the program sends back what comes. Prints a line for each case, what cannot
//! be made on these functions among them, and how many ran.

mod pci;

use std::process::ExitCode;

use anyhow::{Context, bail};
use cofferdam_bus_pci::Via;
use cofferdam_conformance::Class;

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
    let (mut via, mut driver, mut cache_dir, mut peer, mut addresses) = (None, None, None, None, Vec::new());
    let mut class = Class::Block;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--uio" => via = Some(Via::Uio),
            "--vfio" => via = Some(Via::Vfio),
            "--class" => class = arguments.next().context("--class NAME?")?.parse()?,
            "--driver" => driver = arguments.next(),
            "--cache-dir" => cache_dir = arguments.next(),
            "--peer" => peer = arguments.next(),
            address if address.starts_with("pci:") => addresses.push(argument),
            other => bail!("{other}: not understood; see the head of tests/conformance/src/main.rs"),
        }
    }
    let bed = pci::Functions::find(pci::Orders {
        via: via.context("--uio or --vfio?")?,
        class,
        driver: driver.context("--driver PATH?")?.into(),
        cache_dir: cache_dir.context("--cache-dir FOLDER?")?.into(),
        peer,
        addresses,
    })?;
    let passed = cofferdam_conformance::run(&bed, class)?;
    println!("{passed} cases passed");
    Ok(())
}
