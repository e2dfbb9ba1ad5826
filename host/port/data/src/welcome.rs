//! From a hello to a handle, a region and rings.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cofferdam_client::ring::{Rings, RingsFile, is_ring_size};
use cofferdam_client::wire::{Geometry, Hello, PAGE_BYTES, Refusal, Refused, VERSION, Welcome};

use crate::service::{BlockGeometry, Disk, HandleSpec, MapError, Notify, OpenError, Region, Service};
use crate::session::Session;
use crate::shared::Shared;
use crate::socket::send_with;

/// A client that has been let in. The rings' pages go when the file drops.
pub(crate) struct Admitted<D: Disk> {
    pub(crate) session: Session<D>,
    pub(crate) rings: RingsFile,
}

pub(crate) fn refused(reason: Refusal, text: impl Into<String>) -> Refused {
    Refused { reason, text: text.into() }
}

/// Gives the client what it asked for, or says why not; then nothing is kept. Waits for the device, in [`Disk::map`].
pub(crate) fn welcome<S: Service>(
    shared: &Shared<S>,
    socket: BorrowedFd<'_>,
    peer: &str,
    notify: &Arc<Notify>,
    hello: Hello,
) -> Result<Admitted<S::Disk>, Refused> {
    if hello.version != VERSION {
        return Err(refused(Refusal::Version, format!("version {VERSION}, the client version {}", hello.version)));
    }
    if !is_ring_size(hello.entries) {
        return Err(refused(Refusal::Size, "a ring has a power of two of entries, up to 1,024"));
    }
    if hello.region_bytes == 0 || !hello.region_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(refused(Refusal::Size, "a region is a multiple of 4,096 bytes"));
    }
    let lanes = shared.service.lanes();
    if lanes == 0 {
        return Err(refused(Refusal::Revoked, "the binding is not serving"));
    }
    let spec = HandleSpec {
        label: shared.address.to_string(),
        peer: peer.to_owned(),
        lane: shared.next_lane.fetch_add(1, Ordering::Relaxed) % lanes,
        notify: Some(Arc::clone(notify)),
        ..HandleSpec::default()
    };
    let disk = shared.service.open(spec).map_err(|error| {
        let reason = match error {
            OpenError::Revoked => Refusal::Revoked,
            OpenError::TooMany(_) => Refusal::Busy,
            OpenError::Host(_) | OpenError::NoSuchLane { .. } | OpenError::Taken(_) => Refusal::Host,
        };
        refused(reason, error.to_string())
    })?;
    let map_failed = |error: MapError| {
        let reason = match error {
            MapError::Revoked => Refusal::Revoked,
            MapError::Busy { .. } => Refusal::Busy,
            MapError::Size { .. } => Refusal::Size,
            MapError::Unsupported(_) => Refusal::Unsupported,
            MapError::AlreadyMapped | MapError::Host(_) => Refusal::Host,
        };
        refused(reason, error.to_string())
    };
    let region = disk.map(hello.region_bytes).map_err(map_failed)?;
    let (rings, file) = Rings::create("cofferdam-data-rings", hello.entries)
        .map_err(|error| refused(Refusal::Host, error.to_string()))?;
    let packet = Welcome {
        region_bytes: hello.region_bytes,
        entries: hello.entries,
        handle: disk.id(),
        geometry: geometry(disk.geometry()),
    };
    // Open here only while it is sent: the certificate would find it.
    let descriptor = region.descriptor().map_err(map_failed)?;
    use std::os::fd::AsFd;
    if !send_with(socket, &packet.encode(), &descriptor, file.as_fd()) {
        return Err(refused(Refusal::Host, "the welcome could not be sent"));
    }
    drop(descriptor);
    Ok(Admitted { session: Session::new(disk, region, rings), rings: file })
}

fn geometry(g: &BlockGeometry) -> Geometry {
    Geometry {
        capacity_bytes: g.capacity_bytes,
        logical_block_bytes: g.logical_block_bytes,
        physical_block_bytes: g.physical_block_bytes,
        max_transfer_bytes: g.max_transfer_bytes,
        max_discard_bytes: if g.can_discard { g.max_discard_bytes } else { 0 },
        discard_align_bytes: g.discard_align_bytes,
        max_write_zeroes_bytes: if g.can_write_zeroes { g.max_write_zeroes_bytes } else { 0 },
        read_only: g.read_only,
        can_flush: g.can_flush,
        write_zeroes_may_unmap: g.write_zeroes_may_unmap,
        has_id: g.has_id,
    }
}
