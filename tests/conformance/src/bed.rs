//! The device under test.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use cofferdam_manager::{Binding, Config, LoadSpec, Manager, Transport};

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
}

/// What a case works with: a driver that serves the device.
pub struct Fixture {
    /// The host.
    pub manager: Manager,
    /// The binding under test.
    pub binding: Arc<Binding>,
    /// The wish that was granted.
    pub wish: Wish,
}

impl Fixture {
    /// A client of its own on `lane`.
    ///
    /// # Errors
    /// When the handle is refused.
    pub fn client(&self, lane: usize) -> anyhow::Result<Client> {
        Client::open(&self.binding, lane)
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
    let path = driver_path("virtio-blk.wasm");
    let component =
        std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask build' first", path.display()))?;
    let cache_dir = Some(driver_path("../test-cache"));
    let manager = Manager::new(Config { cache_dir })?;
    let mut spec = LoadSpec::new("virtio-blk.wasm", component, device.transport);
    spec.queues = Some(wish.queues);
    if let Some(entries) = wish.ring_entries {
        spec.ring_entries = entries;
    }
    let binding = manager.load(spec)?;
    let mut fixture = Fixture { manager: manager.clone(), binding: Arc::clone(&binding), wish };
    let result = (case.check)(&mut fixture);
    if binding.certificate().is_none() {
        let certificate = manager.unload_binding(&binding, &cofferdam_manager::UnloadOptions::default())?;
        ensure!(certificate.residual.is_zero(), "after the case: {:?}", certificate.residual);
        ensure!(certificate.leaked.bytes == 0, "after the case: {:?}", certificate.leaked);
    }
    drop(device.keep);
    result.map(|()| true)
}
