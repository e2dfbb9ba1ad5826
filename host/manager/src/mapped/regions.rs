//! The mapped regions of one binding: from before the device hears of each until its memory is gone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cofferdam_device::transport::{Silence, Transport};
use cofferdam_device::{DmaRegion, RegionError, TransportError, WindowedRegion};
use cofferdam_gate::{HandleState, Notify};
use parking_lot::Mutex;

use super::{MapError, MappedUse, Share};
use crate::device::SharedTransport;
use crate::handle::HandleShared;
use crate::lane::Lane;

/// How long a revoked region stays for whoever has it in hand (DESIGN section 5).
const IN_HAND: Duration = Duration::from_millis(100);
/// I/O address of the first mapped region: above the rings' and the largest arena. It only grows from there; 47 bits leave room for half a million regions of the
/// default bound's size.
const FIRST_IOVA: u64 = 0x100_0000_0000;
/// Regions lie a page apart at least, so that nothing that runs over one's end is in the next.
const GAP: u64 = 4096;
/// How long a client waits for the device's messages while somebody else has one under way.
const DEVICE_BOUND: Duration = Duration::from_secs(2);
/// How long the watching thread waits for the device at once. It has other bindings to look at.
const UNMAP_SLICE: Duration = Duration::from_millis(10);
/// How long a device may take to acknowledge that it has let a region go, over all attempts.
const UNMAP_BOUND: Duration = Duration::from_secs(2);

/// Bounds of one binding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MapLimits {
    pub(crate) handles: usize,
    pub(crate) bytes: u64,
}

/// What regions are made with; there from the moment the binding serves until its end.
pub(crate) struct Site {
    pub(crate) transport: Weak<Mutex<Box<dyn Transport>>>,
    /// What the binding's memfds are called, for the certificate's search.
    pub(crate) memory: String,
    pub(crate) wake: Arc<Notify>,
    pub(crate) limits: MapLimits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The device is being told of it; whoever does that decides what comes next.
    Mapping,
    /// Its handle may use it.
    Live,
    /// Not to be used, whatever its handle says.
    Leaving,
}

/// One region that the device reaches or may reach.
struct Row {
    share: Arc<Share>,
    owner: Arc<HandleShared>,
    lane: Arc<Lane>,
    stage: Stage,
    /// Since when nothing of its handle is in flight.
    quiet: Option<Instant>,
    /// Since when the device has been asked to let it go.
    asked: Option<Instant>,
}

impl Row {
    /// Whether a client or port holds the region, and has done so for less than it is given since its last request was answered.
    fn is_in_hand(&mut self) -> bool {
        let since = *self.quiet.get_or_insert_with(Instant::now);
        // This table has one reference, the handle may have another.
        let is_held = Arc::strong_count(&self.share) > 1 + usize::from(self.owner.has_mapped());
        is_held && since.elapsed() < IN_HAND
    }
}

/// Invariant: a region is in `rows` or in `retired` from before the device hears of it until it is revoked or leaked, and `bytes` is the sum of both.
#[derive(Default)]
struct Table {
    site: Option<Site>,
    rows: Vec<Row>,
    /// Kept because the device has not let go of them. Revoked if it is shown to be silent in the end, leaked if not.
    retired: Vec<Arc<Share>>,
    bytes: u64,
    /// The device is away; whether it is known to be silent.
    away: Option<bool>,
    next_iova: Option<u64>,
    made: u64,
    leaked: u64,
}

impl Table {
    fn row(&mut self, iova: u64) -> Option<&mut Row> {
        self.rows.iter_mut().find(|row| row.share.region().iova() == iova)
    }

    fn take_row(&mut self, iova: u64) -> Option<Row> {
        let place = self.rows.iter().position(|row| row.share.region().iova() == iova)?;
        Some(self.rows.swap_remove(place))
    }

    /// The device does not reach the region: its pages go, and what it counted for is free again. Memory that the system will not take back goes on counting.
    fn revoke(&mut self, share: &Share) {
        if share.region().revoke() {
            self.bytes -= share.region().len();
        }
    }

    fn busy(&self, limits: MapLimits, bytes: u64) -> Option<MapError> {
        if self.rows.len() + self.retired.len() >= limits.handles {
            return Some(MapError::Busy { limit: format!("{} mapped handles", limits.handles) });
        }
        (bytes > limits.bytes.saturating_sub(self.bytes))
            .then(|| MapError::Busy { limit: format!("{} bytes of mapped memory", limits.bytes) })
    }
}

/// What one look of the watching thread found.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    /// Some region of a revoked or closed handle is still there: look again soon.
    pub(crate) waits: bool,
    /// Bytes that were retired in this look, and why.
    pub(crate) retired: Option<(u64, String)>,
}

/// The mapped regions of one binding.
#[derive(Default)]
pub(crate) struct Regions {
    table: Mutex<Table>,
}

impl Regions {
    /// From here on handles can map.
    pub(crate) fn open(&self, site: Site) {
        let mut table = self.table.lock();
        table.next_iova = Some(FIRST_IOVA);
        table.site = Some(site);
    }

