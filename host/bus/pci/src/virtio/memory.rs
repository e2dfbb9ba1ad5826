//! Regions that the device may reach.

use std::collections::BTreeMap;
use std::sync::Arc;

use cofferdam_device::{DmaRegion, TransportError};

use crate::claimed::Reach;

/// Regions that one device can be given.
pub(super) const MAX_REGIONS: usize = 64;

/// Everything that was mapped, kept alive, with the I/O addresses that are taken.
#[derive(Default)]
pub(super) struct Memory {
    regions: Vec<Entry>,
    /// First address -> address after the last, of every run; they do not overlap.
    taken: BTreeMap<u64, u64>,
}

struct Entry {
    region: Arc<DmaRegion>,
    /// May be taken away while the device runs.
    added: bool,
}

impl Memory {
    pub(super) fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether `region` can be told to a device that reaches memory like `reach`.
    ///
    /// # Errors
    /// `Invalid` when it overlaps another one, and when its addresses are of the other kind: an address that something translates is somebody else's memory to a device
    /// for which nothing does.
    pub(super) fn check(&self, region: &DmaRegion, reach: Reach) -> Result<(), TransportError> {
        let invalid = |why: String| Err(TransportError::Invalid(why));
        match (reach, region.page_bytes()) {
            (Reach::Physical, None) => return invalid("a region without physical addresses".to_owned()),
            (Reach::Iommu, Some(_)) => return invalid("a region of physical addresses behind an IOMMU".to_owned()),
            _ => {}
        }
        let mut own = BTreeMap::new();
        for (first, end) in runs(region) {
            if let Some(other) = overlapping(&self.taken, first, end).or(overlapping(&own, first, end)) {
                return invalid(format!("the region at {first:#x} overlaps the one at {other:#x}"));
            }
            own.insert(first, end);
        }
        Ok(())
    }

    /// Keeps a region that was checked.
    pub(super) fn keep(&mut self, region: Arc<DmaRegion>, added: bool) {
        self.taken.extend(runs(&region));
        self.regions.push(Entry { region, added });
    }

    /// The regions that the device started with; `None` when there are others, which may be taken away while it runs.
    pub(super) fn as_started(&self) -> Option<impl Iterator<Item = &DmaRegion>> {
        let others = self.regions.iter().any(|entry| entry.added);
        (!others).then(|| self.regions.iter().map(|entry| &*entry.region))
    }

    /// Whether the region at `iova` may be taken away while the device runs; `None` if there is none.
    pub(super) fn is_added(&self, iova: u64) -> Option<bool> {
        self.regions.iter().find(|entry| entry.region.iova() == iova).map(|entry| entry.added)
    }

    /// Lets go of the region at `iova`.
    pub(super) fn forget(&mut self, iova: u64) {
        if let Some(place) = self.regions.iter().position(|entry| entry.region.iova() == iova) {
            for (first, _) in runs(&self.regions.swap_remove(place).region) {
                self.taken.remove(&first);
            }
        }
    }

    /// Whether `bytes` bytes at `address` are in one region and follow each other for the device.
    pub(super) fn holds(&self, address: u64, bytes: u64) -> bool {
        self.regions.iter().any(|entry| entry.region.offset_of(address, bytes).is_some())
    }

    pub(super) fn clear(&mut self) {
        self.regions.clear();
        self.taken.clear();
    }
}

/// First address and address after the last of what follows each other.
fn runs(region: &DmaRegion) -> impl Iterator<Item = (u64, u64)> {
    let step = region.page_bytes().unwrap_or(region.len()).max(1);
    (0..region.len()).step_by(usize::try_from(step).unwrap_or(usize::MAX)).map(move |offset| {
        let first = region.address_of(offset);
        (first, first.saturating_add(region.run_bytes(offset)))
    })
}

fn overlapping(taken: &BTreeMap<u64, u64>, first: u64, end: u64) -> Option<u64> {
    let (other, other_end) = taken.range(..end).next_back()?;
    (*other_end > first).then_some(*other)
}
