//! What a device looks like to the host, whatever bus it came from.
//!
//! A bus crate finds a device and hands the manager one [`Transport`]. The manager drives it through the steps of
//! device initialisation (virtio 1.2, section 3.1.1) and of the ladder (DESIGN L1); a transport does no policy of its own.
//!
//! ```text
//! new -> negotiate -> read_config* -> map* -> setup_queue* -> start -> (traffic, map and unmap) -> quiesce -> release
//!          any step may fail or find the device lost; quiesce and release are always legal and idempotent
//! ```

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use crate::dma::DmaRegion;
use crate::error::{RegionError, TransportError};
use crate::function::{Confinement, Function};
use crate::handover::{Exported, NotExportable};

/// Guest-visible addresses of one split virtqueue, as the device is told them (virtio 1.2, section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueAddresses {
    /// Descriptor table, an I/O address, 16-byte aligned.
    pub descriptors: u64,
    /// Available ring ("driver area"), an I/O address, 2-byte aligned.
    pub available: u64,
    /// Used ring ("device area"), an I/O address, 4-byte aligned.
    pub used: u64,
}

/// One queue as the host wants the device to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Queue index, less than [`Transport::max_queues`].
    pub index: u16,
    /// Entries in the ring: a power of two, at most [`Transport::max_queue_size`].
    pub size: u16,
    /// Where the three parts of the ring are.
    pub addresses: QueueAddresses,
}

/// Tells a device that its available ring has something new (virtio 1.2, section 2.7.13.2.1).
pub trait Doorbell: Send + Sync {
    /// Rings. Takes no lock and never blocks; a lost device makes it a no-op.
    fn ring(&self);

    /// The descriptor behind it, if there is one, for a certificate to look for afterwards (L7).
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// The two notification channels of a queue.
pub struct QueueEvents {
    /// Host to device: the available buffer notification.
    pub doorbell: Box<dyn Doorbell>,
    /// Device to host: a non-blocking eventfd that becomes readable with the used buffer notification.
    pub call: OwnedFd,
}

/// What is known about a device after [`Transport::quiesce`], or about one region after [`Transport::unmap`] (DESIGN L1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// No more DMA and no more effect on the medium: memory may be freed, requests answered as failed.
    Confirmed,
    /// The device may still act. Whatever it can reach must be retired, never freed or reused.
    Unconfirmed {
        /// Why, in a sentence for the certificate.
        reason: String,
    },
}

/// One device, claimed by the host, driven by one binding.
///
/// Everything that a device answers through here is an allegation: implementations check lengths and ranges, the caller
/// checks meaning. No method may block without a bound; where the device has to answer, the implementation applies a
/// time limit of its own (seconds) and fails with [`TransportError::Timeout`].
pub trait Transport: Send {
    /// The address as an operator wrote it, `vhost-user:/run/blk.sock`.
    fn address(&self) -> &str;

    /// The virtio device id (virtio 1.2, section 5), or `None` where the transport cannot tell (vhost-user).
    fn device_type(&self) -> Option<u32>;

    /// All 64 feature bits that the device offers.
    fn offered_features(&self) -> u64;

    /// Accepts `features`, a subset of the offered ones, and finishes feature negotiation (FEATURES_OK).
    fn negotiate(&mut self, features: u64) -> Result<(), TransportError>;

