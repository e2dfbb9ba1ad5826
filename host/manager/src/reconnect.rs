//! A device that is lost, or that breaks the rules of its rings, is brought back under its clients (DESIGN section 10, `--reconnect`).
//!
//! ```text
//! lost, or broke a rule -> nobody touches it -> silent (L1)? -> what it had done is answered, the rest set aside -> given up
//!                                                  \-> not shown: the ladder, as without this
//! -> opened again, until it is there or the wait is over -> the same device? -> rings, memory and call descriptors as they were -> started
//! -> what was set aside is given to it, in the order of admission -> clients go on
//! ```
//!
//! Clients are held meanwhile. Nothing of theirs changes: handles, leases, mapped regions and the descriptors that they sleep on are the same. One that does not come back, or another one in
//! its place, makes the binding `failed`: clients get errors, and `cofferdam restart` waits once more. What is given again and what is not, and when a flush fails, is in `lane/replay`.
//!
//! It runs on a thread of its own; the load's and the ladder's lock is held only while a device that was found is set up. A ladder that comes meanwhile finds everything as after a loss.

mod bring;

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use cofferdam_device::transport::Transport;
use cofferdam_device::{Confinement, DeviceFault, DmaRegion};
use cofferdam_lifecycle::{Event, Phase};
use parking_lot::Mutex;

use crate::binding::Binding;
use crate::device::{SharedTransport, host_features};
use crate::error::LaneFault;
use crate::events::EventKind;
use crate::lane::{DiskId, Lane, Place, Promise};
use crate::manager::Shared;
use crate::ports::Within;
use crate::queues::Layout;

/// Opens the device once more; the error is a sentence for an operator.
pub type Open = Box<dyn Fn() -> Result<Box<dyn Transport>, String> + Send + Sync>;

/// How a device that is lost is waited for.
pub struct Reconnect {
    /// For how long, from the loss, at most a day; clients wait as long.
    pub wait: Duration,
    /// How it is opened. Called again and again until it succeeds, 500 ms apart at the most; must itself be bounded.
    pub open: Open,
}

impl std::fmt::Debug for Reconnect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reconnect").field("wait", &self.wait).finish_non_exhaustive()
    }
}

/// Why a device has to be brought back.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Why {
    Lost,
    Broken(DeviceFault),
}

/// What the device is that is waited for.
pub(crate) struct Expected {
    pub(crate) layout: Layout,
    pub(crate) device_type: Option<u32>,
    /// All that was negotiated, with what belongs to the rings.
    pub(crate) features: u64,
    pub(crate) confinement: Confinement,
}

impl Expected {
    /// What `device` is, on which a driver has negotiated `features`.
    pub(crate) fn of(layout: Layout, features: u64, device: &dyn Transport) -> Expected {
        Expected {
            layout,
            device_type: device.device_type(),
            features: features | host_features(device.offered_features()),
            confinement: device.confinement(),
        }
    }
}

/// How far it is.
enum Progress {
    Here,
    /// It is waited for, at most until then; why it could not be opened last.
    Away {
        until: Instant,
        last: Option<String>,
    },
    /// It was found, and is being set up.
    Returning,
    /// It is not waited for any more.
    GaveUp(String),
}

/// A binding's means to bring its device back.
pub(crate) struct Reconnection {
    reconnect: Reconnect,
    expected: Expected,
    transport: Weak<Mutex<Box<dyn Transport>>>,
    manager: Weak<Shared>,
    promise: Arc<Promise>,
    /// The disk's id, if it tells one.
    id: OnceLock<DiskId>,
    progress: Mutex<Progress>,
}

impl Reconnection {
    pub(crate) fn new(
        reconnect: Reconnect,
        expected: Expected,
        transport: &SharedTransport,
        manager: &Weak<Shared>,
        promise: Arc<Promise>,
    ) -> Reconnection {
        let (transport, manager) = (Arc::downgrade(transport), Weak::clone(manager));
        Reconnection {
            reconnect,
            expected,
            transport,
            manager,
            promise,
            id: OnceLock::new(),
            progress: Mutex::new(Progress::Here),
        }
    }

    /// The id of the disk that it is.
    pub(crate) fn id(&self) -> Option<&DiskId> {
        self.id.get()
    }

    /// Another process has asked for it.
    pub(crate) fn has_id(&self, id: DiskId) {
        let _ = self.id.set(id);
    }

