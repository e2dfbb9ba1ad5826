//! What this port needs of the thing it serves: [`Service`], per client a [`Disk`], and of that a [`Region`].
//!
//! They mirror [`Binding`], [`Handle`] and [`Mapped`] of the manager, which implement them below; the port is generic over them, so that tests put
//! a device behind it that refuses, holds or stalls on command. Static dispatch: nothing is paid for it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

pub use cofferdam_manager::{
    Binding, BlockGeometry, Buffer, Completion, Exported, Handle, HandleSpec, HandleState, IoError, IoFlags, IoOp,
    IoRequest, MapError, Mapped, NotExportable, Notify, OpenError, Parking, Patience, Port, PortReport, PortThreads,
    RegionError, SubmitError,
};

/// One client's right to operate; see [`Handle`] for what each call promises.
pub trait Disk: Send {
    /// What [`Disk::map`] makes.
    type Region: Region;
    /// See [`Handle::id`].
    fn id(&self) -> u64;
    /// See [`Handle::geometry`].
    fn geometry(&self) -> &BlockGeometry;
    /// See [`Handle::map`].
    ///
    /// # Errors
    /// As [`Handle::map`].
    fn map(&self, bytes: u64) -> Result<Self::Region, MapError>;
    /// See [`Handle::submit`].
    ///
    /// # Errors
    /// As [`Handle::submit`].
    fn submit(&self, requests: &mut Vec<IoRequest>) -> Result<(), SubmitError>;
    /// See [`Handle::poll`].
    fn poll(&self, arm: bool, out: &mut Vec<Completion>) -> usize;
    /// See [`Handle::device_fd`].
    fn device_fd(&self) -> BorrowedFd<'_>;
    /// See [`Handle::state`].
    fn state(&self) -> HandleState;
}

/// A client's memory; see [`Mapped`].
pub trait Region: Send {
    /// See [`Mapped::descriptor`].
    ///
    /// # Errors
    /// As [`Mapped::descriptor`].
    fn descriptor(&self) -> Result<OwnedFd, MapError>;
    /// See [`Mapped::window`].
    ///
    /// # Errors
    /// As [`Mapped::window`].
    fn window(&self, offset: u64, bytes: u32) -> Result<Buffer, RegionError>;
}

/// What a port serves.
pub trait Service: Send + Sync + 'static {
    /// What a client's thread holds.
    type Disk: Disk + 'static;
    /// The binding's name.
    fn name(&self) -> &str;
    /// Data lanes, at least 1 while it serves.
    fn lanes(&self) -> usize;
    /// See [`Binding::open`].
    ///
    /// # Errors
    /// As [`Binding::open`].
    fn open(&self, spec: HandleSpec) -> Result<Self::Disk, OpenError>;
}

impl Disk for Handle {
    type Region = Mapped;

    fn id(&self) -> u64 {
        Handle::id(self)
    }

    fn geometry(&self) -> &BlockGeometry {
        Handle::geometry(self)
    }

    fn map(&self, bytes: u64) -> Result<Mapped, MapError> {
        Handle::map(self, bytes)
    }

    fn submit(&self, requests: &mut Vec<IoRequest>) -> Result<(), SubmitError> {
        Handle::submit(self, requests)
    }

    fn poll(&self, arm: bool, out: &mut Vec<Completion>) -> usize {
        Handle::poll(self, arm, out)
    }

    fn device_fd(&self) -> BorrowedFd<'_> {
        Handle::device_fd(self)
    }

    fn state(&self) -> HandleState {
        Handle::state(self)
    }
}

impl Region for Mapped {
    fn descriptor(&self) -> Result<OwnedFd, MapError> {
        Mapped::descriptor(self)
    }

    fn window(&self, offset: u64, bytes: u32) -> Result<Buffer, RegionError> {
        Mapped::window(self, offset, bytes)
    }
}

impl Service for Arc<Binding> {
    type Disk = Handle;

    fn name(&self) -> &str {
        Binding::name(self)
    }

    fn lanes(&self) -> usize {
        Binding::lanes(self)
    }

    fn open(&self, spec: HandleSpec) -> Result<Handle, OpenError> {
        Binding::open(self, spec)
    }
}
