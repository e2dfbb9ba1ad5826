//! A host that runs drivers in the machine, as an operator has one: `cofferdam daemon`, and the commands that talk to it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::pci::Function;
use crate::program::{Output, Running};
use crate::vm::{SHORT, Vm};

/// How long a command may take. A load compiles the driver, the first time.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// What `load` is told here: huge pages are few, and a processor that is emulated on a busy machine can stand still for longer than the 100 ms that a call has.
pub const MODEST: &[&str] = &["--arena-mib", "8", "--call-deadline-ms", "10000"];

const SOCKET: &str = "/tmp/cofferdam.sock";

/// The component that drives disks.
pub const BLOCK_DRIVER: &str = "/drivers/virtio-blk.wasm";

/// Runs `cofferdam` with `line`, talking to the [`Host`] if there is one.
///
/// # Errors
/// When it does not end.
pub fn cofferdam(vm: &Vm, line: &[&str]) -> Result<Output> {
    vm.run_within(COMMAND_LIMIT, [&["env", "COFFERDAM_SOCKET=/tmp/cofferdam.sock", "cofferdam"], line].concat())
}

/// `pci:0000:01:00.0`, as the commands want it.
#[must_use]
pub fn device(function: &Function) -> String {
    format!("pci:{}", function.address())
}

/// A running daemon. Dropped, it is killed; [`Host::end`] ends it as an operator does.
#[derive(Debug)]
pub struct Host {
    /// The process.
    pub process: Running,
}

impl Host {
    /// Starts one and waits until it answers.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(vm: &Vm) -> Result<Host> {
        // What a killed one left is not its socket.
        let _ = std::fs::remove_file(SOCKET);
        let process = vm.spawn("daemon", ["cofferdam", "daemon", "--socket", SOCKET])?;
        vm.wait_until("the daemon", SHORT, || Ok(Path::new(SOCKET).exists()))?;
        Ok(Host { process })
    }

    /// Loads the block driver on `disk` as `disk`, served on `port`; what `load --json` said.
    ///
    /// # Errors
    /// When it is refused.
    pub fn load_disk(&self, vm: &Vm, disk: &Function, via: &str, port: &str, more: &[&str]) -> Result<Value> {
        let device = device(disk);
        let line = ["load", BLOCK_DRIVER, "--device", &device, via, "--name", "disk", "--port", port, "--json"];
        let loaded = cofferdam(vm, &[&line[..], MODEST, more].concat())?.success()?.json()?;
        ensure!(disk.block_device().is_none(), "the kernel still serves the disk");
        Ok(loaded)
    }

    /// Unloads a binding that has to leave nothing behind; its certificate.
    ///
    /// # Errors
    /// When it leaves something.
    pub fn unload(&self, vm: &Vm, name: &str) -> Result<Value> {
        let certificate = cofferdam(vm, &["unload", name, "--json"])?.success()?.json()?;
        is_clean(&certificate)?;
        Ok(certificate)
    }

    /// SIGKILL; its process id.
    ///
    /// # Errors
    /// When the kernel does not end it.
    pub fn kill(self) -> Result<u32> {
        let process = self.process.id();
        self.process.kill(SHORT)?;
        Ok(process)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end in order.
    pub fn end(self) -> Result<()> {
        self.process.terminate(SHORT)?.success()?;
        Ok(())
    }
}

/// An error unless the certificate shows that nothing is left and nothing was lost.
///
/// # Errors
/// What is left.
pub fn is_clean(certificate: &Value) -> Result<()> {
    let residual = certificate["residual"].as_object().context("no residual")?;
    ensure!(residual.values().all(|left| left == 0), "{certificate}");
    ensure!(certificate["leaked"]["bytes"] == 0, "{certificate}");
    Ok(())
}

/// What `devices --json` says of a function.
///
/// # Errors
/// When it does not say anything.
pub fn told(vm: &Vm, function: &Function) -> Result<Value> {
    let all = cofferdam(vm, &["devices", "--json"])?.success()?.json()?;
    let all = all.as_array().context("no list")?;
    all.iter().find(|told| told["address"] == function.address()).cloned().context("devices does not show it")
}

/// Waits until the kernel's driver serves the disk and has it read a piece.
///
/// # Errors
/// When it does not.
pub fn kernel_serves(vm: &Vm, disk: &Function) -> Result<()> {
    vm.wait_until("the kernel serves the disk again", SHORT, || {
        Ok(disk.block_device().is_some_and(|path| path.exists()))
    })?;
    let path = disk.block_device().context("no block device")?;
    vm.run(["dd", &format!("if={}", path.display()), "of=/dev/null", "bs=64k", "count=32"])?.success()?;
    Ok(())
}
