//! Configuration changes that the device announces (virtio 1.2, section 4.1.5.4), passed on to the driver.
//!
//! ```text
//! watch: the device said so -> pending -> (no call under way, and the last one began REST ago) -> a thread of its own
//! thread: [crossing: config-changed] -> [crossing: get-properties] -> checked as at load -> lanes -> handles from now on
//! ```
//!
//! A device can announce changes as fast as it likes: at most one call is under way and one pending, and calls begin at least [`REST`] apart. The watch itself never calls
//! (L8). The ladder closes this before it drains, and drains what is inside.
//!
//! Requests of every handle, however old, are checked against what the device can do now; a handle goes on telling what it could do when the handle was opened.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cofferdam_device::transport::Transport;
use cofferdam_runtime::{CallError, Instance};
use parking_lot::{Mutex, MutexGuard};

use crate::binding::Binding;
use crate::block::BlockGeometry;
use crate::device::DeviceWindow;
use crate::error::LaneFault;
use crate::events::EventKind;
use crate::ports::Within;

/// Least time between the beginnings of two calls: a device that does nothing but announce changes costs ten in a second.
const REST: Duration = Duration::from_millis(100);
/// Bytes of a driver's refusal that the log keeps.
const REFUSAL_BYTES: usize = 1024;

/// The control lane of a block driver once it is loaded, and what it needs to be asked again.
pub(crate) struct Control {
    pub(crate) instance: Instance,
    pub(crate) transport: Weak<Mutex<Box<dyn Transport>>>,
    pub(crate) queue_limit: u16,
    pub(crate) ring_limit: u16,
    /// What it negotiated, which it cannot do again.
    pub(crate) negotiated: Arc<Mutex<Option<u64>>>,
    pub(crate) arena_bytes: u64,
    pub(crate) max_lease_bytes: u32,
}

impl Control {
    /// Tells the driver, and asks it what the device can do now. `None`: the device is on its way out.
    fn ask(&mut self) -> Option<Result<BlockGeometry, CallError>> {
        let transport = self.transport.upgrade()?;
        let window = DeviceWindow::new(transport, self.queue_limit, self.ring_limit, Arc::clone(&self.negotiated));
        let told = self.instance.config_changed(Box::new(window));
        let properties = told.and_then(|()| self.instance.block_properties());
        Some(properties.map(|p| BlockGeometry::from_properties(&p, self.arena_bytes, self.max_lease_bytes)))
    }
}

#[derive(Default)]
struct Turn {
    /// A change was announced that no call has begun for.
    pending: bool,
    /// A thread is at it.
    inside: bool,
    /// When the last call began.
    since: Option<Instant>,
    /// The binding leaves: nobody goes in any more.
    closed: bool,
}

/// A binding's part in it.
#[derive(Default)]
pub(crate) struct ConfigChanges {
    turn: Mutex<Turn>,
    /// `None` before it serves, for a driver without a block service, and after the code was dropped. Held while the driver is called.
    control: Mutex<Option<Control>>,
}

/// A thread's stay.
struct Inside<'a>(&'a ConfigChanges);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.turn.lock().inside = false;
    }
}

impl ConfigChanges {
    /// The binding serves: `control` can be asked from now on.
    pub(crate) fn open(&self, control: Control) {
        *self.control.lock() = Some(control);
    }

    /// The ladder's: nobody goes in any more. Idempotent.
    pub(crate) fn close(&self) {
        let mut turn = self.turn.lock();
        (turn.closed, turn.pending) = (true, false);
    }

    /// Whether a thread is at it still.
    pub(crate) fn is_inside(&self) -> bool {
        self.turn.lock().inside
    }

    /// Notes what was announced; whether a thread is to be started now. `Err`: not yet, look again soon.
    fn announce(&self, announced: bool) -> Result<bool, ()> {
        let mut turn = self.turn.lock();
        turn.pending |= announced && !turn.closed;
        if !turn.pending {
            return Ok(false);
        }
        if turn.inside || turn.since.is_some_and(|since| since.elapsed() < REST) {
            return Err(());
        }
        (turn.pending, turn.inside, turn.since) = (false, true, Some(Instant::now()));
        Ok(true)
    }

    /// Takes the control lane out, for the ladder to drop or to keep; `Err` if a call has not left it by `until`.
    pub(crate) fn take_control(&self, until: Instant) -> Result<Option<Instance>, ()> {
        let control: Option<MutexGuard<'_, _>> = self.control.try_lock_until(until);
        Ok(control.ok_or(())?.take().map(|control| control.instance))
    }
}

impl Binding {
    /// The watch's: passes on what the device `announced`, and what is pending. Whether nothing is left to be passed on later.
    pub(crate) fn pass_config_change(self: &Arc<Self>, announced: bool) -> bool {
        match self.config.announce(announced) {
            Ok(false) => true,
            Err(()) => false,
            Ok(true) => {
                let binding = Arc::clone(self);
                let tell = move || {
                    let _within = Within::enter();
                    let _inside = Inside(&binding.config);
                    binding.tell_config_change();
                };
                if let Err(error) = std::thread::Builder::new().name("cofferdam-config".into()).spawn(tell) {
                    drop(Inside(&self.config));
                    tracing::error!(binding = self.name(), %error, "no thread to tell the driver on");
                }
                true
            }
        }
    }

    fn tell_config_change(&self) {
        let (Some(serving), Some(asked)) =
            (self.serving.get(), self.config.control.lock().as_mut().and_then(Control::ask))
        else {
            return;
        };
        let Some(current) = &serving.geometry else { return };
        match asked {
            Ok(geometry) => {
                let geometry = Arc::new(geometry);
                let before = Arc::clone(&current.lock());
                let changes = before.changes(&geometry);
                if changes.is_empty() {
                    tracing::debug!(binding = self.name(), "a configuration change that the driver makes nothing of");
                    return;
                }
                // Handles that are opened from here on; then what is refused from whomever.
                *current.lock() = Arc::clone(&geometry);
                serving.lanes.iter().for_each(|lane| lane.set_geometry(&geometry));
                tracing::info!(binding = self.name(), ?changes, "configuration changed");
                self.record(EventKind::ConfigChanged { changes, refused: None });
            }
            // What the device can do stays as it was known; a device that is gone is noticed elsewhere.
            Err(CallError::Driver(error)) => {
                let mut refused = error.to_string();
                refused.truncate(refused.floor_char_boundary(REFUSAL_BYTES));
                tracing::warn!(binding = self.name(), refused, "the driver refuses a configuration change");
                self.record(EventKind::ConfigChanged { changes: Vec::new(), refused: Some(refused) });
            }
            Err(CallError::Fault(fault)) => {
                self.set_fault(LaneFault::Guest(fault));
                if let Some(lane) = serving.lanes.first() {
                    lane.wake_watch();
                }
            }
        }
    }
}