    pub(super) fn map(&self, owner: &Arc<HandleShared>, lane: &Arc<Lane>, bytes: u64) -> Result<Arc<Share>, MapError> {
        let (share, transport) = self.reserve(owner, lane, bytes)?;
        let iova = share.region().iova();
        let Some(mut device) = transport.try_lock_for(DEVICE_BOUND) else {
            self.forget(iova);
            return Err(MapError::Host("the device is busy".to_owned()));
        };
        // The ladder's release has this same lock: behind it nothing is mapped any more. Nor is anything once the right to it has ended, while it waited here.
        let (is_over, is_away) = {
            let table = self.table.lock();
            (owner.state() == HandleState::Revoked || table.site.is_none(), table.away.is_some())
        };
        if is_over || is_away {
            drop(device);
            self.forget(iova);
            return Err(if is_over { MapError::Revoked } else { MapError::Host("the device is away".to_owned()) });
        }
        // Held until the row says that it is mapped: whoever maps the regions again at a device that came back has this lock.
        let answer = device.map(Arc::clone(share.region()));
        match answer {
            Ok(()) => {}
            // The device may reach it: only an acknowledged unmap, or silence, says that it does not.
            Err(error @ (TransportError::Timeout | TransportError::Lost)) => {
                if let Some(row) = self.table.lock().row(iova) {
                    row.stage = Stage::Leaving;
                }
                share.wake();
                return Err(MapError::Host(error.to_string()));
            }
            Err(error) => {
                self.forget(iova);
                return Err(match error {
                    TransportError::Unsupported(why) => MapError::Unsupported(why),
                    TransportError::Exhausted(limit) => MapError::Busy { limit },
                    error => MapError::Host(error.to_string()),
                });
            }
        }
        let mut table = self.table.lock();
        // Gone: the ladder was faster.
        let row = table.row(iova).ok_or(MapError::Revoked)?;
        if !owner.set_mapped(&share) {
            // Cannot be: the claim is this call's alone. It leaves like any other.
            row.stage = Stage::Leaving;
            return Err(MapError::AlreadyMapped);
        }
        row.stage = Stage::Live;
        drop(table);
        drop(device);
        if owner.state() == HandleState::Revoked {
            // Whoever revoked it may have looked before the region was there.
            share.wake();
            return Err(MapError::Revoked);
        }
        Ok(share)
    }

    /// Makes a region that counts, and that the device does not know yet.
    fn reserve(
        &self,
        owner: &Arc<HandleShared>,
        lane: &Arc<Lane>,
        bytes: u64,
    ) -> Result<(Arc<Share>, SharedTransport), MapError> {
        let host = |error: RegionError| MapError::Host(error.to_string());
        let mut table = self.table.lock();
        let Table { site: Some(site), next_iova, made, .. } = &*table else {
            return Err(MapError::Revoked);
        };
        let limits = site.limits;
        // Windows begin in the first 4 GiB of a region: what is beyond would be granted and could not be used.
        let max_bytes = limits.bytes.min(1 << 32);
        if bytes == 0 || !bytes.is_multiple_of(4096) || bytes > max_bytes {
            return Err(MapError::Size { bytes, max_bytes });
        }
        if let Some(busy) = table.busy(limits, bytes) {
            return Err(busy);
        }
        let transport = site.transport.upgrade().ok_or(MapError::Revoked)?;
        let made = made + 1;
        let iova = next_iova.ok_or_else(|| MapError::Host("all I/O addresses are used up".to_owned()))?;
        let region = DmaRegion::new(&format!("{}-mapped-{made}", site.memory), bytes, iova).map_err(host)?;
        let share = Arc::new(Share {
            windows: WindowedRegion::new(Arc::new(region)),
            right: owner.right(),
            taken: AtomicBool::new(false),
            wake: Arc::clone(&site.wake),
        });
        table.made = made;
        table.next_iova = iova.checked_add(bytes).and_then(|end| end.checked_add(GAP));
        table.bytes += bytes;
        table.rows.push(Row {
            share: Arc::clone(&share),
            owner: Arc::clone(owner),
            lane: Arc::clone(lane),
            stage: Stage::Mapping,
            quiet: None,
            asked: None,
        });
        Ok((share, transport))
    }

    /// Takes back a region that the device never heard of, or has refused.
    fn forget(&self, iova: u64) {
        let mut table = self.table.lock();
        if let Some(row) = table.take_row(iova) {
            table.revoke(&row.share);
        }
    }