    /// Asks the disk that was just started, on a lane that nobody has used.
    pub(crate) fn learn_id(&self, binding: &Binding, lane: &Lane, rings: &Arc<DmaRegion>) {
        match lane.ask_id(&Place { region: rings, offset: self.expected.layout.identity }) {
            Ok(id) => self.has_id(id),
            Err(reason) => tracing::warn!(
                binding = binding.name(),
                %reason,
                "the disk's id is not known: another one of its size in its place would not be noticed"
            ),
        }
    }

    /// Whether writes may be lost, and no client has heard of it yet.
    pub(crate) fn is_untold(&self) -> bool {
        self.promise.is_untold()
    }

    /// Whether writes were acknowledged that no flush has covered.
    pub(crate) fn has_unflushed(&self) -> bool {
        self.promise.is_broken()
    }

    fn waits(&self, until: Instant, last: Option<String>) {
        *self.progress.lock() = Progress::Away { until, last };
    }

    fn is(&self, progress: Progress) {
        *self.progress.lock() = progress;
    }
}

impl Binding {
    /// The device of this number is lost or broke a rule. Whether it is to be brought back, or was; else the binding has to leave.
    pub(crate) fn device_away(self: &Arc<Self>, device: u64, why: Why) -> bool {
        let Some(reconnection) = self.reconnection.get() else { return false };
        let wait = reconnection.reconnect.wait;
        self.enter_away(Event::DeviceAway, device, wait, || {
            reconnection.waits(Instant::now() + wait, None);
            let reason = match why {
                Why::Lost => "it was lost".to_owned(),
                Why::Broken(fault) => format!("it broke the rules: {fault}"),
            };
            tracing::warn!(binding = self.name(), device = self.device(), reason, "device away");
            self.record(EventKind::DeviceAway { reason, wait_ms: wait.as_millis() as u64 });
            self.bring_back_elsewhere(Some(why))
        })
    }

    /// A lane found that the device broke the rules of a ring. The lane's lease is held. Whether it is to be brought back.
    pub(crate) fn device_broke(self: &Arc<Self>, fault: DeviceFault) -> bool {
        // The ring is under the lease: no other device can be in its place meanwhile.
        let is_away = self.device_away(self.device_number(), Why::Broken(fault));
        if is_away {
            self.record(LaneFault::Device(fault).to_event());
        }
        is_away
    }

    /// An operator wants a device that did not come back to be waited for once more; `false` if it is not that what failed.
    pub(crate) fn wait_again(self: &Arc<Self>) -> bool {
        let Some(reconnection) = self.reconnection.get() else { return false };
        let gave_up = matches!(*reconnection.progress.lock(), Progress::GaveUp(_));
        if !gave_up || self.phase() != Phase::Failed {
            return false;
        }
        self.enter_away(Event::Restarted, self.device_number(), reconnection.reconnect.wait, || {
            reconnection.waits(Instant::now() + reconnection.reconnect.wait, None);
            self.bring_back_elsewhere(None)
        })
    }

    /// Whether no driver can be made for the want of a device.
    pub(crate) fn has_no_device(&self) -> bool {
        let progress = |it: &Reconnection| matches!(*it.progress.lock(), Progress::Away { .. } | Progress::GaveUp(_));
        self.reconnection.get().is_some_and(progress)
    }

    /// What is waited for, or why it is not any more, in a sentence.
    pub(crate) fn away_sentence(&self) -> Option<String> {
        if !matches!(self.phase(), Phase::Recovering | Phase::Failed) {
            return None;
        }
        let device = self.device();
        Some(match &*self.reconnection.get()?.progress.lock() {
            Progress::Here => return None,
            Progress::Returning => format!("{device} is back and is being set up; clients wait"),
            Progress::Away { until, last } => {
                let left = until.saturating_duration_since(Instant::now()).as_secs();
                let last = last.as_ref().map(|last| format!(" ({last})")).unwrap_or_default();
                format!("waits for {device} to come back, {left} s left{last}")
            }
            Progress::GaveUp(why) => {
                format!("{device} is not waited for any more: {why}; 'cofferdam restart {}' waits again", self.name())
            }
        })
    }

    /// Has a thread bring the device back; whether there is one. Without a reason it was given up before.
    fn bring_back_elsewhere(self: &Arc<Self>, why: Option<Why>) -> bool {
        let binding = Arc::clone(self);
        let spawned = Within::spawn("cofferdam-return", move || binding.bring_back(why));
        if let Err(error) = &spawned {
            tracing::error!(binding = self.name(), %error, "no thread to bring the device back on");
        }
        spawned.is_ok()
    }
}