    /// Reads device configuration space at `offset` bytes into all of `into`.
    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), TransportError>;

    /// Number of queues that may be set up, at least 1.
    fn max_queues(&self) -> u16;

    /// Largest ring size of queue `index` in entries, a power of two.
    fn max_queue_size(&self, index: u16) -> u16;

    /// Makes memory that this device can reach once it is mapped: `bytes` bytes, a multiple of 4,096, zeroed. `name` is how it is found in `/proc/PID/maps`. It is at
    /// `iova` where something translates; where nothing does it is where it is, in pages of [`DmaRegion::page_bytes`], and may be longer than it was asked for.
    ///
    /// # Errors
    /// [`RegionError`].
    fn memory(&mut self, name: &str, bytes: u64, iova: u64) -> Result<Arc<DmaRegion>, RegionError> {
        DmaRegion::new(name, bytes, iova).map(Arc::new)
    }

    /// How this device is kept to the memory that it was given.
    fn confinement(&self) -> Confinement {
        Confinement::Host
    }

    /// The registers, memory and interrupts of a device that its driver programs itself; `None` where the host does (virtio).
    fn function(&mut self) -> Option<&mut dyn Function> {
        None
    }

    /// Lets the device reach `region` at its I/O address. The transport keeps the region alive until `release`, or until `unmap` has confirmed that the device is done
    /// with it. Legal before the first `setup_queue`, and again after `start` for what [`Transport::unmap`] may take away while the device runs.
    ///
    /// # Errors
    /// After `start`: [`TransportError::Unsupported`] where memory cannot be added to a running device, [`TransportError::Exhausted`] when it has all the regions that it
    /// takes. After `Timeout` or `Lost` the device may reach the region nevertheless: it has to be unmapped, or kept until `release`.
    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError>;

    /// Gives the device one ring, and `call`, a non-blocking eventfd, to tell of used buffers by. Called once per queue, after `map` and before `start`.
    ///
    /// Whoever sleeps on a call descriptor keeps it when another device takes the place of the first: that one is given the same.
    fn setup_queue_with(&mut self, setup: QueueSetup, call: OwnedFd) -> Result<QueueEvents, TransportError>;

    /// The same with a descriptor of the queue's own.
    fn setup_queue(&mut self, setup: QueueSetup) -> Result<QueueEvents, TransportError> {
        let call = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let call = call.map_err(|e| TransportError::Io { what: "call eventfd".to_owned(), source: e.into() })?;
        self.setup_queue_with(setup, call)
    }

    /// DRIVER_OK: from here on the device may use the rings.
    fn start(&mut self) -> Result<(), TransportError>;

    /// Takes one region away again that was mapped after `start`, while the device runs; waits until `deadline` and a little at most, and never longer than the transport's own
    /// time limit. [`Silence::Confirmed`] only when the device has acknowledged that it does not reach the region any more, or cannot reach anything. After
    /// `Unconfirmed` the region stays mapped, and this may be called again: what was asked is not asked twice.
    ///
    /// The caller has seen to it that no request in flight uses the region.
    fn unmap(&mut self, iova: u64, deadline: Instant) -> Silence {
        let _ = (iova, deadline);
        Silence::Unconfirmed { reason: "memory cannot be taken away from this device while it runs".to_owned() }
    }

    /// A descriptor that becomes readable or hangs up when the device may have been lost or has something to say; poll it, then ask
    /// [`Transport::is_lost`] and [`Transport::take_config_change`].
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Sockets, event descriptors and device nodes that this device alone holds open in this process, for a certificate to look for afterwards (L7), by
    /// what the kernel calls them: what another device may open under the same name is not among them, nor what [`QueueEvents`] gave away.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Whether the device is gone (backend died, function removed). Handles pending device-to-host messages on the way; never blocks.
    fn is_lost(&mut self) -> bool;

    /// Whether the device has said, up to the last [`Transport::is_lost`] and since this was last asked, that its configuration changed, however often. It may have said so for
    /// nothing. Never blocks.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// Makes the device silent, waiting until `deadline` at most. `unanswered` is the number of requests that were published and
    /// not used: a vhost-user device is silent only when it is zero or when the backend process is gone. May be called again.
    fn quiesce(&mut self, unanswered: usize, deadline: Instant) -> Silence;

    /// Whether the device could be handed to another process.
    ///
    /// # Errors
    /// [`NotExportable`]: what is in the way.
    fn exportable(&self) -> Result<(), NotExportable> {
        Err(NotExportable::because("devices of this kind are not handed over"))
    }

    /// Everything that another process needs to go on with the device as it runs. Until [`Transport::resume`] nothing is said to it and nothing read of what it says, and
    /// dropping this transport, or `release`, closes descriptors and does nothing that the device or the other process could notice.
    ///
    /// # Errors
    /// [`NotExportable`]; then nothing has changed.
    fn export(&mut self) -> Result<Exported, NotExportable> {
        self.exportable()?;
        Err(NotExportable::because("devices of this kind are not handed over"))
    }

    /// Of a transport that was made of what another process exported: the region behind `file`, as [`Transport::memory`] made it there, with nothing in it changed.
    ///
    /// # Errors
    /// [`RegionError`], also for memory that the device was not given.
    fn adopt_region(&mut self, file: OwnedFd, bytes: u64, iova: u64) -> Result<Arc<DmaRegion>, RegionError> {
        DmaRegion::adopt(file, bytes, iova).map(Arc::new)
    }

    /// Of the same: memory that the device reaches already, as [`Transport::map`] gave it.
    ///
    /// # Errors
    /// `Invalid` for memory that the device was not given.
    fn adopt_memory(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        let _ = region;
        Err(TransportError::Unsupported("devices of this kind are not taken over".to_owned()))
    }

    /// Of the same, once all memory that the device was given is adopted: the doorbell of a queue that runs, with the descriptor behind the one that [`Transport::setup_queue`] made. Of a
    /// doorbell without one `kick` is nothing that counts.
    ///
    /// # Errors
    /// `Invalid` for a queue that does not run, and while the device reaches memory that nobody has: it would write there, and nobody would know when it has stopped.
    fn adopt_queue(&mut self, index: u16, kick: OwnedFd) -> Result<Box<dyn Doorbell>, TransportError> {
        let _ = (index, kick);
        Err(TransportError::Unsupported("devices of this kind are not taken over".to_owned()))
    }

    /// The handover is over, one way or the other, and this is the side that has the device.
    fn resume(&mut self) {}

    /// Gives the device up: unmaps what was mapped for it and closes every descriptor. Idempotent. After this the transport holds no
    /// region.
    fn release(&mut self);
}
