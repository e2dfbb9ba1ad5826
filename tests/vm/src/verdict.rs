//! The end of the machine, with one bit for whoever started it.
//!
//! QEMU's `isa-debug-exit` at port 0xf4 ends QEMU with status `2 * value + 1` when a byte is written to it.
#![allow(unsafe_code)]

use anyhow::{Context, Result, bail};
use std::arch::asm;
use std::time::Duration;

/// The port of `isa-debug-exit`; `xtask/src/vm/qemu.rs` puts it there.
const PORT: u16 = 0xf4;

/// QEMU then ends with 33.
const GOOD: u8 = 16;

/// QEMU then ends with 35.
const BAD: u8 = 17;

/// How long QEMU may take to end the machine. On one that works nobody sees it pass.
const END_LIMIT: Duration = Duration::from_secs(30);

/// Whether this process was started by the init script of a test machine, which says so on the kernel's command line.
pub fn is_test_machine() -> bool {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().any(|word| word == "cofferdam.vm-test")
}

/// Ends the machine. Comes back only if that did not work; the init script then ends it without a verdict, which counts as a failure.
pub fn give(good: bool) -> Result<()> {
    if !is_test_machine() {
        bail!("this is no machine of `cargo xtask vm-test`");
    }
    // What was printed is still on its way through the serial line.
    // SAFETY: tcdrain waits for the output of a terminal and touches no memory; the descriptor stays open as long as the process.
    if unsafe { libc::tcdrain(libc::STDOUT_FILENO) } != 0 {
        println!("vm error: tcdrain: {}", std::io::Error::last_os_error());
    }
    // SAFETY: ioperm changes which I/O ports this thread may use and touches no memory. The port belongs to the test device (checked above: the machine is a test
    // machine, which is never without it).
    if unsafe { libc::ioperm(PORT.into(), 1, 1) } != 0 {
        return Err(std::io::Error::last_os_error()).context("ioperm");
    }
    let value = if good { GOOD } else { BAD };
    // SAFETY: `out` to a port for which ioperm has just succeeded reads and writes no memory, no flags and no register but its operands.
    unsafe { asm!("out dx, al", in("dx") PORT, in("al") value, options(nomem, nostack, preserves_flags)) };
    // QEMU's main thread ends the machine; this processor runs on until that one comes to it.
    std::thread::sleep(END_LIMIT);
    bail!("the machine is still there")
}
