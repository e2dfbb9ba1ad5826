//! Tests with real PCI devices: the program that runs inside the virtual machines of `cargo xtask vm-test`.
//!
//! ```text
//! cofferdam-vm-guest --list                               one line for each scenario: topology, name, `short` or `long`
//! cofferdam-vm-guest TOPOLOGY [--long] [--only FILTER]    runs them, and ends the machine with the verdict
//! ```
//!
//! xtask (`xtask/src/vm`) boots one machine for each topology: a kernel of Debian's, an initramfs with this program, `cofferdam`, the driver components in
//! `/drivers` (test guests in `/drivers/test`), busybox, fio, nbd-client, e2fsprogs, iproute2, iperf3 and ping, and QEMU's devices. The devices of a topology are a table in
//! `xtask/src/vm/topology.rs`; where they sit is said a second time in [`pci`], because xtask and this crate know nothing of each other but the command line above, the
//! lines this program prints and the channel of [`outside`].
//!
//! # How to write a scenario
//!
//! A function in a file of [`scenarios`] and a line in [`scenarios::all`]. It reads as a script:
//!
//! ```ignore
//! pub(super) fn a_disk_is_lent_and_given_back(vm: &mut Vm) -> Result<()> {
//!     let disk = DISK0.function()?;                      // by its place, not by an address: the kernel numbers buses
//!     let address = disk.address().to_owned();
//!
//!     vm.step("bind");                                    // shown with the time since the scenario began
//!     vm.run(["cofferdam", "bind", &format!("pci:{address}"), "--uio"])?.success()?;
//!     ensure!(disk.driver().as_deref() == Some("uio_pci_generic"), "bound to {:?}", disk.driver());
//!
//!     vm.step("serve");
//!     let host = vm.spawn("host", ["cofferdam", "serve"])?; // killed when dropped; `host.kill()` is SIGKILL, `host.terminate(limit)` SIGTERM
//!     vm.wait_until("the socket appears", SHORT, || Ok(Path::new("/run/...").exists()))?;
//!     let devices = vm.run(["cofferdam", "devices", "--json"])?.success()?.json()?;
//!
//!     vm.step("pull it out");
//!     vm.outside("device_del", json!({ "id": "disk0" }))?; // any QMP command; or vm.unplug(&DISK0) and vm.plug(&DISK0), which wait
//!     Ok(())
//! }
//! ```
//!
//! - Its name is the claim. It fails with an error (`ensure!`, `bail!`, `?`) or a panic; the next one runs all the same.
//! - Every wait is for a condition and has a limit: a program that is run has [`vm::RUN_LIMIT`] or what [`vm::Vm::run_within`] is told. Emulation is slow: limits only end what
//!   hangs, and no claim is made about time.
//! - It leaves the devices as it found them: plugged in, disks with `virtio-pci`, the others with nobody. That is checked after one that passed and
//!   mended after one that failed. What is on a disk is nobody's: a scenario that needs content writes it.
//! - An oops, a warning or an IOMMU fault in the kernel's log during a scenario fails it, unless it says with [`scenarios::Scenario::expecting`] which line it causes.
//! - One that takes over about twenty seconds is [`scenarios::Scenario::long`].
//!
//! `cargo xtask vm-test NAME` boots only what holds a scenario of that name; the serial log stays in `target/vm/logs`. Outside a virtual machine this program runs no
//! scenario.

pub mod challenger;
pub mod disk;
pub mod fio;
pub mod host;
pub mod kernel_log;
pub mod mount;
pub mod network;
pub mod outside;
pub mod pci;
pub mod program;
pub mod runner;
pub mod scenarios;
pub mod slot;
pub mod terminal;
pub mod verdict;
pub mod vm;