    /// For the watching thread: takes away the regions of revoked and closed handles with nothing in flight. Waits for one device for 10 ms at most.
    pub(crate) fn revoke_finished(&self) -> Finished {
        let mut found = Finished::default();
        let (candidates, transport) = {
            let table = self.table.lock();
            if table.away == Some(false) {
                // Soon it is silent, or gone for good.
                found.waits = !table.rows.is_empty();
                return found;
            }
            let Some(transport) = table.site.as_ref().and_then(|site| site.transport.upgrade()) else {
                return found;
            };
            let over = |row: &&Row| match row.stage {
                Stage::Mapping => false,
                Stage::Live => row.owner.state() == HandleState::Revoked,
                Stage::Leaving => true,
            };
            let of = |row: &Row| (row.share.region().iova(), Arc::clone(&row.owner), Arc::clone(&row.lane));
            (table.rows.iter().filter(over).map(of).collect::<Vec<_>>(), transport)
        };
        let mut stuck = None;
        for (iova, owner, lane) in candidates {
            // Who had the lease before has counted what it admitted, and nothing is admitted after the revocation: behind this look the count only falls.
            let looked = lane.try_reap().is_some();
            if !looked || owner.in_flight.load(Ordering::Acquire) > 0 {
                found.waits = true;
                continue;
            }
            // Whoever still has it in hand (a port that is about to tell its client) gets a moment, so that nobody takes the zeroes for data.
            if self.table.lock().row(iova).is_some_and(|row| row.is_in_hand()) {
                found.waits = true;
                continue;
            }
            {
                // A device that is away and silent reaches nothing, and one that comes back is told of what is left: under one lock.
                let mut table = self.table.lock();
                if table.away == Some(true) {
                    if let Some(row) = table.take_row(iova) {
                        table.revoke(&row.share);
                    }
                    continue;
                }
            }
            // One region that the device does not let go of is enough to wait for in a look; the others' time runs with it.
            let silence = match &stuck {
                None => unmap(&transport, iova),
                Some(reason) => Silence::Unconfirmed { reason: String::clone(reason) },
            };
            let mut table = self.table.lock();
            match silence {
                Silence::Confirmed => {
                    // Not there: the ladder has ended it.
                    if let Some(row) = table.take_row(iova) {
                        table.revoke(&row.share);
                    }
                }
                Silence::Unconfirmed { reason } => {
                    let now = Instant::now();
                    let late = table.row(iova).is_some_and(|row| now - *row.asked.get_or_insert(now) >= UNMAP_BOUND);
                    if late && let Some(row) = table.take_row(iova) {
                        let bytes = row.share.region().len();
                        row.share.taken.store(true, Ordering::Release);
                        table.retired.push(row.share);
                        tracing::warn!(iova, bytes, reason, "mapped memory retired: the device has not let it go");
                        let sum = found.retired.take().map_or(0, |(sum, _)| sum);
                        found.retired = Some((sum + bytes, reason.clone()));
                    } else {
                        found.waits = true;
                    }
                    stuck.get_or_insert(reason);
                }
            }
        }
        found
    }

    /// The device is away. Nothing is mapped or taken away until more is known.
    pub(crate) fn hold_off(&self) {
        self.table.lock().away = Some(false);
    }

    /// It is silent, and was released: what it had not let go of goes.
    pub(crate) fn silent(&self) {
        let mut table = self.table.lock();
        table.away = Some(true);
        let leaving = table.rows.extract_if(.., |row| row.stage == Stage::Leaving).map(|row| row.share);
        let gone: Vec<_> = leaving.collect();
        let retired = std::mem::take(&mut table.retired);
        gone.into_iter().chain(retired).for_each(|share| table.revoke(&share));
    }

    /// It is back, and told of every region that handles have. Its lock is held.
    ///
    /// # Errors
    /// What the device says to one of them.
    pub(crate) fn give_back(&self, device: &mut dyn Transport) -> Result<(), TransportError> {
        let mut table = self.table.lock();
        for row in table.rows.iter().filter(|row| row.stage == Stage::Live) {
            device.map(Arc::clone(row.share.region()))?;
        }
        table.away = None;
        Ok(())
    }

    /// For the ladder, after the transport was released: nothing is mapped any more, and every region is revoked if the device is `silent`, and leaked on purpose if it is
    /// not. Idempotent; the bytes that this call has leaked.
    pub(crate) fn end(&self, silent: bool) -> u64 {
        let mut table = self.table.lock();
        let mut leaked = 0;
        table.site = None;
        let rows = std::mem::take(&mut table.rows).into_iter().map(|row| row.share);
        let shares: Vec<_> = rows.chain(std::mem::take(&mut table.retired)).collect();
        for share in shares {
            if silent {
                table.revoke(&share);
            } else {
                share.taken.store(true, Ordering::Release);
                leaked += Arc::clone(share.region()).retire();
            }
        }
        table.leaked += leaked;
        leaked
    }

    /// Bytes that are kept because the device has not let go of them, or that were leaked for it at the end.
    pub(crate) fn retired_bytes(&self) -> u64 {
        self.used().retired_bytes
    }

    /// What counts against the bounds now, and what of it is kept because the device has not let go of it.
    pub(super) fn used(&self) -> MappedUse {
        let table = self.table.lock();
        let kept: u64 = table.retired.iter().map(|share| share.region().len()).sum();
        MappedUse {
            regions: table.rows.len() + table.retired.len(),
            bytes: table.bytes,
            retired_bytes: table.leaked + kept,
        }
    }
}

fn unmap(transport: &SharedTransport, iova: u64) -> Silence {
    match transport.try_lock_for(UNMAP_SLICE) {
        Some(mut device) => device.unmap(iova, Instant::now() + UNMAP_SLICE),
        None => Silence::Unconfirmed { reason: "the device is busy".to_owned() },
    }
}
