//! A host that runs drivers in the machine, as an operator has one: `cofferdam daemon`, and the commands that talk to it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::pci::Function;
use crate::program::{Output, Running};
use crate::vm::{SHORT, Vm};

/// How long a command may take. A load compiles the driver, the first time.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// What `load` is told here: huge pages are few, and a processor that is emulated on a busy machine can stand still for longer than the 100 ms that a call has.
pub const MODEST: &[&str] = &["--arena-mib", "8", "--call-deadline-ms", "10000"];

/// From how many requests on a client is at work.
const BUSY_REQUESTS: u64 = 50;

const SOCKET: &str = "/tmp/cofferdam.sock";
/// Where a new daemon asks the one on `SOCKET`.
pub const DOOR: &str = "/tmp/cofferdam.sock.takeover";

/// The component that drives disks.
pub const BLOCK_DRIVER: &str = "/drivers/virtio-blk.wasm";
/// The component that drives network cards.
pub const NET_DRIVER: &str = "/drivers/virtio-net.wasm";

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
        let started = vm.wait_until("the daemon", SHORT, || Ok(Path::new(SOCKET).exists()));
        if let Err(error) = started {
            bail!("{error:#}{}", process.where_it_is());
        }
        Ok(Host { process })
    }

    /// Starts a new daemon that is to take over from this one, with `more` arguments.
    ///
    /// # Errors
    /// When it does not start.
    pub fn challenge(&self, vm: &Vm, more: &[&str]) -> Result<Running> {
        let line = ["cofferdam", "daemon", "--takeover", "--socket", SOCKET];
        vm.spawn("daemon", [&line[..], more].concat())
    }

    /// The daemon is that one from now on, which has taken over: the one before has ended in order. What it said of how it went.
    ///
    /// # Errors
    /// When either of them does something else.
    pub fn succeeded_by(&mut self, vm: &Vm, mut new: Running) -> Result<String> {
        let took = |said: &str| said.lines().find(|line| line.starts_with("took over ")).map(str::to_owned);
        vm.wait_until("the new daemon", SHORT, || Ok(took(&new.stdout()).is_some() || !new.is_alive()?))?;
        let Some(told) = took(&new.stdout()) else {
            bail!("it took nothing over: {}{}\nthe one before: {}", new.stdout(), new.stderr(), self.process.stderr());
        };
        std::mem::replace(&mut self.process, new).finish(SHORT)?.success()?;
        Ok(told)
    }

    /// A new daemon takes over.
    ///
    /// # Errors
    /// When it does not.
    pub fn take_over(&mut self, vm: &Vm) -> Result<String> {
        let new = self.challenge(vm, &["--deadline", "10s"])?;
        self.succeeded_by(vm, new)
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

    /// Loads the network driver on `card` as `net`, with a TAP interface of this name; what `load --json` said.
    ///
    /// # Errors
    /// When it is refused.
    pub fn load_net(&self, vm: &Vm, card: &Function, tap: &str) -> Result<Value> {
        let (device, port, via) = (device(card), format!("tap:{tap}"), format!("--{}", vm.topology));
        let line = ["load", NET_DRIVER, "--device", &device, &via, "--name", "net", "--port", &port, "--json"];
        let loaded = cofferdam(vm, &[&line[..], MODEST].concat())?.success()?.json()?;
        ensure!(card.interface().is_none(), "the kernel still serves the card");
        Ok(loaded)
    }

    /// What `handles --json` lists of a binding.
    ///
    /// # Errors
    /// When there is no such binding.
    pub fn handles(&self, vm: &Vm, name: &str) -> Result<Vec<Value>> {
        let handles = cofferdam(vm, &["handles", name, "--json"])?.success()?.json()?;
        handles.as_array().cloned().with_context(|| format!("no list: {handles}"))
    }

    /// Waits until `clients` clients have made enough requests to be at work.
    ///
    /// # Errors
    /// When they do not.
    pub fn until_loaded(&self, vm: &Vm, name: &str, clients: usize) -> Result<()> {
        vm.wait_until("clients at work", SHORT, || {
            let handles = self.handles(vm, name)?;
            let busy = handles.iter().filter(|handle| handle["requests"].as_u64() >= Some(BUSY_REQUESTS));
            Ok(busy.count() >= clients)
        })
    }

    /// Waits until a binding has left that nobody unloads; its certificate, whatever that says is left.
    ///
    /// # Errors
    /// When it stays.
    pub fn leaves_by_itself(&self, vm: &Vm, name: &str) -> Result<Value> {
        vm.wait_until("the binding leaves", SHORT, || {
            let why = cofferdam(vm, &["why", name, "--json"])?.success()?.json()?;
            Ok(why["phase"] == "detached")
        })?;
        cofferdam(vm, &["unload", name, "--json"])?.success()?.json()
    }

    /// When a binding came to this state, by the system's clock in microseconds; the last time.
    ///
    /// # Errors
    /// When it never did.
    pub fn came_to(&self, vm: &Vm, name: &str, state: &str) -> Result<(u64, Value)> {
        let events = cofferdam(vm, &["events", "--json"])?.success()?;
        let events: Vec<Value> = events.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let is_it = |event: &&Value| event["event"] == "state" && event["binding"] == name && event["to"] == state;
        let event = events.iter().rfind(is_it).with_context(|| format!("{name} was never {state}"))?;
        Ok((event["unix_micros"].as_u64().context("no time")?, event["cause"].clone()))
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

/// Waits until the kernel's driver has an interface for the card; its name.
///
/// # Errors
/// When it has none.
pub fn kernel_has_interface(vm: &Vm, card: &Function) -> Result<String> {
    vm.wait_until("the kernel's interface is there", SHORT, || Ok(card.interface().is_some()))?;
    card.interface().context("no interface")
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

/// An error if a record or a claim of any function is left.
///
/// # Errors
/// What is left.
pub fn nothing_is_claimed() -> Result<()> {
    let notes: Vec<_> = match std::fs::read_dir("/run/cofferdam/pci") {
        Ok(notes) => notes.flatten().map(|note| note.file_name()).collect(),
        Err(_) => Vec::new(),
    };
    ensure!(notes.is_empty(), "left in /run/cofferdam/pci: {notes:?}");
    let sockets = std::fs::read_to_string("/proc/net/unix")?;
    let held = sockets.lines().find(|line| line.contains("@cofferdam/pci"));
    ensure!(held.is_none(), "still claimed: {held:?}");
    Ok(())
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
