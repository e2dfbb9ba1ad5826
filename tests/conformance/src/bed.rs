//! The device under test.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use cofferdam_manager::{Binding, Certificate, Config, LoadSpec, Manager, Transport, UnloadOptions};

use crate::{Case, Client};

/// What a case needs of its device. A bed may give more than was wished for, never less.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Size of the medium; reads as zeroes at first.
    pub capacity_bytes: u64,
    /// Queues.
    pub queues: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether discard and write-zeroes are served.
    pub ranges: bool,
    /// Entries of a ring, if it matters; asked for at load.
    pub ring_entries: Option<u16>,
    /// Whether indirect descriptors and event indices may be offered; without them the plain ring is shown.
    pub plain_ring: bool,
}

impl Default for Wish {
    fn default() -> Wish {
        Wish {
            capacity_bytes: 16 << 20,
            queues: 1,
            read_only: false,
            ranges: false,
            ring_entries: None,
            plain_ring: false,
        }
    }
}

/// A device that a bed made.
pub struct Device {
    /// The way to it.
    pub transport: Box<dyn Transport>,
    /// The size of its medium, which it has to show.
    pub capacity_bytes: u64,
    /// What has to live as long as the device: a process, a directory.
    pub keep: Box<dyn Any>,
}

/// Makes devices for one transport.
pub trait Bed {
    /// For the report.
    fn name(&self) -> &'static str;

    /// A fresh device; `None` if this bed cannot make one to that wish.
    ///
    /// # Errors
    /// When it should have been able to.
    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>>;

    /// The driver's component.
    fn driver(&self) -> PathBuf {
        driver_path("virtio-blk.wasm")
    }

    /// Where compiled code is kept.
    fn cache_dir(&self) -> PathBuf {
        driver_path("../test-cache")
    }

    /// Buffer memory of a load, in bytes.
    fn arena_bytes(&self) -> u64 {
        64 << 20
    }

    /// How many times as long things may take as where the processor is a real one.
    fn slowness(&self) -> u32 {
        1
    }
}

/// What a case works with: a driver that serves the device.
pub struct Fixture {
    /// The host.
    pub manager: Manager,
    /// The binding under test.
    pub binding: Arc<Binding>,
    /// The wish that was granted.
    pub wish: Wish,
    /// The bed's [`Bed::slowness`].
    pub slowness: u32,
}

impl Fixture {
    /// A client of its own on `lane`.
    ///
    /// # Errors
    /// When the handle is refused.
    pub fn client(&self, lane: usize) -> anyhow::Result<Client> {
        Client::open(&self.binding, lane)
    }

    /// Unloads the binding, with the time that this bed needs for it.
    ///
    /// # Errors
    /// What the unload says.
    pub fn unload(&self) -> anyhow::Result<Certificate> {
        let usual = UnloadOptions::default();
        let deadline = usual.deadline * self.slowness;
        Ok(self.manager.unload_binding(&self.binding, &UnloadOptions { deadline, ..usual })?)
    }

    /// Unloads the binding if the case has not, and looks at what is left.
    fn leave(&self) -> anyhow::Result<()> {
        if self.binding.certificate().is_none() {
            let certificate = self.unload()?;
            ensure!(certificate.residual.is_zero(), "after the case: {:?}", certificate.residual);
            ensure!(certificate.leaked.bytes == 0, "after the case: {:?}", certificate.leaked);
        }
        Ok(())
    }
}

/// Where `cargo xtask build` puts a driver.
#[must_use]
pub fn driver_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/drivers").join(name)
}

/// Runs one case; false if the bed cannot make its device. Afterwards the binding is gone without a rest, whatever the case did.
pub(crate) fn with_fixture(bed: &dyn Bed, case: &Case) -> anyhow::Result<bool> {
    let wish = (case.wish)();
    let Some(device) = bed.device(&wish)? else { return Ok(false) };
    let wish = Wish { capacity_bytes: device.capacity_bytes, ..wish };
    let path = bed.driver();
    let component =
        std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask build' first", path.display()))?;
    let manager = Manager::new(Config { cache_dir: Some(bed.cache_dir()) })?;
    let mut spec = LoadSpec::new("virtio-blk.wasm", component, device.transport);
    spec.queues = Some(wish.queues);
    spec.arena_bytes = bed.arena_bytes();
    spec.limits.call_deadline_ms *= u64::from(bed.slowness());
    spec.limits.host_budget_ms *= u64::from(bed.slowness());
    if let Some(entries) = wish.ring_entries {
        spec.ring_entries = entries;
    }
    let binding = manager.load(spec)?;
    let mut fixture = Fixture { manager, binding, wish, slowness: bed.slowness() };
    let result = (case.check)(&mut fixture);
    let left = fixture.leave();
    drop(device.keep);
    result.and(left).map(|()| true)
}
