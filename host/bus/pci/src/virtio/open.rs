//! What a function has to be to be driven as a modern virtio device, and its first reset.
//!
//! Whoever had it before may have left it running: it is reset before it is told anything and before it may master the bus, and what does not reset is refused. So a device that was
//! opened has finished with all memory that it was given before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::{FunctionIds, TransportError};

use super::common::{Common, Reset, status};
use super::interrupts::{Notices, Wired};
use super::layout::{CONFIG_BYTES, Layout, Place};
use super::part::Part;
use super::silence::RESET_LIMIT;
use crate::claimed::Claimed;
use crate::registers::Registers;

/// Queues of a device that can be set up; more are not looked at.
pub(super) const MAX_QUEUES: u16 = 256;

/// Largest ring in entries (virtio 1.2, section 2.7).
const MAX_RING_ENTRIES: u16 = 32768;

/// How long a function's own reset may take.
const FUNCTION_RESET_LIMIT: Duration = Duration::from_secs(5);

/// Section 4.1.2: the vendor, and where device ids begin. Transitional devices have the ids before.
const VENDOR: u16 = 0x1af4;
const TRANSITIONAL: std::ops::RangeInclusive<u16> = 0x1000..=0x103f;
const MODERN: std::ops::RangeInclusive<u16> = 0x1041..=0x107f;

/// What is closed by `release`.
pub(super) struct Open {
    pub(super) claimed: Box<dyn Claimed>,
    pub(super) common: Common,
    pub(super) notify: Part,
    pub(super) notify_step: u32,
    pub(super) isr: Part,
    pub(super) device: Option<Part>,
    /// Entries of the MSI-X table.
    pub(super) vectors: u16,
    pub(super) notices: Notices,
    pub(super) wired: Option<Wired>,
}

impl Open {
    /// Lets go of the mapped BARs and of descriptors of its own.
    pub(super) fn close(self) -> Box<dyn Claimed> {
        self.claimed
    }
}

/// What the device said when it was asked.
pub(super) struct Offer {
    /// Virtio device id (section 5).
    pub(super) kind: u32,
    /// Feature bits.
    pub(super) features: u64,
    /// Largest ring of each queue in entries, a power of two; 0: there is no such queue.
    pub(super) sizes: Vec<u16>,
}

/// Looks at the function, resets it and asks it what it has. A function that is refused is quiet and given back.
pub(super) fn open(mut claimed: Box<dyn Claimed>) -> Result<(Open, Offer), String> {
    match begin(claimed.as_mut()) {
        Ok((parts, offer)) => {
            let Parts { layout, common, notify, isr, device, notices } = parts;
            let (notify_step, vectors) = (layout.notify_step, layout.vectors);
            let open = Open { claimed, common, notify, notify_step, isr, device, vectors, notices, wired: None };
            Ok((open, offer))
        }
        Err(why) => {
            claimed.quiet(Instant::now() + RESET_LIMIT);
            claimed.release();
            Err(why)
        }
    }
}

/// Where everything is. Nothing was changed to find it.
pub(super) struct Found {
    pub(super) kind: u32,
    pub(super) layout: Layout,
    pub(super) common: Part,
    pub(super) notify: Part,
    pub(super) isr: Part,
    pub(super) device: Option<Part>,
}

pub(super) fn find(claimed: &mut dyn Claimed) -> Result<Found, String> {
    let kind = kind(claimed.ids())?;
    let mut config = [0; CONFIG_BYTES];
    claimed.read_config(0, &mut config).map_err(|error| format!("reading its configuration space: {error}"))?;
    let layout = Layout::find(&config, &claimed.bar_bytes())?;
    let mut bars = BTreeMap::new();
    let mut part = |place: Place| part(claimed, &mut bars, place);
    let (common, notify, isr) = (part(layout.common)?, part(layout.notify)?, part(layout.isr)?);
    let device = layout.device.map(part).transpose()?;
    Ok(Found { kind, layout, common, notify, isr, device })
}

struct Parts {
    layout: Layout,
    common: Common,
    notify: Part,
    isr: Part,
    device: Option<Part>,
    notices: Notices,
}

