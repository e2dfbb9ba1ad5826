//! What a scenario has in its hands.

use crate::kernel_log::KernelLog;
use crate::outside::Outside;
use crate::pci::{ON_DEMAND, Place, places};
use crate::program::{Output, Running};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::time::{Duration, Instant};

/// How long a program may run if nothing else is said. Emulation is slow, and so may be the machine below it.
pub const RUN_LIMIT: Duration = Duration::from_secs(120);

/// How long a wait for something that takes no time of its own may last.
pub const SHORT: Duration = Duration::from_secs(30);

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// The machine that a scenario runs in.
#[derive(Debug)]
pub struct Vm {
    /// Which devices there are.
    pub topology: String,
    outside: Outside,
    /// What the kernel has said since the scenario began.
    pub kernel_log: KernelLog,
    begin: Instant,
}

impl Vm {
    /// Takes hold of this machine.
    pub fn new(topology: &str) -> Result<Vm> {
        Ok(Vm {
            topology: topology.to_owned(),
            outside: Outside::open()?,
            kernel_log: KernelLog::default(),
            begin: Instant::now(),
        })
    }

    /// A new scenario begins.
    pub fn begin(&mut self) -> Result<()> {
        self.kernel_log = KernelLog::from_now()?;
        self.begin = Instant::now();
        Ok(())
    }

    /// Says what comes next, or what was measured.
    pub fn step(&self, what: &str) {
        println!("    {:>6.2} s  {what}", self.begin.elapsed().as_secs_f64());
    }

    /// Runs a program, found on the path, to its end.
    pub fn run<S: AsRef<OsStr>>(&self, line: impl AsRef<[S]>) -> Result<Output> {
        self.run_within(RUN_LIMIT, line)
    }

    /// Runs a program that may take longer, or must not.
    pub fn run_within<S: AsRef<OsStr>>(&self, limit: Duration, line: impl AsRef<[S]>) -> Result<Output> {
        Running::start("run", line.as_ref())?.finish(limit)
    }

    /// Starts a program that runs beside the scenario.
    pub fn spawn<S: AsRef<OsStr>>(&self, name: &str, line: impl AsRef<[S]>) -> Result<Running> {
        Running::start(name, line.as_ref())
    }

    /// Waits until `condition` holds.
    pub fn wait_until(&self, what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if condition().with_context(|| what.to_owned())? {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("not within {limit:?}: {what}");
            }
            // The conditions are files of sysfs and the like, which cannot be waited on.
            std::thread::sleep(LOOK);
        }
    }

    /// Has QEMU execute a QMP command (`device_del`, `human-monitor-command` ...) and gives its answer.
    pub fn outside(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.outside.execute(command, arguments)
    }

    /// Pulls a device out as an operator does, who asks first, and waits until it is gone from the bus.
    pub fn unplug(&mut self, place: &Place) -> Result<()> {
        self.outside("device_del", &json!({ "id": place.id }))?;
        self.wait_until(&format!("{} is gone", place.id), SHORT, || Ok(!place.is_present()))
    }

    /// Plugs a device in again and waits until the bus shows it.
    pub fn plug(&mut self, place: &Place) -> Result<()> {
        let arguments = place.plug_arguments(&self.topology)?;
        // The guest may be done with a device a moment before QEMU is, which then still has the name or the image in use.
        let deadline = Instant::now() + SHORT;
        while let Err(error) = self.outside("device_add", &arguments) {
            let text = error.to_string();
            let is_in_use = ["Duplicate", "Permission conflict"].iter().any(|words| text.contains(words));
            if Instant::now() > deadline || !is_in_use {
                return Err(error);
            }
            std::thread::sleep(LOOK);
        }
        self.wait_until(&format!("{} is there", place.id), SHORT, || Ok(place.is_present()))
    }

    /// Whether every device is plugged in and with the driver that it had at boot; if not, the first that is not.
    pub fn misplaced(&self) -> Option<String> {
        if let Some(place) = ON_DEMAND.iter().find(|place| place.is_present()) {
            return Some(format!("{} is plugged in", place.id));
        }
        places(&self.topology).iter().find_map(|place| {
            let Ok(function) = place.function() else { return Some(format!("{} is not plugged in", place.id)) };
            let driver = function.driver();
            (driver.as_deref() != place.native).then(|| format!("{} is with {driver:?}", place.id))
        })
    }

    /// Puts every device back to where it was at boot.
    pub fn restore(&mut self) -> Result<()> {
        for place in ON_DEMAND.iter().filter(|place| place.is_present()) {
            self.unplug(place)?;
        }
        for place in places(&self.topology) {
            if !place.is_present() {
                self.plug(place)?;
            }
            let function = place.function()?;
            if function.driver().as_deref() != place.native {
                function.give_to(None)?;
            }
            self.wait_until(&format!("{} is back", place.id), SHORT, || {
                Ok(function.driver().as_deref() == place.native)
            })?;
        }
        // What a host left that was killed half-way. The kernel's drivers have reset the functions.
        for folder in ["/run/cofferdam/pci", "/dev/hugepages/cofferdam"] {
            let _ = std::fs::remove_dir_all(folder);
        }
        Ok(())
    }
}
