//! What the threads of one port share. On the data path only counts, each written by one lane's batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cofferdam_manager::{Binding, Parking};

use crate::address::TapAddress;
use crate::interface::Interface;

/// Packets since the port was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapCounts {
    /// From the kernel, given to the device.
    pub to_device: u64,
    /// From the device, taken by the kernel.
    pub to_kernel: u64,
    /// From the kernel, and not sent: the host, the driver or the device refused them, or they were of a kind or length that was not asked for.
    pub refused_by_device: u64,
    /// From the device, and the kernel refused them: impossible sizes in their header, or the interface is down or gone.
    pub refused_by_kernel: u64,
    /// From the device, and the kernel had no memory for them.
    pub no_room: u64,
}

/// See [`TapCounts`].
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) to_device: AtomicU64,
    pub(crate) to_kernel: AtomicU64,
    pub(crate) refused_by_device: AtomicU64,
    pub(crate) refused_by_kernel: AtomicU64,
    pub(crate) no_room: AtomicU64,
}

impl Counts {
    pub(crate) fn read(&self) -> TapCounts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        TapCounts {
            to_device: of(&self.to_device),
            to_kernel: of(&self.to_kernel),
            refused_by_device: of(&self.refused_by_device),
            refused_by_kernel: of(&self.refused_by_kernel),
            no_room: of(&self.no_room),
        }
    }
}

/// So many more, if any.
pub(crate) fn add(count: &AtomicU64, more: u64) {
    if more > 0 {
        count.fetch_add(more, Ordering::Relaxed);
    }
}

/// State of one port.
pub(crate) struct Shared {
    pub(crate) binding: Arc<Binding>,
    pub(crate) address: TapAddress,
    pub(crate) interface: Interface,
    pub(crate) stopping: AtomicBool,
    /// The interface was deleted under the port, which was said.
    pub(crate) lost: AtomicBool,
    pub(crate) counts: Counts,
    /// Where the workers stand while another process is to take over.
    pub(crate) parking: Parking<()>,
}
