//! What lasts from cycle to cycle: a manager, two devices, the components.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{Config, GuestLimits, LoadSpec, Manager};
use cofferdam_process_tests::programs;
use tempfile::TempDir;

use crate::backend::{Backend, Kind};

/// The driver that fails on command.
pub const ON_COMMAND: &str = "on-command";
/// The good one.
pub const GOOD: &str = "virtio-blk";

/// Longest call of a driver. Far above the 100 ms of a daemon: it is wall-clock time, and a busy machine must not make a driver faulty that is not.
const DEADLINE_MS: u64 = 2000;
/// The same for the driver that may be told to loop, which takes so long then.
const LOOP_DEADLINE_MS: u64 = 300;

/// See the module.
pub struct World {
    /// The manager of every cycle that does not end one.
    pub manager: Manager,
    folder: TempDir,
    components: HashMap<&'static str, Vec<u8>>,
    sim: Option<Backend>,
    qemu: Option<Backend>,
}

/// The folder of the workspace's target.
#[must_use]
pub fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target")
}

/// A manager that finds compiled code where the other tests have left it.
pub fn manager() -> anyhow::Result<Manager> {
    Ok(Manager::new(Config { cache_dir: Some(target().join("test-cache")) })?)
}

impl World {
    /// Reads the components of these drivers; devices are started when they are wanted.
    pub fn new(drivers: &[&'static str]) -> anyhow::Result<World> {
        let mut components = HashMap::new();
        for &name in drivers {
            let path = if name == GOOD { programs::driver() } else { programs::test_driver(name) };
            components.insert(name, std::fs::read(&path).with_context(|| path.display().to_string())?);
        }
        Ok(World { manager: manager()?, folder: tempfile::tempdir()?, components, sim: None, qemu: None })
    }

    /// Where the port of a cycle listens.
    #[must_use]
    pub fn port_path(&self) -> PathBuf {
        self.folder.path().join("disk.nbd")
    }

    /// The device, started if it does not run.
    pub fn backend(&mut self, kind: Kind) -> anyhow::Result<&mut Backend> {
        let place = match kind {
            Kind::Sim => &mut self.sim,
            Kind::Qemu => &mut self.qemu,
        };
        if place.is_none() {
            *place = Some(Backend::start(kind)?);
        }
        place.as_mut().context("it was just started")
    }

    /// Forgets a device that is dead; the next cycle starts another.
    pub fn bury(&mut self, kind: Kind) {
        match kind {
            Kind::Sim => self.sim = None,
            Kind::Qemu => self.qemu = None,
        }
    }

    /// A load of `driver` on a device as binding `name`. The buffers are few, so that a request may also find none.
    pub fn spec(&self, driver: &'static str, name: &str, device: VhostUser) -> anyhow::Result<LoadSpec> {
        let component = self.components.get(driver).with_context(|| driver.to_owned())?.clone();
        let call_deadline_ms = if driver == ON_COMMAND { LOOP_DEADLINE_MS } else { DEADLINE_MS };
        let limits = GuestLimits { call_deadline_ms, ..GuestLimits::default() };
        let spec = LoadSpec::new(driver, component, Box::new(device));
        Ok(LoadSpec { name: Some(name.to_owned()), arena_bytes: 4 << 20, limits, restarts: None, ..spec })
    }
}