fn begin(claimed: &mut dyn Claimed) -> Result<(Parts, Offer), String> {
    let Found { kind, layout, common, notify, isr, device } = find(claimed)?;
    let notices = Notices::new(claimed.event_fd()).map_err(|error| error.to_string())?;
    let mut parts = Parts { layout, common: Common::new(common), notify, isr, device, notices };
    reset(claimed, &mut parts.common)?;
    match ask(&mut parts.common) {
        Ok((features, sizes)) => {
            take_back(claimed);
            Ok((parts, Offer { kind, features, sizes }))
        }
        Err(error) => {
            let _ = parts.common.set_status(status::FAILED);
            Err(error.to_string())
        }
    }
}

/// It was reset, and its status has kept bits since: the 0 that confirmed the reset was its own. So it has finished with whatever a host that was killed had given it. What cannot be
/// freed, or looked for, stays where it is.
fn take_back(claimed: &mut dyn Claimed) {
    match claimed.take_back() {
        Ok(0) => {}
        Ok(bytes) => tracing::info!(address = %claimed.address(), bytes, "freed what an earlier host had left"),
        Err(error) => tracing::debug!(address = %claimed.address(), %error, "nothing of an earlier host freed"),
    }
}

/// The virtio device id.
fn kind(ids: FunctionIds) -> Result<u32, String> {
    let FunctionIds { vendor, device, .. } = ids;
    if vendor == VENDOR && TRANSITIONAL.contains(&device) {
        return Err(format!(
            "{vendor:04x}:{device:04x}: legacy and transitional devices are refused (virtio 1.2, section 4.1.2.1: modern ones have ids from 0x1040 on); in QEMU add disable-legacy=on to the device"
        ));
    }
    if vendor != VENDOR || !MODERN.contains(&device) {
        return Err(format!("{vendor:04x}:{device:04x} is no virtio device (virtio 1.2, section 4.1.2)"));
    }
    Ok(u32::from(device - 0x1040))
}

fn part(claimed: &mut dyn Claimed, bars: &mut BTreeMap<u8, Arc<dyn Registers>>, place: Place) -> Result<Part, String> {
    let failed = |error: TransportError| format!("mapping BAR {}: {error}", place.bar);
    let registers = match bars.get(&place.bar) {
        Some(registers) => Arc::clone(registers),
        None => claimed.bar(place.bar).map_err(failed)?,
    };
    bars.insert(place.bar, Arc::clone(&registers));
    Part::new(registers, place).map_err(failed)
}

fn reset(claimed: &mut dyn Claimed, common: &mut Common) -> Result<(), String> {
    common.begin_reset();
    let answer = common.wait_reset(Instant::now() + RESET_LIMIT);
    let mute = match answer {
        Reset::Done => return Ok(()),
        _ if claimed.is_lost() || claimed.is_absent() => return Err(TransportError::Lost.to_string()),
        Reset::Nobody | Reset::Deaf => "its registers read all ones".to_owned(),
        Reset::Pending(status) => format!("device_status reads {status:#x}"),
    };
    tracing::warn!(address = %claimed.address(), mute, "virtio reset not confirmed, resetting the function");
    let until = Instant::now() + FUNCTION_RESET_LIMIT;
    claimed.reset(until).map_err(|error| format!("it does not reset: {mute}; resetting the function: {error}"))?;
    match common.wait_reset(until) {
        Reset::Done => Ok(()),
        answer => Err(format!("it does not reset: {mute}, and after resetting the function: {answer:?}")),
    }
}

/// Section 4.1.4.3.1. What is known of it holds for the split rings that are used here. 0: there is no such queue.
pub(super) fn is_size(size: u16) -> bool {
    size == 0 || (size.is_power_of_two() && size <= MAX_RING_ENTRIES)
}

/// Features and queues. What was read counts because the status has its bits still.
fn ask(common: &mut Common) -> Result<(u64, Vec<u16>), TransportError> {
    common.set_status(status::ACKNOWLEDGE)?;
    common.set_status(status::DRIVER)?;
    common.alive()?;
    let features = common.offered()?;
    let queues = common.num_queues()?.min(MAX_QUEUES);
    let mut sizes = Vec::new();
    for queue in 0..queues {
        common.select(queue)?;
        sizes.push(common.queue_size()?);
    }
    common.alive()?;
    if sizes.is_empty() {
        return Err(TransportError::Protocol("it has no queues".to_owned()));
    }
    if let Some(size) = sizes.iter().find(|size| !is_size(**size)) {
        return Err(TransportError::Protocol(format!("a queue of {size} entries, which is no power of two")));
    }
    Ok((features, sizes))
}
